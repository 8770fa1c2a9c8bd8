"""What `trimtab doctor` checks, and how to mend what fails."""

from __future__ import annotations

import platform
import shutil
import tempfile
import tomllib
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cli.models import cache_dir
from guard.errors import GuardError, ModelMismatchError
from guard.ownership import check_ownership
from guard.policy import Policy

if TYPE_CHECKING:
    from serve.canary import CanaryReading

__all__ = ["Check", "canary_check", "check_environment", "check_guard", "check_version"]

_DISTRIBUTION = "trimtab"


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was checked.
        ok: whether it passed.
        detail: what was found.
        fix: what to do about it; None if it passed.
    """

    name: str
    ok: bool
    detail: str
    fix: str | None = None

    def as_dict(self) -> dict[str, object]:
        """The check for JSON."""
        return asdict(self)


def check_environment() -> list[Check]:
    """Check package ownership, Python, libraries and the cache folder; loads nothing heavy."""
    try:
        root = check_ownership()
    except GuardError as err:
        return [Check("packages", False, str(err), "use a clean virtual environment")]
    python, libraries = _supported(root)
    return [
        Check("packages", True, f"all four from {root}"),
        check_version("python", platform.python_version(), python),
        *(check_version(each.name, _installed(each.name), each.specifier) for each in libraries),
        _cache(),
    ]


def check_version(name: str, found: str | None, wanted: SpecifierSet) -> Check:
    """Check a version against its supported range; None: not installed."""
    fix = f"use Python {wanted}" if name == "python" else f"pip install '{name}{wanted}'"
    if found is None:
        return Check(name, False, f"not installed ({wanted})", fix)
    ok = wanted.contains(found, prereleases=True)
    return Check(name, ok, f"{found} ({wanted})", None if ok else fix)


def check_guard(
    model: str,
    guard: Path,
    policy: Policy,
    *,
    revision: str | None,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    layers_path: str | None,
) -> list[Check]:
    """Load model and guard as `serve` does, and run its canary: see `serve.canary`."""
    from guard.artifact import load_artifact

    calibrate = f"trimtab calibrate {model} --out {guard}"
    try:
        artifact = load_artifact(guard)
    except GuardError as err:
        return [Check("guard file", False, str(err), calibrate)]
    checks = [Check("guard file", True, f"{guard}, id {artifact.artifact_id}")]

    from serve.transformers_engine import load_engine

    try:
        engine = load_engine(
            model,
            guard,
            policy,
            revision=revision,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            layers_path=layers_path,
        )
    except GuardError as err:
        return [*checks, Check("model", False, str(err), "give a chat model that loads here")]
    checks.append(Check("model", True, f"{model} loads on {device}"))
    made_for = Check("model and guard match", True, artifact.manifest.model.model_id)
    try:
        readings = engine.canary()
    except ModelMismatchError as err:
        return [*checks, Check("model and guard match", False, str(err), calibrate)]
    except GuardError as err:
        failed = Check("shadow pass", False, str(err), "try --dtype float32")
        return [*checks, made_for, failed]
    return [*checks, made_for, *map(canary_check, readings)]


def canary_check(reading: CanaryReading) -> Check:
    """What a canary that passed has shown of one carrier."""
    return Check(
        f"shadow pass, {reading.carrier} carrier",
        True,
        f"layer {reading.layer}: at strength zero {reading.gap:.2g} standard deviations off the"
        f" base logits, of which {reading.tolerance:g} would be rounding; at full strength"
        f" {reading.change:.2g}",
    )


def _supported(root: Path) -> tuple[SpecifierSet, list[Requirement]]:
    """The ranges for Python and libraries: of the checkout, or of what is installed."""
    project = root / "pyproject.toml"
    if project.is_file():
        about = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        python, lines = about["requires-python"], about["dependencies"]
    else:
        python = metadata(_DISTRIBUTION)["Requires-Python"]
        lines = requires(_DISTRIBUTION) or []
    needed = [Requirement(line) for line in lines]
    here = [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return SpecifierSet(python), here


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cache() -> Check:
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as err:
        found = f"{folder}: {err.strerror or err}"
        return Check("cache folder", False, found, "set TRIMTAB_CACHE to a folder you can write")
    return Check("cache folder", True, f"{folder}, {free / 1e9:.1f} GB free")
