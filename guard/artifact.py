"""The guard file: carriers, probe and thresholds in one `.safetensors`, with a JSON manifest.

Format 1: safetensors tensors (table `TENSORS`) and one metadata key, `trimtab`, that holds the
manifest as JSON. Beside the manifest's own fields stands `file_sha256`: the SHA-256 of the whole
file with these 64 digits as zeros. So any flipped bit is found; it is no signature, and whoever can
write the file can forge it. There is no pickle anywhere, so loading a file runs no code. The file's
id is the first 12 hex digits of its own SHA-256. The file names the model's refusal direction:
treat it as a secret. It is written with mode 0600, and whole or not at all.

This module is the only one in `guard` that touches files, apart from `policy`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from guard.errors import ArtifactError, ModelMismatchError
from guard.gate import Thresholds
from guard.probe import Probe
from guard.steering import Carrier

__all__ = [
    "FORMAT_VERSION",
    "TENSORS",
    "CarrierArtifact",
    "CarrierSpec",
    "GateSpec",
    "Interval",
    "Manifest",
    "MessageRead",
    "ModelIdentity",
    "Preset",
    "load_artifact",
    "save_artifact",
    "write_atomically",
]

FORMAT_VERSION = 2
_KEY = "trimtab"
_CHECKSUM_FIELD = "file_sha256"
# In the header the manifest is JSON inside a JSON string, so its quotes are escaped.
_CHECKSUM = re.compile(rb'\\"file_sha256\\": \\"([0-9a-f]{64})\\"')
_NO_CHECKSUM = "0" * 64
_MAX_BYTES = 256 * 2**20
_MAX_HEADER_BYTES = 16 * 2**20

TENSORS = {
    "raise.basis": "(k, d_model) float32",
    "raise.target": "(k,) float32, empty for an additive carrier",
    "lower.basis": "(k, d_model) float32, absent when no lower carrier is admissible",
    "lower.target": "(k,) float32",
    "probe.template": "(n_template, d_model) float32",
    "probe.message": "(n_heads + n_values, d_model) float32, absent where n_heads is 0",
    "probe.hidden": "(n_hidden, n_features + 1) float32, absent where n_hidden is 0",
    "probe.out": "(n_hidden + 1,) float32; (n_features + 1,) where n_hidden is 0",
    "refusal.token_ids": "(n_tokens,) int64",
    "refusal.token_weights": "(n_tokens,) float32",
}

_Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Interval(_Frozen):
    """A measurement with its 95 % interval and the number of prompts behind it."""

    value: _Finite
    low: _Finite
    high: _Finite
    n: int = Field(ge=0)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n={self.n})"


class ModelIdentity(_Frozen):
    """What a guard was calibrated on, so that it never steers another model."""

    model_id: str
    revision: str | None = None
    architecture: str
    n_layers: int = Field(gt=0)
    d_model: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    dtype: str
    quantization: str | None = None
    config_sha256: str
    tokenizer_sha256: str
    chat_template_sha256: str
    weights_sha256: str = Field(description="over a fixed sample of every weight, in bfloat16")


class CarrierSpec(_Frozen):
    """One carrier of the artifact, and what it was measured to do."""

    layer: int = Field(ge=0)
    kind: Literal["add", "affine"]
    family: str = Field(description="how it was found, e.g. difference_in_means")
    position: int | None = Field(
        default=None, description="prompt position it was read at, from the end (-1 is the last)"
    )
    norm_share: _Finite = Field(description="‖direction‖ over the mean norm of the residual stream")
    measurements: dict[str, Interval] = Field(default_factory=dict)


class MessageRead(_Frozen):
    """Where the gate's probe reads the user's last message."""

    layer: int = Field(ge=0)
    n_heads: int = Field(ge=1, le=64, description="attention heads over its tokens")
    suffix_ids: list[int] = Field(description="template tokens behind the message")
    opening_ids: list[int] = Field(description="template tokens before the message")
    width: int = Field(ge=1, le=512, description="last tokens of the message that are read")


class GateSpec(_Frozen):
    """The probe, its thresholds and what they promise."""

    layer: int = Field(ge=0)
    n_hidden: int = Field(default=0, ge=0, le=4096, description="hidden units; 0: it is linear")
    instruction_suffix_ids: list[int] = Field(
        description="template tokens at the end of a prompt; the probe reads the token before them"
    )
    n_pooled: int = Field(
        default=1, ge=1, le=16, description="tokens up to that one that are averaged"
    )
    message: MessageRead | None = Field(
        default=None, description="None: it reads the template's tokens alone"
    )
    raise_above: _Finite
    lower_below: _Finite | None
    raise_if_refusal_below: _Finite
    lower_if_refusal_above: _Finite
    alpha: _Finite
    delta: _Finite
    n_by_stratum: dict[str, int]
    measurements: dict[str, Interval] = Field(default_factory=dict)
    guarantee: str = (
        "For prompts exchangeable with the calibration prompts: at most alpha of benign prompts of"
        " each stratum are raised and at most delta of harmful prompts are lowered, on average over"
        " calibrations. It does not hold under attack or for other traffic."
    )

    @property
    def form(self) -> str:
        """What kind of probe it is, in words."""
        return f"Probe with {self.n_hidden} hidden units" if self.n_hidden else "Linear probe"

    @property
    def where(self) -> str:
        """Where the probe reads, in words."""
        places = ", ".join(map(str, self.positions))
        if self.message is None:
            return f"layer {self.layer} at prompt positions {places}"
        return (
            f"layer {self.message.layer} over the user's message ({self.message.n_heads} attention"
            f" heads), and layer {self.layer} at prompt positions {places}"
        )

    @property
    def layers(self) -> list[int]:
        """Layers whose input the gate reads, rising."""
        return sorted({self.layer, *([self.message.layer] if self.message else [])})

    @property
    def positions(self) -> list[int]:
        """Which template tokens the probe reads, from the end; −1 is the last token."""
        last = -1 - len(self.instruction_suffix_ids)
        return [last - back for back in range(self.n_pooled)]


class Preset(_Frozen):
    """Thresholds between missed harm and over-refusal, and what they did to validation prompts.

    A policy names one with `preset`; budgets, token cap and K are those at which the rates were
    measured, and `as_policy` says them.
    """

    raise_above: _Finite
    lower_below: _Finite | None
    lower_if_refusal_above: _Finite
    raise_budget_nats: _Finite
    lower_budget_nats: _Finite
    token_cap_nats: _Finite | None = Field(default=None, description="None: the larger budget")
    shadow_tokens: int = Field(default=16, ge=1)
    alpha: _Finite = Field(description="most benign prompts of a stratum above raise_above")
    rates: dict[str, Interval] = Field(default_factory=dict)

    def as_policy(self, name: str) -> dict[str, str | float | int]:
        """What to write into a policy file to be served as the rates were measured."""
        cap = self.token_cap_nats
        return {
            "preset": name,
            "raise_budget_nats": self.raise_budget_nats,
            "lower_budget_nats": self.lower_budget_nats,
            "token_cap_nats": max(self.raise_budget_nats, self.lower_budget_nats)
            if cap is None
            else cap,
            "shadow_tokens": self.shadow_tokens,
        }


class Manifest(_Frozen):
    """Everything about a guard that is not a tensor."""

    format_version: Literal[2] = 2
    created: str = Field(description="UTC time, ISO 8601")
    model: ModelIdentity
    seed: int
    safe_kl_nats: _Finite
    datasets: dict[str, str] = Field(description="name → sha256 of the prompts as used")
    libraries: dict[str, str]
    raise_carrier: CarrierSpec
    lower_carrier: CarrierSpec | None
    gate: GateSpec
    refusal_examples: list[str] = Field(
        default_factory=list, description="the model's own refusal openings, most frequent first"
    )
    controls: dict[str, Interval] = Field(default_factory=dict)
    presets: dict[str, Preset] = Field(
        default_factory=dict, description="name → thresholds that a policy may ask for"
    )
    geometry: dict[str, _Finite] = Field(default_factory=dict)
    sensitive: str = "This file names the model's refusal direction. Keep it like a credential."


@dataclass(frozen=True)
class CarrierArtifact:
    """A guard, loaded and checked.

    Attributes:
        manifest: everything that is not a tensor.
        raise_carrier: steers toward refusal.
        lower_carrier: steers away from refusal; None: over-refusals cannot be lowered.
        probe: the gate's.
        refusal_token_ids: (n_tokens,) int64, first tokens of the model's own refusals.
        refusal_token_weights: (n_tokens,) float32 in [0, 1].
        artifact_id: first 12 hex digits of the file's SHA-256; "unsaved" before it is written.
    """

    manifest: Manifest
    raise_carrier: Carrier
    lower_carrier: Carrier | None
    probe: Probe
    refusal_token_ids: Tensor
    refusal_token_weights: Tensor
    artifact_id: str = "unsaved"

    @property
    def layers(self) -> list[int]:
        """Layers whose input is read when this guard serves: the gate's and the carriers'."""
        carriers = (self.raise_carrier, self.lower_carrier)
        return sorted({*self.manifest.gate.layers, *(c.layer for c in carriers if c)})

    @property
    def thresholds(self) -> Thresholds:
        """The gate's thresholds as the zones read them."""
        gate = self.manifest.gate
        return Thresholds(
            gate.raise_above,
            gate.lower_below if self.lower_carrier is not None else None,
            gate.raise_if_refusal_below,
            gate.lower_if_refusal_above,
        )

    def with_preset(self, name: str | None) -> CarrierArtifact:
        """The guard with the thresholds of a preset; None leaves them as they are.

        Raises:
            ArtifactError: the guard has no such preset.
        """
        if name is None:
            return self
        preset = self.manifest.presets.get(name)
        if preset is None:
            known = ", ".join(self.manifest.presets) or "none"
            raise ArtifactError(
                f"guard {self.artifact_id}: no preset {name!r}, it has {known}; correct `preset` in"
                " the policy, or re-run `trimtab calibrate`"
            )
        gate = self.manifest.gate.model_copy(
            update={
                "raise_above": preset.raise_above,
                "lower_below": preset.lower_below,
                "lower_if_refusal_above": preset.lower_if_refusal_above,
                "alpha": preset.alpha,
            }
        )
        return replace(self, manifest=self.manifest.model_copy(update={"gate": gate}))

    def check_model(self, model: ModelIdentity) -> None:
        """Refuse to guard a model that this artifact was not calibrated on.

        Raises:
            ModelMismatchError: names every field that differs, with both values.
        """
        mine = self.manifest.model
        fields = ("architecture", "n_layers", "d_model", "vocab_size", "quantization")
        hashes = ("config_sha256", "tokenizer_sha256", "chat_template_sha256", "weights_sha256")
        differ = [
            f"{name}: guard {_short(getattr(mine, name))}, model {_short(getattr(model, name))}"
            for name in fields + hashes
            if getattr(mine, name) != getattr(model, name)
        ]
        if differ:
            raise ModelMismatchError(
                f"guard {self.artifact_id} was calibrated on {mine.model_id}, not on"
                f" {model.model_id}: {'; '.join(differ)}."
                f" Run `trimtab calibrate {model.model_id}` to make a guard for this model."
            )


def save_artifact(artifact: CarrierArtifact, path: Path) -> str:
    """Write the artifact with mode 0600, whole or not at all; return its id.

    Raises:
        ArtifactError: the tensors do not fit the manifest, or the file cannot be written.
    """
    tensors = {
        "raise.basis": artifact.raise_carrier.basis,
        "raise.target": artifact.raise_carrier.target,
        "refusal.token_ids": artifact.refusal_token_ids,
        "refusal.token_weights": artifact.refusal_token_weights,
    }
    tensors |= {f"probe.{name}": tensor for name, tensor in artifact.probe.tensors.items()}
    if artifact.lower_carrier is not None:
        tensors["lower.basis"] = artifact.lower_carrier.basis
        tensors["lower.target"] = artifact.lower_carrier.target
    # safetensors refuses tensors that share memory, such as two rows of one matrix.
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    _build(artifact.manifest, tensors, path)  # what is written must load again
    fields = artifact.manifest.model_dump(mode="json")
    text = json.dumps({**fields, _CHECKSUM_FIELD: _NO_CHECKSUM}, sort_keys=True)
    data = save_tensors(tensors, metadata={_KEY: text})
    start, end = _checksum_place(data, path)
    data = data[:start] + _checksum(data, start, end) + data[end:]
    write_atomically(path, data, mode=0o600)
    return _file_id(data)


def load_artifact(path: Path) -> CarrierArtifact:
    """Read and check a guard file.

    Raises:
        ArtifactError: missing, not safetensors, truncated, damaged, of another version, not finite,
            or with tensors that do not fit the manifest.
    """
    data = _read(path)
    header_bytes = int.from_bytes(data[:8], "little")
    if header_bytes > _MAX_HEADER_BYTES or header_bytes > len(data) - 8:
        raise _unreadable(
            path, f"its header claims {header_bytes} bytes in a {len(data)}-byte file"
        )
    try:
        header = json.loads(data[8 : 8 + header_bytes])
        text = header["__metadata__"][_KEY]
        tensors = load_tensors(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as err:
        raise _unreadable(path, f"not a trimtab safetensors file ({err!r})") from err
    fields = _parse_fields(text, path)
    start, end = _checksum_place(data, path)
    if _checksum(data, start, end) != data[start:end]:
        raise _unreadable(path, "its bytes do not match its checksum, so it was damaged or edited")
    manifest = _parse_manifest(fields, path)
    artifact = _build(manifest, tensors, path)
    return _with_id(artifact, _file_id(data))


def write_atomically(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write to a temporary file beside `path`, fsync, rename: the old file stays until the end.

    Raises:
        ArtifactError: the folder does not exist, is not writable, or the disk is full.
    """
    handle, name = -1, ""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, mode)
        os.replace(name, path)
    except OSError as err:
        if name:
            Path(name).unlink(missing_ok=True)
        raise ArtifactError(
            f"{path}: cannot write {len(data)} bytes: {err.strerror or err};"
            " what was there before is untouched"
        ) from err


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise _unreadable(path, f"{size} bytes, a guard has at most {_MAX_BYTES}")
        data = path.read_bytes()
    except OSError as err:
        raise ArtifactError(
            f"{path}: cannot read the guard: {err.strerror or err};"
            " make one with `trimtab calibrate MODEL --out FILE`"
        ) from err
    # A header may be 0x80 bytes long by chance, so first ask whether it can be a header at all.
    no_header = int.from_bytes(data[:8], "little") > len(data)
    if no_header and (data[:1] == b"\x80" or data[:2] == b"PK"):
        raise _unreadable(path, "this is a pickle or PyTorch archive, which trimtab never opens")
    if len(data) < 16:
        raise _unreadable(path, f"{len(data)} bytes are too few for a safetensors file")
    return data


def _checksum_place(data: bytes, path: Path) -> tuple[int, int]:
    """Start and end of the 64 checksum digits in a whole file."""
    header_bytes = int.from_bytes(data[:8], "little")
    found = list(_CHECKSUM.finditer(data, 8, 8 + header_bytes))
    if len(found) != 1:
        raise _unreadable(path, f"expected one {_CHECKSUM_FIELD} in its manifest, got {len(found)}")
    return found[0].span(1)


def _checksum(data: bytes, start: int, end: int) -> bytes:
    """SHA-256 of the file with the checksum's own digits as zeros, as 64 lower-case hex digits."""
    blank = data[:start] + _NO_CHECKSUM.encode() + data[end:]
    return hashlib.sha256(blank).hexdigest().encode()


def _parse_fields(text: object, path: Path) -> dict[str, Any]:
    """The manifest's fields, not yet validated, of a format version that this build reads."""
    try:
        raw: Any = json.loads(str(text))
    except (ValueError, RecursionError) as err:
        raise _unreadable(path, f"its manifest is not JSON ({err})") from err
    if not isinstance(raw, dict):
        raise _unreadable(path, f"its manifest is a {type(raw).__name__}, expected an object")
    version = raw.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ArtifactError(
            f"{path}: format version {version!r}, this build reads {FORMAT_VERSION};"
            " re-run `trimtab calibrate`, or use the trimtab release that wrote it"
        )
    return raw


def _parse_manifest(fields: dict[str, Any], path: Path) -> Manifest:
    try:
        return Manifest.model_validate(
            {name: value for name, value in fields.items() if name != _CHECKSUM_FIELD}
        )
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise _unreadable(path, f"manifest field {where}: {first['msg']}") from err


def _build(manifest: Manifest, tensors: dict[str, Tensor], path: Path) -> CarrierArtifact:
    """Check tensors against the manifest and assemble the artifact."""
    d_model, n_layers = manifest.model.d_model, manifest.model.n_layers
    absent = {"lower.basis", "lower.target"} if not manifest.lower_carrier else set()
    absent |= {"probe.message"} if not manifest.gate.message else set()
    absent |= {"probe.hidden"} if not manifest.gate.n_hidden else set()
    expected = set(TENSORS) - absent
    if set(tensors) != expected:
        raise _unreadable(path, f"tensors {sorted(tensors)}, expected {sorted(expected)}")
    for name, tensor in tensors.items():
        wanted = torch.int64 if name == "refusal.token_ids" else torch.float32
        if tensor.dtype != wanted:
            raise _unreadable(path, f"tensor {name}: {tensor.dtype}, expected {wanted}")
        if not bool(torch.isfinite(tensor).all()):
            raise _unreadable(path, f"tensor {name}: holds NaN or infinite values")
    probe = Probe(
        tensors["probe.template"],
        tensors["probe.out"],
        tensors.get("probe.message"),
        manifest.gate.message.n_heads if manifest.gate.message else 0,
        tensors.get("probe.hidden"),
    )
    if fault := probe.fault(d_model):
        raise _unreadable(path, fault)
    if probe.hidden is not None and len(probe.hidden) != manifest.gate.n_hidden:
        raise _unreadable(
            path, f"probe.hidden: {len(probe.hidden)} units, expected {manifest.gate.n_hidden}"
        )
    ids, weights = tensors["refusal.token_ids"], tensors["refusal.token_weights"]
    if ids.dim() != 1 or not len(ids) or ids.shape != weights.shape:
        raise _unreadable(
            path, "refusal tokens: ids and weights must be two equal, non-empty lists"
        )
    if int(ids.min()) < 0 or int(ids.max()) >= manifest.model.vocab_size:
        raise _unreadable(path, f"refusal.token_ids: outside 0…{manifest.model.vocab_size - 1}")
    if float(weights.min()) < 0 or float(weights.max()) > 1:
        raise _unreadable(path, "refusal.token_weights: outside [0, 1]")
    for layer in manifest.gate.layers:
        if not layer <= n_layers:
            raise _unreadable(path, f"gate layer {layer} of a {n_layers}-layer model")
    specs = {"raise": manifest.raise_carrier, "lower": manifest.lower_carrier}
    carriers = {
        name: _carrier(name, spec, tensors, d_model, n_layers, path) if spec else None
        for name, spec in specs.items()
    }
    raising = carriers["raise"]
    if raising is None:
        raise _unreadable(path, "no raise carrier")
    return CarrierArtifact(
        manifest,
        raising,
        carriers["lower"],
        probe,
        ids,
        weights,
    )


def _carrier(
    name: str,
    spec: CarrierSpec,
    tensors: dict[str, Tensor],
    d_model: int,
    n_layers: int,
    path: Path,
) -> Carrier:
    basis, target = tensors[f"{name}.basis"], tensors[f"{name}.target"]
    if basis.dim() != 2 or basis.shape[1] != d_model or not 1 <= basis.shape[0] <= 8:
        raise _unreadable(path, f"{name}.basis: {tuple(basis.shape)}, expected (k ≤ 8, {d_model})")
    want = basis.shape[0] if spec.kind == "affine" else 0
    if target.shape != (want,) or (spec.kind == "add" and basis.shape[0] != 1):
        raise _unreadable(
            path, f"{name}.target: {tuple(target.shape)} does not fit kind {spec.kind}"
        )
    if spec.layer >= n_layers:
        raise _unreadable(path, f"{name} carrier at layer {spec.layer} of a {n_layers}-layer model")
    return Carrier(spec.layer, spec.kind, basis, target)


def _with_id(artifact: CarrierArtifact, artifact_id: str) -> CarrierArtifact:
    return replace(artifact, artifact_id=artifact_id)


def _file_id(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def _short(value: object) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) == 64 else text


def _unreadable(path: Path, why: str) -> ArtifactError:
    return ArtifactError(
        f"{path}: cannot use this guard: {why}; restore the file or re-run `trimtab calibrate`"
    )
