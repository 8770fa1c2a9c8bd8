"""The command line as a user meets it: real processes, real files, exit codes and streams."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest
from packaging.specifiers import SpecifierSet
from rich.console import Console
from typer.testing import CliRunner

from calibration.progress import Progress
from cli.doctor import check_environment, check_version
from cli.inspection import mode_warning
from cli.main import app, main
from cli.output import RichProgress
from guard.artifact import CarrierArtifact, save_artifact

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "120"}
TRIMTAB = [sys.executable, "-m", "cli.main"]
SUBCOMMANDS = ["calibrate", "serve", "inspect", "doctor", "models", "models fetch", "models list"]


def trimtab(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TRIMTAB, *arguments],
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@dataclass(frozen=True)
class Said:
    """What a command said and how it ended."""

    code: int
    out: str
    err: str


Call = Callable[..., Said]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run a command in this process, which has torch already."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: str) -> Said:
        code = main(arguments)
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def guard_file(tiny_guard: CarrierArtifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hand-made guard of the tiny refuser, written."""
    path = tmp_path_factory.mktemp("guard") / "guard.safetensors"
    save_artifact(tiny_guard, path)
    return path


# --- start-up and help ----------------------------------------------------------------------------


def test_help_needs_no_heavy_library() -> None:
    code = (
        "import sys, cli.main as m\n"
        "m.main(['--help'])\n"
        "heavy = {'torch', 'transformers', 'sklearn', 'fastapi', 'pydantic', 'numpy'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_help_takes_less_than_half_a_second() -> None:
    def processor_seconds() -> float:  # unlike the clock on the wall, it knows no busy neighbours
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert trimtab("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(processor_seconds() for _ in range(3)) < 0.5


@pytest.mark.parametrize("command", SUBCOMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("trimtab ")


# --- errors ---------------------------------------------------------------------------------------


def test_an_unknown_option_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--no-such-option"]) == 2
    assert "no-such-option" in capsys.readouterr().err


def test_an_expected_error_is_one_line_on_stderr_without_a_traceback(tmp_path: Path) -> None:
    done = trimtab("inspect", str(tmp_path / "none.safetensors"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path / 'none.safetensors'}: cannot read the guard")
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["models", "fetch", "gpt-9"], "not a model that trimtab fetches"),
        (["calibrate", "./no-such-folder"], "no such model folder"),
        (["calibrate", "qwen2.5-coder-0.5b-instruct"], "trimtab models fetch"),
        (["calibrate", ".", "--out", "no/such/folder/guard.safetensors"], "does not exist"),
        (["calibrate", ".", "--safe-kl-nats", "-1"], "--safe-kl-nats"),
        (["calibrate", ".", "--seed", "-1", "--alpha", "2"], "--seed"),
        (["serve", "."], "--guard FILE is needed"),
        (["serve", ".", "--guard", "x", "--policy", "none.yaml"], "cannot read the policy"),
        (["serve", ".", "--guard", "x", "--port", "70000"], "port 70000"),
        (["doctor", "."], "together"),
    ],
)
def test_bad_input_exits_with_two_and_says_what_to_do(
    arguments: list[str],
    named: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert named in shown.err
    assert shown.out == ""


@pytest.mark.parametrize("command", ["serve", "doctor"])
def test_a_policy_that_vllm_cannot_follow_is_told_before_it_is_started(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("steer_from: answer\n")
    arguments = ["--engine", "vllm", "--guard", "x", "--policy", str(policy)]
    assert main([command, ".", *arguments]) == 2
    assert "set steer_from: response" in capsys.readouterr().err


def test_the_layers_can_be_named_wherever_a_model_is_loaded(
    tiny_refuser_dir: Path, guard_file: Path, tmp_path: Path, call: Call
) -> None:
    model, wrong = str(tiny_refuser_dir), ["--layers-path", "model.nowhere"]
    for command in (
        ["calibrate", model, "--out", str(tmp_path / "guard.safetensors")],
        ["serve", model, "--guard", str(guard_file), "--port", "0"],
    ):
        said = call(*command, *wrong)
        assert said.code == 2
        assert "no decoder layers at 'model.nowhere'" in said.err
    doctor = ["doctor", model, "--guard", str(guard_file)]
    assert "no decoder layers at" in " ".join(call(*doctor, "--json", *wrong).out.split())
    assert call(*doctor, "--layers-path", "model.layers").code == 0


def test_a_missing_prompt_file_is_told_before_anything_is_loaded() -> None:
    done = trimtab("calibrate", ".", "--harmful", "none.jsonl")
    assert done.returncode == 2
    assert "none.jsonl" in done.stderr


def test_a_port_in_use_is_told_before_the_model_is_loaded(guard_file: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = trimtab("serve", ".", "--guard", str(guard_file), "--port", port)
    assert done.returncode == 2
    assert f"port {port} on 127.0.0.1 is in use" in done.stderr


# --- inspect --------------------------------------------------------------------------------------


def test_inspect_shows_carriers_and_thresholds(guard_file: Path, call: Call) -> None:
    said = call("inspect", str(guard_file))
    assert (said.code, said.err) == (0, "")
    for shown in ("tiny-refuser", "difference_in_means", "α = 0.05", "i cannot help with that"):
        assert shown in said.out


def test_inspect_as_json_is_one_object_with_the_manifest(
    guard_file: Path, tiny_guard: CarrierArtifact, call: Call
) -> None:
    found = json.loads(call("inspect", str(guard_file), "--json").out)
    assert found["manifest"] == tiny_guard.manifest.model_dump(mode="json")
    assert found["file_mode"] == "0600"
    assert found["warnings"] == []


def test_inspect_warns_of_a_guard_that_others_can_read(
    tiny_guard: CarrierArtifact, tmp_path: Path, call: Call
) -> None:
    path = tmp_path / "guard.safetensors"
    save_artifact(tiny_guard, path)
    assert mode_warning(path) is None
    path.chmod(0o644)
    said = call("inspect", str(path))
    assert said.code == 0
    assert f"run `chmod 600 {path}`" in said.err
    assert json.loads(call("inspect", str(path), "--json").out)["warnings"]


# --- doctor ---------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.usefixtures("cache")
def test_doctor_passes_here_and_names_every_dependency() -> None:
    checks = {check.name: check for check in check_environment()}
    assert [check for check in checks.values() if not check.ok] == []
    assert {"python", "torch", "transformers", "packages", "cache folder"} <= set(checks)
    assert version("torch") in checks["torch"].detail


def test_doctor_names_the_fix_for_a_library_that_is_too_old_or_missing() -> None:
    old = check_version("transformers", "4.30.0", SpecifierSet(">=4.56"))
    assert (old.ok, old.fix) == (False, "pip install 'transformers>=4.56'")
    assert not check_version("torch", None, SpecifierSet(">=2.6")).ok
    assert check_version("torch", "2.13.0+cpu", SpecifierSet(">=2.6")).ok


def test_doctor_fails_with_one_when_the_cache_cannot_be_written(cache: Path, call: Call) -> None:
    cache.write_text("a file where the folder should be")
    said = call("doctor", "--json")
    assert said.code == 1
    found = json.loads(said.out)
    assert not found["ok"]
    failed = [check for check in found["checks"] if not check["ok"]]
    assert [check["name"] for check in failed] == ["cache folder"]
    assert "TRIMTAB_CACHE" in failed[0]["fix"]


@pytest.mark.usefixtures("cache")
def test_doctor_proves_that_a_guard_works_on_its_model(
    tiny_refuser_dir: Path, guard_file: Path, call: Call
) -> None:
    said = call(
        "doctor", str(tiny_refuser_dir), "--guard", str(guard_file), "--device", "cpu", "--json"
    )
    assert said.code == 0, said
    names = [check["name"] for check in json.loads(said.out)["checks"]]
    assert names[-5:] == [
        "guard file",
        "model",
        "model and guard match",
        "shadow pass, raise carrier",
        "shadow pass, lower carrier",
    ]


@pytest.mark.usefixtures("cache")
def test_doctor_finds_that_a_guard_is_of_another_model(
    never_refuses_dir: Path, guard_file: Path, call: Call
) -> None:
    said = call("doctor", str(never_refuses_dir), "--guard", str(guard_file))
    assert said.code == 1
    assert "FAILED" in said.out
    assert "trimtab calibrate" in said.out


@pytest.mark.usefixtures("cache")
def test_doctor_finds_that_a_guard_file_is_damaged(
    tiny_refuser_dir: Path, guard_file: Path, tmp_path: Path, call: Call
) -> None:
    damaged = tmp_path / "guard.safetensors"
    damaged.write_bytes(guard_file.read_bytes()[:-1])
    said = call("doctor", str(tiny_refuser_dir), "--guard", str(damaged), "--json")
    assert said.code == 1
    assert json.loads(said.out)["checks"][-1]["name"] == "guard file"


# --- serve ----------------------------------------------------------------------------------------


def test_serve_answers_guarded_counts_and_stops_on_ctrl_c(
    tiny_refuser_dir: Path, guard_file: Path
) -> None:
    command = ["serve", str(tiny_refuser_dir), "--guard", str(guard_file), "--port", "0"]
    with subprocess.Popen(
        [*TRIMTAB, *command, "--served-model-name", "tiny"],
        env=ENVIRONMENT | {"TRIMTAB_API_KEY": "let-me-in"},
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            assert server.stderr is not None
            said = [server.stderr.readline() for _ in range(2)]
            assert "serving tiny at http://127.0.0.1:" in said[1], said
            url = said[1].split(" at ")[1].split(" ")[0]
            body = {
                "model": "tiny",
                "messages": [{"role": "user", "content": "ask paint house"}],
                "max_tokens": 8,
            }
            key = {"Authorization": "Bearer let-me-in"}
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=key, timeout=60)
            assert answer.json()["choices"][0]["message"]["content"]
            metrics = httpx.get(f"{url}/metrics", timeout=60).text
            assert 'trimtab_guard_armed{model="tiny"} 1.0' in metrics
            counted = [
                line
                for line in metrics.splitlines()
                if line.startswith("trimtab_requests_total{") and line.endswith(" 1.0")
            ]
            assert len(counted) == 1
            server.send_signal(signal.SIGINT)
            assert server.wait(60) == 0
        finally:
            server.kill()


# --- calibrate ------------------------------------------------------------------------------------


def test_an_interrupted_command_says_that_finished_work_is_kept(
    tiny_refuser_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "guard.safetensors"
    with subprocess.Popen(
        [*TRIMTAB, "calibrate", str(tiny_refuser_dir), "--out", str(out)],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stderr is not None
        first = running.stderr.readline()
        running.send_signal(signal.SIGINT)
        rest = running.stderr.read()
        # CPython dies of the signal itself if it came while a string was executed, as by an import
        # of dataclasses; a shell calls both 130.
        assert running.wait(60) in (130, -signal.SIGINT), first + rest
    assert rest.endswith(
        "interrupted: finished work is kept; run the same command again to go on from there\n"
    )
    assert "Traceback" not in rest
    assert not out.exists()


# --- models and progress --------------------------------------------------------------------------


def test_the_models_are_listed_with_their_state(tmp_path: Path) -> None:
    found = json.loads(trimtab("models", "list", "--json", TRIMTAB_CACHE=str(tmp_path)).stdout)
    (model,) = found["models"]
    assert model["name"] == "qwen2.5-coder-0.5b-instruct"
    assert model["status"] == "not fetched"
    assert model["folder"].startswith(str(tmp_path))


def test_progress_is_plain_lines_where_stderr_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with RichProgress() as progress:
        progress.stage("capture [train]", 3)
        progress.advance(3)
        progress.note("a note with [brackets]")
        progress.stage("fetch", 2_000_000, unit="bytes")
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert lines[0] == "capture [train] (0/3)"
    assert lines[1] == "a note with [brackets]"
    assert lines[2].startswith("capture [train]: ")
    assert lines[3] == "fetch (0 bytes/2.0 MB)"


def test_progress_draws_bars_on_a_terminal_and_is_what_calibration_asks_for(
    tmp_path: Path,
) -> None:
    with (tmp_path / "screen").open("w+") as screen:
        console = Console(file=screen, force_terminal=True, width=100, color_system=None)
        with RichProgress(console) as drawn:
            progress: Progress = drawn
            progress.stage("capture [train]", 400)
            progress.advance(100)
            progress.note("a note with [brackets]")
            progress.stage("fit", None)
            progress.advance()
        screen.seek(0)
        text = screen.read()
    assert "capture [train]" in text
    assert "400/400" in text
    assert "a note with [brackets]" in text
