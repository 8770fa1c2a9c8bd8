"""FILE.gguf FOLDER: write a GGUF chat model as a bf16 safetensors folder, tokenizer included.

Run by `cli.models` as a process of its own: the libraries' bars and warnings stay out of the way,
and the three gigabytes it takes go back when it ends. It imports nothing of trimtab.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(gguf: Path, folder: Path) -> None:
    """Write config, weights, tokenizer and chat template of a GGUF file into a folder."""
    where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    packed = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.bfloat16, **where)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
    # A model that came from GGUF counts as quantised and refuses to be saved, so its weights move
    # into a fresh one; on the meta device that one costs neither time nor memory.
    vars(packed.config).pop("quantization_config", None)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(packed.config, dtype=torch.bfloat16)
    plain.load_state_dict(packed.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
