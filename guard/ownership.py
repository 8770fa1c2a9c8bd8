"""Are `guard`, `calibration`, `serve` and `cli` ours? Names this plain are easily taken by others.

A package of the same name from elsewhere would be imported without a word, and what it does is not
guarding. So every command, and the vLLM plugin, asks first. Standard library only, a millisecond.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.util
import sys
from pathlib import Path

from guard.errors import NotArmedError

__all__ = ["PACKAGES", "check_ownership"]

PACKAGES = ("guard", "calibration", "serve", "cli")
_DISTRIBUTION = "trimtab"


def check_ownership() -> Path:
    """Return the folder that holds all four packages: site-packages or one checkout.

    Two things are checked: that Python finds each package beside this file, and, where trimtab is
    installed there, that no other distribution has written over its files.

    Raises:
        NotArmedError: a package is missing, comes from elsewhere, or was overwritten; the message
            names the path found, the path expected and the way out.
    """
    root = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        found, expected = _location(name), root / name
        if found is None:
            raise NotArmedError(
                f"package `{name}` is missing: expected it at {expected};"
                f" reinstall with `pip install --force-reinstall --no-deps {_DISTRIBUTION}`"
            )
        if found != expected:
            raise NotArmedError(
                f"package `{name}` comes from {found}, expected {expected}: {_way_out(name)}"
            )
    for name in _overwritten(root):
        raise NotArmedError(
            f"{root / name / '__init__.py'} is not the file that {_DISTRIBUTION} installed:"
            f" {_way_out(name)}, then"
            f" `pip install --force-reinstall --no-deps {_DISTRIBUTION}`"
        )
    return root


def _location(name: str) -> Path | None:
    """Where Python finds a package (its folder) or a module of that name (its file)."""
    loaded = sys.modules.get(name)
    try:
        spec = loaded.__spec__ if loaded is not None else importlib.util.find_spec(name)
    except ValueError:  # a module that was put there without a spec
        return None
    if spec is None:
        return None
    if spec.origin is not None and spec.has_location:
        file = Path(spec.origin).resolve()
        return file.parent if file.stem == "__init__" else file
    # No __init__: a namespace package, that is, any folder of this name that lay on the path.
    return next((Path(p).resolve() / "*" for p in spec.submodule_search_locations or ()), None)


def _overwritten(root: Path) -> list[str]:
    """Packages whose `__init__.py` differs from what the installer recorded; none in a checkout."""
    wanted = {f"{name}/__init__.py": name for name in PACKAGES}
    changed: list[str] = []
    for record in sorted(root.glob(f"{_DISTRIBUTION}-*.dist-info/RECORD")):
        with record.open(encoding="utf-8", newline="") as file:
            rows = {row[0]: row[1] for row in csv.reader(file) if len(row) > 1}
        hashes = {path: rows[path] for path in wanted if rows.get(path)}
        changed = [wanted[path] for path, value in hashes.items() if _sha256(root / path) != value]
        if hashes and not changed:
            return []  # a stale second record, left by a broken upgrade, says nothing
    return changed


def _sha256(path: Path) -> str:
    """The hash of a file as RECORD writes it (PEP 376)."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest())
    return "sha256=" + digest.rstrip(b"=").decode("ascii")


def _way_out(name: str) -> str:
    from importlib.metadata import packages_distributions  # slow, and only on the way to an error

    others = sorted(set(packages_distributions().get(name, ())) - {_DISTRIBUTION})
    if others:
        return f"run `pip uninstall {' '.join(others)}` or use a clean virtual environment"
    return "rename what lies there, or take its folder off PYTHONPATH"
