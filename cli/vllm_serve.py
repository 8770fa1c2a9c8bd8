"""`trimtab serve --engine vllm`: vLLM's own server, started with the plugin in place."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from guard.errors import InputError, NotArmedError

__all__ = ["check_options", "run_vllm", "vllm_command", "vllm_environment"]

_GROUP, _NAME, _VALUE = "vllm.general_plugins", "trimtab", "serve.vllm_plugin:register"
_FORBIDDEN = {
    "--chat-template": "the gate reads at the place that the calibrated template marks",
    "--trust-request-chat-template": "a client could then move the place at which the gate reads",
}


def check_options(extra: Sequence[str]) -> None:
    """Refuse options of vLLM that would go round the guard.

    Raises:
        InputError: names the option.
    """
    for argument in extra:
        name = argument.split("=", 1)[0].replace("_", "-")
        if name in _FORBIDDEN:
            raise InputError(f"{name} cannot be used with a guard: {_FORBIDDEN[name]}")


def vllm_command(model: str, flags: Mapping[str, object], extra: Sequence[str]) -> list[str]:
    """Return the command line of `vllm serve`.

    Args:
        model: folder or hub id.
        flags: vLLM's options by name; None and False are left out, True has no value.
        extra: what the user wrote after `--`.

    Raises:
        InputError: an option that would go round the guard.
    """
    check_options(extra)
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
    for name, value in flags.items():
        if value is True:
            command.append(name)
        elif value is not None and value is not False:
            command += [name, str(value)]
    return [*command, *extra]


def vllm_environment(
    env: Mapping[str, str], guard: Path | None, policy: Path | None
) -> dict[str, str]:
    """Return the environment in which vLLM loads the plugin.

    Raises:
        NotArmedError: vLLM would not find the plugin, or find another one under its name.
    """
    found = [point for point in entry_points(group=_GROUP) if point.name == _NAME]
    if not _is_ours(found):
        raise NotArmedError(
            f"vLLM would not load the plugin: entry point {_NAME} of {_GROUP} is"
            f" {', '.join(point.value for point in found) or 'missing'}, expected {_VALUE};"
            " reinstall trimtab in the environment that has vLLM"
        )
    changed = dict(env)
    for name, path in (("TRIMTAB_GUARD", guard), ("TRIMTAB_POLICY", policy)):
        changed.pop(name, None)
        if path is not None:
            changed[name] = str(path.absolute())
    named = [name for name in changed.get("VLLM_PLUGINS", "").split(",") if name]
    if "VLLM_PLUGINS" in changed and _NAME not in named:
        changed["VLLM_PLUGINS"] = ",".join([*named, _NAME])
    return changed


def run_vllm(command: Sequence[str], env: Mapping[str, str]) -> NoReturn:
    """Become vLLM's server; it never returns.

    Raises:
        InputError: vLLM is not installed.
    """
    if find_spec("vllm") is None:
        raise InputError("--engine vllm needs vLLM here: `pip install trimtab[vllm]`")
    os.execve(command[0], list(command), dict(env))  # noqa: S606 - no shell, our own interpreter


def _is_ours(found: Sequence[EntryPoint]) -> bool:
    return bool(found) and all(point.value == _VALUE for point in found)
