"""`trimtab doctor --engine vllm`: start the guarded vLLM, ask it what is armed, and see it work.

vLLM is one engine per process and talks a lot, so the proof runs in a process of its own:

    doctor ─► python -m cli.vllm_doctor RESULT < question ─► vllm.LLM, behind the plugin
           ◄─ RESULT: every rank's status, and the records of a few requests that were served
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from re import findall
from typing import Any

from cli.doctor import Check, canary_check
from cli.vllm_serve import check_options, vllm_environment
from guard.artifact import load_artifact
from guard.errors import GuardError, NotArmedError
from guard.policy import Policy
from serve.canary import CanaryReading

__all__ = ["check_records", "check_status", "check_vllm"]

_N_HARMFUL, _N_BENIGN = 32, 8
_LOG_LINES = 15


def check_vllm(
    model: str,
    guard: Path,
    policy_file: Path | None,
    policy: Policy,
    options: Sequence[str],
    env: Mapping[str, str],
) -> list[Check]:
    """Start vLLM behind the guard and prove it with a raised and a passed request.

    Args:
        model: folder or hub id.
        guard: the guard file.
        policy_file: the operator's; None is the defaults.
        policy: what stands in it.
        options: of vLLM's engine, as for `vllm serve`.
        env: the environment to start it in.

    Raises:
        InputError: an option that would go round the guard.
    """
    check_options(options)
    try:
        artifact = load_artifact(guard)
    except GuardError as err:
        calibrate = f"trimtab calibrate {model} --out {guard}"
        return [Check("guard file", False, str(err), calibrate)]
    checks = [Check("guard file", True, f"{guard}, id {artifact.artifact_id}")]
    if find_spec("vllm") is None:
        missing = Check("vllm", False, "not installed", "pip install 'trimtab[vllm]'")
        return [*checks, missing]
    try:
        environment = vllm_environment(env, guard, policy_file)
    except NotArmedError as err:
        return [*checks, Check("vllm plugin", False, str(err), "reinstall trimtab beside vLLM")]
    checks.append(Check("vllm plugin", True, "vLLM will load it"))
    began = time.monotonic()
    seen = _ask(model, options, environment)
    if "error" in seen:
        return [*checks, Check("vllm engine", False, seen["error"], "see the log above")]
    seconds = time.monotonic() - began
    checks.append(Check("vllm engine", True, f"started and answered in {seconds:.0f} s"))
    for text in seen["statuses"]:
        checks += check_status(json.loads(text), artifact.artifact_id, policy)
    return [*checks, *check_records(seen["records"], policy)]


def check_status(status: Mapping[str, Any], artifact_id: str, policy: Policy) -> list[Check]:
    """Check what one rank says about itself: armed, with this guard and this policy."""
    expected = {"armed": True, "guard": artifact_id, "policy": policy.digest}
    wrong = [name for name, value in expected.items() if status[name] != value]
    detail = (
        f"guard {status['guard']}, model {status['model'][:16]}, mode {status['mode']},"
        f" {status['runner']} runner, reads layers {', '.join(map(str, status['layers']))}"
    )
    name = f"rank {status['rank']} armed"
    if wrong:
        detail = f"not as expected: {', '.join(wrong)}; {detail}"
        return [Check(name, False, detail, "start again; remove other vLLM plugins")]
    readings = (CanaryReading(**reading) for reading in status["canary"])
    return [Check(name, True, detail), *map(canary_check, readings)]


def check_records(records: Sequence[Mapping[str, Any]], policy: Policy) -> list[Check]:
    """Find a raised and a passed request among those that were served, and check their ledgers."""
    found = Counter(str(record["zone"]) for record in records)
    zones = ", ".join(f"{n} {zone}" for zone, n in sorted(found.items()))
    raised = max(
        (r for r in records if r["zone"] == "raise"), key=lambda r: r["kl_nats"], default=None
    )
    passed = next((r for r in records if r["zone"] == "pass"), None)
    return [_raised(raised, zones, policy), _passed(passed, zones)]


def _raised(record: Mapping[str, Any] | None, zones: str, policy: Policy) -> Check:
    name = "a raised request"
    if record is None:
        fix = "this gate catches too little: calibrate with more prompts, or a higher --alpha"
        return Check(name, False, f"none of {_N_HARMFUL} harmful prompts was raised ({zones})", fix)
    spent, budget = record["kl_nats"], record["budget_nats"]
    said = f"{spent:.3g} of {budget:g} nats, {record['shadow_passes']} shadow passes ({zones})"
    if not record["applied"]:
        said += f"; mode {policy.mode}: nothing was changed"
    ok = (
        0 < spent <= budget == policy.raise_budget_nats
        and record["shadow_passes"] > 0
        and record["applied"] == (policy.mode == "enforce")
    )
    return Check(name, ok, said, None if ok else "trimtab inspect the guard; check the policy")


def _passed(record: Mapping[str, Any] | None, zones: str) -> Check:
    name = "a passed request"
    if record is None:
        fix = "this gate flags everything: calibrate again"
        return Check(name, False, f"every prompt was flagged ({zones})", fix)
    ok = record["kl_nats"] == 0 and record["shadow_passes"] == 0
    said = f"{record['kl_nats']:g} nats, {record['shadow_passes']} shadow passes"
    return Check(name, ok, said, None if ok else "please report this")


def _ask(model: str, options: Sequence[str], env: Mapping[str, str]) -> dict[str, Any]:
    """Run the proof in its own process; what it saw, or {"error": …}."""
    from calibration.prompts import shipped_prompts

    prompts = [p for p in shipped_prompts() if p.stratum == "ordinary"]
    harmful = [p.text for p in prompts if p.label == "harmful"]
    benign = [p.text for p in prompts if p.label == "benign"]
    chosen = [
        text
        for texts, n in ((harmful, _N_HARMFUL), (benign, _N_BENIGN))
        for text in texts[:: max(1, len(texts) // n)][:n]
    ]
    question = {"model": model, "options": list(options), "prompts": chosen}
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder, "result.json"), Path(folder, "log")
        with log.open("w") as stream:
            subprocess.run(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-m", "cli.vllm_doctor", str(result)],
                input=json.dumps(question),
                text=True,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=dict(env),
                check=False,
            )
        text = log.read_text(errors="replace")
        seen: dict[str, Any] = (
            json.loads(result.read_text())
            if result.is_file()
            else {"error": "vLLM's process ended without an answer"}
        )
    if "error" in seen:
        sys.stderr.write("\n".join(text.splitlines()[-_LOG_LINES:]) + "\n")
        # What went wrong in a process of vLLM's own stands in the log only.
        ours = findall(r"guard\.errors\.\w+: (.*)", text)
        seen["error"] = ours[-1] if ours else seen["error"]
    return seen


def _prove(model: str, options: Sequence[str], prompts: Sequence[str]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    llm = LLM.from_engine_args(
        EngineArgs.from_cli_args(parser.parse_args(["--model", model, *options]))
    )
    statuses = [str(status) for status in llm.collective_rpc("trimtab_status")]
    chats: list[Any] = [[{"role": "user", "content": text}] for text in prompts]
    llm.chat(chats, SamplingParams(temperature=0.0, max_tokens=4), use_tqdm=False)
    # vLLM tells its workers with the next step that a request is over.
    llm.chat(chats[:1], SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False)
    served = json.loads(llm.collective_rpc("trimtab_drain")[0])
    return {"statuses": statuses, "records": [entry["record"] for entry in served.values()]}


def _main() -> None:
    question, result = json.load(sys.stdin), Path(sys.argv[1])
    try:
        seen = _prove(question["model"], question["options"], question["prompts"])
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the other process says what it was
        seen = {"error": f"{type(error).__name__}: {error}"}
    result.write_text(json.dumps(seen))


if __name__ == "__main__":
    _main()
