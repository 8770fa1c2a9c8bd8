"""The guard file comes back as it was saved, or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import resource
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from guard.artifact import (
    CarrierArtifact,
    CarrierSpec,
    GateSpec,
    Interval,
    Manifest,
    MessageRead,
    ModelIdentity,
    Preset,
    load_artifact,
    save_artifact,
    write_atomically,
)
from guard.errors import ArtifactError, ModelMismatchError
from guard.gate import Thresholds
from guard.probe import Probe, linear_probe
from guard.steering import Carrier

GOLDEN_SHA256 = "27dcd619666c4ab48d70b2a5003708d010e811db7b8470e22756ea2cda67c8c0"
"""Of `small_artifact` as a file. If it changes, files of other releases no longer load: raise
`FORMAT_VERSION`."""

MODEL = ModelIdentity(
    model_id="example/model",
    revision="main",
    architecture="LlamaForCausalLM",
    n_layers=4,
    d_model=8,
    vocab_size=32,
    dtype="bfloat16",
    config_sha256="a" * 64,
    tokenizer_sha256="b" * 64,
    chat_template_sha256="c" * 64,
    weights_sha256="0" * 64,
)


def small_artifact() -> CarrierArtifact:
    """A guard with every kind of content, and the same bits everywhere."""
    interval = Interval(value=0.5, low=0.25, high=0.75, n=48)
    manifest = Manifest(
        created="2026-01-01T00:00:00Z",
        model=MODEL,
        seed=7,
        safe_kl_nats=0.1,
        datasets={"train": "d" * 64},
        libraries={"torch": "2.13.0"},
        raise_carrier=CarrierSpec(
            layer=2,
            kind="add",
            family="difference_in_means",
            position=-1,
            norm_share=0.5,
            measurements={"shift": interval},
        ),
        lower_carrier=CarrierSpec(layer=1, kind="affine", family="subspace", norm_share=0.25),
        gate=GateSpec(
            layer=2,
            n_hidden=2,
            instruction_suffix_ids=[3, 4],
            raise_above=1.5,
            lower_below=-1.5,
            raise_if_refusal_below=0.9,
            lower_if_refusal_above=0.1,
            alpha=0.05,
            delta=0.05,
            n_by_stratum={"harmful": 60},
            measurements={"auroc": interval},
            message=MessageRead(
                layer=1, n_heads=1, suffix_ids=[7, 3, 4], opening_ids=[6], width=64
            ),
        ),
        refusal_examples=['I\'m sorry, "no". \u00e9', '"file_sha256": "' + "e" * 64 + '"'],
        controls={"shift": interval},
        geometry={"effective_rank": 1.25},
    )
    return CarrierArtifact(
        manifest,
        raise_carrier=Carrier.additive(2, torch.arange(8.0) / 8),
        lower_carrier=Carrier(1, "affine", torch.eye(8)[:2], torch.tensor([0.5, -0.25])),
        probe=Probe(
            template=(torch.arange(8.0) - 4).unsqueeze(0),
            out=torch.tensor([0.5, -1.0, 0.25]),
            message=torch.arange(16.0).reshape(2, 8) / 4,
            n_heads=1,
            hidden=torch.tensor([[1.0, -1.0, 0.5], [0.25, 2.0, 0.0]]),
        ),
        refusal_token_ids=torch.tensor([5, 9]),
        refusal_token_weights=torch.tensor([1.0, 0.75]),
    )


def tensors_of(artifact: CarrierArtifact) -> dict[str, torch.Tensor]:
    """The tensors under the names that they have in the file."""
    lower, probe = artifact.lower_carrier, artifact.probe
    assert lower is not None
    assert probe.message is not None
    assert probe.hidden is not None
    return {
        "probe.message": probe.message,
        "probe.hidden": probe.hidden,
        "raise.basis": artifact.raise_carrier.basis,
        "raise.target": artifact.raise_carrier.target,
        "lower.basis": lower.basis,
        "lower.target": lower.target,
        "probe.template": probe.template,
        "probe.out": probe.out,
        "refusal.token_ids": artifact.refusal_token_ids,
        "refusal.token_weights": artifact.refusal_token_weights,
    }


def fields_of(artifact: CarrierArtifact) -> dict[str, Any]:
    return artifact.manifest.model_dump(mode="json")


def forge(path: Path, fields: object, tensors: dict[str, torch.Tensor]) -> Path:
    """Write a guard file with a correct checksum over whatever content."""
    text = json.dumps(fields)
    if isinstance(fields, dict):
        text = json.dumps({**fields, "file_sha256": "#" * 64})
    data = safetensors.torch.save(
        {name: tensor.clone() for name, tensor in tensors.items()}, metadata={"trimtab": text}
    )
    blank = data.replace(b"#" * 64, b"0" * 64)
    path.write_bytes(data.replace(b"#" * 64, hashlib.sha256(blank).hexdigest().encode()))
    return path


def assert_equal(one: CarrierArtifact, other: CarrierArtifact) -> None:
    assert one.manifest == other.manifest
    ours, theirs = tensors_of(one), tensors_of(other)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name])
    for a, b in (
        (one.raise_carrier, other.raise_carrier),
        (one.lower_carrier, other.lower_carrier),
    ):
        assert a is not None
        assert b is not None
        assert (a.layer, a.kind) == (b.layer, b.kind)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A saved guard."""
    save_artifact(small_artifact(), tmp_path / "guard.safetensors")
    return tmp_path / "guard.safetensors"


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """Let the kernel refuse to write files of this process beyond a size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# What is saved


def test_a_guard_comes_back_as_it_was_saved(path: Path) -> None:
    loaded = load_artifact(path)
    assert_equal(loaded, small_artifact())
    assert loaded.artifact_id == hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    assert loaded.artifact_id == save_artifact(loaded, path)


def test_a_guard_without_a_lower_carrier_comes_back_too(tmp_path: Path) -> None:
    whole = small_artifact()
    manifest = whole.manifest.model_copy(update={"lower_carrier": None})
    save_artifact(replace(whole, manifest=manifest, lower_carrier=None), tmp_path / "guard")
    loaded = load_artifact(tmp_path / "guard")
    assert loaded.lower_carrier is None
    assert loaded.thresholds.lower_below is None


def test_the_format_has_not_changed(path: Path) -> None:
    assert hashlib.sha256(path.read_bytes()).hexdigest() == GOLDEN_SHA256


def test_a_preset_replaces_the_thresholds_and_nothing_else() -> None:
    preset = Preset(
        raise_above=0.5,
        lower_below=-2.0,
        lower_if_refusal_above=0.3,
        raise_budget_nats=1.0,
        lower_budget_nats=1.0,
        alpha=0.2,
    )
    whole = small_artifact()
    manifest = whole.manifest.model_copy(update={"presets": {"strict": preset}})
    guard = replace(whole, manifest=manifest)
    strict = guard.with_preset("strict")
    assert strict.thresholds == Thresholds(0.5, -2.0, 0.9, 0.3)
    assert strict.manifest.gate.alpha == 0.2
    assert strict.artifact_id == guard.artifact_id
    assert guard.with_preset(None) is guard
    with pytest.raises(ArtifactError, match="no preset 'strickt', it has strict"):
        guard.with_preset("strickt")
    with pytest.raises(ArtifactError, match="no preset 'strict', it has none"):
        whole.with_preset("strict")


def test_a_file_that_begins_like_a_pickle_by_chance_is_read(tmp_path: Path) -> None:
    """The first byte is the lowest of the header's length: one length in 256 begins with 0x80."""
    whole = small_artifact()
    for n in range(0, 2048, 8):
        manifest = whole.manifest.model_copy(update={"seed": 7, "created": "2" * n})
        path = tmp_path / "guard"
        save_artifact(replace(whole, manifest=manifest), path)
        if path.read_bytes()[:1] == b"\x80":
            assert load_artifact(path).manifest == manifest
            return
    raise AssertionError("no header of such a length was made")


def test_only_the_owner_can_read_the_file_even_where_others_could_before(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    save_artifact(small_artifact(), path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_another_file_gets_the_mode_it_is_given(tmp_path: Path) -> None:
    for mode in (0o644, 0o640):
        write_atomically(tmp_path / "report.md", b"abc", mode)
        assert stat.S_IMODE((tmp_path / "report.md").stat().st_mode) == mode


def test_carriers_that_share_memory_are_saved_all_the_same(tmp_path: Path) -> None:
    whole, rows = small_artifact(), torch.eye(8)
    shared = replace(
        whole,
        raise_carrier=Carrier(2, "add", rows[:1], torch.empty(0)),
        lower_carrier=Carrier(1, "affine", rows[:2], torch.zeros(2)),
        probe=replace(whole.probe, template=rows[:1], message=rows[:2]),
    )
    save_artifact(shared, tmp_path / "guard")
    assert_equal(load_artifact(tmp_path / "guard"), shared)


def test_what_would_not_load_is_not_saved(path: Path) -> None:
    before = path.read_bytes()
    whole = small_artifact()
    unfit = [
        replace(whole, lower_carrier=None),
        replace(whole, probe=replace(whole.probe, out=torch.full((3,), torch.nan))),
        replace(whole, probe=replace(whole.probe, template=torch.zeros(1, 9))),
        replace(whole, probe=replace(whole.probe, message=torch.zeros(1, 8))),
        replace(whole, probe=replace(whole.probe, message=None)),
        replace(whole, probe=replace(whole.probe, hidden=None)),
        replace(whole, probe=linear_probe(torch.zeros(8))),
        replace(whole, refusal_token_ids=torch.tensor([5, 32])),
    ]
    for artifact in unfit:
        with pytest.raises(ArtifactError):
            save_artifact(artifact, path)
    assert path.read_bytes() == before


def test_a_full_disk_leaves_the_old_file_as_it_was_and_nothing_beside_it(path: Path) -> None:
    before = path.read_bytes()
    other = replace(small_artifact(), probe=replace(small_artifact().probe, out=torch.ones(3)))
    for n_bytes in (0, 100, len(before) - 1):
        with (
            largest_file(n_bytes),
            pytest.raises(ArtifactError, match=r"cannot write .* before is untouched"),
        ):
            save_artifact(other, path)
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == [path.name]
    assert_equal(load_artifact(path), small_artifact())


def test_a_file_is_written_only_where_it_can_be(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for target in (tmp_path / "none" / "guard", tmp_path / "folder"):
        with pytest.raises(ArtifactError, match="cannot write 3 bytes"):
            write_atomically(target, b"abc")
    assert os.listdir(tmp_path) == ["folder"]


# What is damaged


def test_any_flipped_bit_is_found(path: Path) -> None:
    whole = path.read_bytes()
    damaged = bytearray(whole)
    for place in range(len(whole)):
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError):
            load_artifact(path)
        damaged[place] = whole[place]


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "guard"
    save_artifact(small_artifact(), path)
    return path.read_bytes()


@given(data=st.data())
def test_any_other_byte_anywhere_is_found(
    tmp_path_factory: pytest.TempPathFactory, whole_file: bytes, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "other-byte"
    content = bytearray(whole_file)
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] = data.draw(st.integers(0, 255).filter(lambda b: b != content[place]))
    path.write_bytes(content)
    with pytest.raises(ArtifactError):
        load_artifact(path)


def test_a_truncated_or_lengthened_file_is_found(path: Path) -> None:
    whole = path.read_bytes()
    lengths = [*range(20), *(len(whole) * i // 20 for i in range(1, 20)), len(whole) - 1]
    for content in [*(whole[:length] for length in lengths), whole + b"\0", whole + whole]:
        path.write_bytes(content)
        with pytest.raises(ArtifactError):
            load_artifact(path)


@given(st.binary(max_size=400))
def test_random_bytes_raise_nothing_but_our_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "random-bytes"
    for data in (content, len(content).to_bytes(8, "little") + content):
        path.write_bytes(data)
        with pytest.raises(ArtifactError):
            load_artifact(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@given(
    st.fixed_dictionaries(
        {"__metadata__": st.fixed_dictionaries({"trimtab": JSON | JSON.map(json.dumps)}) | JSON},
        optional={
            "probe.out": st.fixed_dictionaries(
                {
                    "dtype": st.sampled_from(["F32", "F16", "F8_E5M2", "I64", "BOOL", "U16", "?"]),
                    "shape": st.lists(st.integers(0, 3), max_size=3),
                    "data_offsets": st.tuples(st.integers(0, 20), st.integers(0, 20)),
                }
            )
        },
    ),
    st.binary(max_size=24),
)
def test_random_headers_raise_nothing_but_our_error(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], content: bytes
) -> None:
    text = json.dumps(header).encode()
    path = tmp_path_factory.getbasetemp() / "random-header"
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)
    with pytest.raises(ArtifactError):
        load_artifact(path)


# What is no guard at all


def test_a_missing_file_and_a_folder_are_told_with_what_to_do(tmp_path: Path) -> None:
    for place, why in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ArtifactError, match=f"{why}.*trimtab calibrate MODEL --out FILE"):
            load_artifact(place)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("exploded",))


def test_a_pickle_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch_file = io.BytesIO()
    torch.save({"raise.basis": torch.zeros(1, 8)}, torch_file)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        Path("guard").write_bytes(pickle.dumps(_Bomb(), protocol))
        with pytest.raises(ArtifactError):
            load_artifact(Path("guard"))
    Path("guard").write_bytes(torch_file.getvalue())
    with pytest.raises(ArtifactError, match="a pickle or PyTorch archive, which trimtab never op"):
        load_artifact(Path("guard"))
    assert not Path("exploded").exists()


def test_a_zip_file_is_not_opened(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "guard", "w") as archive:
        archive.writestr("data.pkl", b"anything")
    with pytest.raises(ArtifactError, match="archive"):
        load_artifact(tmp_path / "guard")


@pytest.mark.parametrize("claim", [2**64 - 1, 2**63, 2**31, 17 * 2**20])
def test_a_huge_header_is_refused_before_it_is_read(path: Path, claim: int) -> None:
    path.write_bytes(claim.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(ArtifactError, match=f"its header claims {claim} bytes in a"):
        load_artifact(path)


def test_a_header_of_really_17_mib_and_one_nested_deeply_are_refused(path: Path) -> None:
    for text in (b" " * (17 * 2**20), b"[" * 100_000, b'{"a":' * 100_000):
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(ArtifactError):
            load_artifact(path)


def test_a_file_of_more_than_256_mib_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "guard").open("wb") as file:
        file.truncate(256 * 2**20 + 1)  # sparse: takes no room
    with pytest.raises(ArtifactError, match="a guard has at most"):
        load_artifact(tmp_path / "guard")


def test_the_weights_of_a_model_are_no_guard(tmp_path: Path) -> None:
    safetensors.torch.save_file({"weight": torch.zeros(4)}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match="not a trimtab safetensors file"):
        load_artifact(tmp_path / "model.safetensors")


# What was written on purpose, with a correct checksum


def test_the_forger_of_these_tests_can_write_a_guard_that_loads(tmp_path: Path) -> None:
    whole = small_artifact()
    forged = forge(tmp_path / "guard", fields_of(whole), tensors_of(whole))
    assert_equal(load_artifact(forged), whole)


def test_a_guard_without_its_checksum_or_with_two_is_refused(path: Path) -> None:
    whole = small_artifact()
    text = json.dumps(fields_of(whole))
    checksum = ', "file_sha256": "' + "0" * 64 + '"'
    for manifest in (text, text[:-1] + checksum + checksum + "}"):
        path.write_bytes(safetensors.torch.save(tensors_of(whole), metadata={"trimtab": manifest}))
        with pytest.raises(ArtifactError, match="expected one file_sha256"):
            load_artifact(path)


@pytest.mark.parametrize("version", [1, 3, 0, True, "2", 2.0, None, [2]])
def test_another_format_version_is_told_with_what_to_do(tmp_path: Path, version: object) -> None:
    fields = {**fields_of(small_artifact()), "format_version": version}
    forged = forge(tmp_path / "guard", fields, tensors_of(small_artifact()))
    with pytest.raises(ArtifactError, match=r"this build reads 2; re-run `trimtab calibrate`"):
        load_artifact(forged)


def test_a_missing_format_version_and_a_manifest_that_is_no_object_are_refused(
    tmp_path: Path,
) -> None:
    fields = fields_of(small_artifact())
    del fields["format_version"]
    for content, why in ((fields, "format version None"), ([], "is a list"), (None, "NoneType")):
        forged = forge(tmp_path / "guard", content, tensors_of(small_artifact()))
        with pytest.raises(ArtifactError, match=why):
            load_artifact(forged)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("unknown",), 1),
        (("gate", "unknown"), 1),
        (("gate", "raise_above"), float("nan")),
        (("gate", "raise_above"), float("inf")),
        (("gate", "lower_below"), "low"),
        (("gate", "layer"), -1),
        (("model", "d_model"), 0),
        (("model", "n_layers"), None),
        (("raise_carrier", "kind"), "multiply"),
        (("raise_carrier", "layer"), -1),
        (("raise_carrier",), None),
        (("seed",), "seven"),
    ],
)
def test_a_manifest_field_that_is_wrong_is_named(
    tmp_path: Path, place: tuple[str, ...], value: object
) -> None:
    fields = fields_of(small_artifact())
    inner = fields
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    forged = forge(tmp_path / "guard", fields, tensors_of(small_artifact()))
    with pytest.raises(ArtifactError, match=f"manifest field {'.'.join(place)}: "):
        load_artifact(forged)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("raise_carrier", "layer"), 4, "raise carrier at layer 4 of a 4-layer model"),
        (("lower_carrier", "layer"), 9, "lower carrier at layer 9 of a 4-layer model"),
        (("gate", "layer"), 5, "gate layer 5 of a 4-layer model"),
        (("raise_carrier", "kind"), "affine", "raise.target: .* does not fit kind affine"),
        (("lower_carrier", "kind"), "add", "lower.target: .* does not fit kind add"),
        (("lower_carrier",), None, "tensors .*, expected"),
        (("model", "d_model"), 9, "probe.template: .*, expected"),
        (("model", "vocab_size"), 9, "refusal.token_ids: outside 0…8"),
    ],
)
def test_a_manifest_that_does_not_fit_the_tensors_is_refused(
    tmp_path: Path, place: tuple[str, ...], value: object, message: str
) -> None:
    fields = fields_of(small_artifact())
    inner = fields
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    forged = forge(tmp_path / "guard", fields, tensors_of(small_artifact()))
    with pytest.raises(ArtifactError, match=message):
        load_artifact(forged)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("extra", torch.zeros(1), "tensors .*'extra'.*, expected"),
        ("probe.out", None, "tensors .*, expected .*'probe.out'"),
        ("lower.target", None, "tensors .*, expected .*'lower.target'"),
        ("raise.basis", torch.zeros(1, 8).half(), "torch.float16, expected torch.float32"),
        ("refusal.token_ids", torch.zeros(2), "torch.float32, expected torch.int64"),
        ("raise.basis", torch.full((1, 8), torch.nan), "raise.basis: holds NaN or infinite"),
        ("lower.target", torch.tensor([torch.inf, 0]), "lower.target: holds NaN or infinite"),
        ("probe.out", torch.full((3,), -torch.inf), "probe.out: holds NaN or infinite"),
        ("refusal.token_weights", torch.full((2,), torch.nan), "holds NaN or infinite"),
        ("raise.basis", torch.zeros(8), "raise.basis: .*expected"),
        ("raise.basis", torch.zeros(1, 9), "raise.basis: .*expected"),
        ("raise.basis", torch.zeros(0, 8), "raise.basis: .*expected"),
        ("lower.basis", torch.zeros(9, 8), "lower.basis: .*expected"),
        ("raise.basis", torch.zeros(2, 8), "raise.target: .* does not fit kind add"),
        ("lower.target", torch.zeros(3), "lower.target: .* does not fit kind affine"),
        ("probe.template", torch.zeros(8), "probe.template: .*expected"),
        ("probe.hidden", torch.zeros(2, 4), "probe.hidden: .*expected"),
        ("probe.hidden", torch.zeros(3, 3), "probe.(hidden|out): .*expected"),
        ("probe.out", torch.zeros(4), "probe.out: .*expected"),
        ("refusal.token_ids", torch.tensor([5]), "two equal, non-empty lists"),
        ("refusal.token_ids", torch.tensor([[5, 9]]), "two equal, non-empty lists"),
        ("refusal.token_ids", torch.tensor([5, 32]), "refusal.token_ids: outside 0…31"),
        ("refusal.token_ids", torch.tensor([-1, 5]), "refusal.token_ids: outside 0…31"),
        ("refusal.token_weights", torch.tensor([0.5, 1.5]), "outside .0, 1."),
        ("refusal.token_weights", torch.tensor([-0.1, 1.0]), "outside .0, 1."),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, name: str, tensor: torch.Tensor | None, message: str
) -> None:
    tensors = {**tensors_of(small_artifact())}
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    forged = forge(tmp_path / "guard", fields_of(small_artifact()), tensors)
    with pytest.raises(ArtifactError, match=message):
        load_artifact(forged)


def test_empty_lists_of_refusal_tokens_are_refused(tmp_path: Path) -> None:
    tensors = tensors_of(small_artifact())
    tensors["refusal.token_ids"] = torch.empty(0, dtype=torch.int64)
    tensors["refusal.token_weights"] = torch.empty(0)
    forged = forge(tmp_path / "guard", fields_of(small_artifact()), tensors)
    with pytest.raises(ArtifactError, match="two equal, non-empty lists"):
        load_artifact(forged)


# The model it belongs to


def test_the_same_model_passes_under_another_name_and_in_another_dtype() -> None:
    update = {"model_id": "a/copy", "revision": None, "dtype": "float32"}
    small_artifact().check_model(MODEL.model_copy(update=update))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("architecture", "OtherForCausalLM", "architecture: guard LlamaForCausalLM, model Other"),
        ("n_layers", 5, "n_layers: guard 4, model 5"),
        ("d_model", 16, "d_model: guard 8, model 16"),
        ("vocab_size", 33, "vocab_size: guard 32, model 33"),
        ("quantization", "awq", "quantization: guard None, model awq"),
        ("config_sha256", "f" * 64, "config_sha256: guard aaaaaaaaaaaa…, model ffffffffffff…"),
        ("tokenizer_sha256", "f" * 64, "tokenizer_sha256: guard bbbbbbbbbbbb…"),
        ("chat_template_sha256", "f" * 64, "chat_template_sha256: guard cccccccccccc…"),
        ("weights_sha256", "f" * 64, "weights_sha256: guard 000000000000…"),
    ],
)
def test_another_model_is_refused_naming_what_differs(
    name: str, value: object, message: str
) -> None:
    with pytest.raises(ModelMismatchError, match=message) as caught:
        small_artifact().check_model(MODEL.model_copy(update={name: value}))
    others = set(ModelIdentity.model_fields) - {name}
    assert not any(f"{other}:" in str(caught.value) for other in others)
    assert "Run `trimtab calibrate example/model`" in str(caught.value)


def test_every_field_that_differs_is_named() -> None:
    other = MODEL.model_copy(update={"n_layers": 5, "weights_sha256": "f" * 64})
    with pytest.raises(ModelMismatchError, match=r"n_layers: .*; weights_sha256: "):
        small_artifact().check_model(other)
