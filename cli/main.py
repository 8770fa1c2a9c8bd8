"""The command `trimtab`: calibrate a guard, serve a model with it, look at both.

Heavy libraries are imported inside the commands, so that `--help` answers at once. Errors that
trimtab raises on purpose become one line on stderr in `main`, and nowhere else.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from calibration.config import CalibrationConfig
    from calibration.pipeline import CalibrationResult
    from calibration.progress import Progress

app = typer.Typer(
    name="trimtab",
    help="A runtime safety guard for LLM endpoints: steers refusals inside an exact KL budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(help="Chat models that trimtab fetches by name.", no_args_is_help=True)
app.add_typer(models_app, name="models")


class Dtype(StrEnum):
    """Types that a model's weights can be loaded as."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class EngineName(StrEnum):
    """What runs the model."""

    TRANSFORMERS = "transformers"
    VLLM = "vllm"


_MODEL = "Local folder, hub id, or a name that `trimtab models list` shows."
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL, show_default=False)]
OptionalModel = Annotated[
    str | None, typer.Argument(metavar="MODEL", help=_MODEL, show_default=False)
]
GuardOption = Annotated[
    Path | None,
    typer.Option("--guard", metavar="FILE", help="Guard file that `trimtab calibrate` wrote."),
]
RevisionOption = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit on the model hub.")
]
DtypeOption = Annotated[
    Dtype, typer.Option("--dtype", help="Type of the weights; auto is the checkpoint's own.")
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="A torch device, e.g. cpu or cuda:0; auto prefers CUDA.")
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
LayersOption = Annotated[
    str | None,
    typer.Option(
        "--layers-path",
        metavar="NAME",
        help="Dotted name of the model's list of decoder layers, where it is not found.",
    ),
]
PolicyOption = Annotated[
    Path | None,
    typer.Option("--policy", metavar="FILE", help="Policy in YAML; the defaults without it."),
]
EngineOption = Annotated[
    EngineName,
    typer.Option("--engine", help="transformers: embedded; vllm: vLLM's own, guarded."),
]
VllmOptions = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[-- VLLM_OPTIONS]",
        help="With --engine vllm, options of `vllm serve`.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


_PROMPTS = "JSONL, CSV or text, in place of the shipped {} prompts; may be repeated."
HarmfulOption = Annotated[
    list[Path] | None,
    typer.Option("--harmful", metavar="FILE", exists=True, help=_PROMPTS.format("harmful")),
]
BenignOption = Annotated[
    list[Path] | None,
    typer.Option("--benign", metavar="FILE", exists=True, help=_PROMPTS.format("ordinary benign")),
]
HardBenignOption = Annotated[
    list[Path] | None,
    typer.Option("--hard-benign", metavar="FILE", exists=True, help=_PROMPTS.format("hard benign")),
]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from importlib.metadata import PackageNotFoundError
        from importlib.metadata import version as installed

        try:
            typer.echo(f"trimtab {installed('trimtab')}")
        except PackageNotFoundError:
            typer.echo("trimtab (a checkout that is not installed)")
        raise typer.Exit


@app.command()
def calibrate(
    context: typer.Context,
    model: OptionalModel = None,
    vllm_options: VllmOptions = None,
    engine_name: EngineOption = EngineName.TRANSFORMERS,
    endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Read the model from a vLLM server that was started with TRIMTAB_ADMIN_KEY.",
        ),
    ] = None,
    admin_key: Annotated[
        str | None,
        typer.Option(envvar="TRIMTAB_ADMIN_KEY", help="The key of that server."),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="Where the guard is written.")
    ] = Path("guard.safetensors"),
    harmful: HarmfulOption = None,
    benign: BenignOption = None,
    hard_benign: HardBenignOption = None,
    seed: Annotated[int, typer.Option(help="Of splits, controls and bootstraps.")] = 0,
    safe_kl_nats: Annotated[
        float, typer.Option(help="Mean KL on safe prompts at which candidates are compared.")
    ] = 0.1,
    alpha: Annotated[
        float, typer.Option(help="Most benign prompts of a stratum that may be raised.")
    ] = 0.1,
    delta: Annotated[float, typer.Option(help="Most harmful prompts that may be lowered.")] = 0.05,
    target_over_refusal: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Choose the policy that may refuse this share of ordinary prompts at most, with"
            " 95 % confidence.",
        ),
    ] = None,
    budget_nats: Annotated[
        float | None, typer.Option(help="Most nats per request of the chosen policy.")
    ] = None,
    policy_prompts: Annotated[
        int, typer.Option(help="Prompts of each kind on which policies are compared; 0: none.")
    ] = 32,
    most_prompts: Annotated[
        int | None,
        typer.Option(
            help="Prompts that are used, at most, drawn evenly from all kinds; 0: all."
            " Default: 5,000, on a GPU all."
        ),
    ] = None,
    confidence: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Confidence that alpha and delta hold for these very prompts (PAC); without it"
            " they hold on average over calibrations.",
        ),
    ] = None,
    benign_nats: Annotated[
        float | None,
        typer.Option(
            help="Most nats that raising may spend on a benign prompt of either kind, expected."
        ),
    ] = None,
    added_over_refusal: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Most benign prompts of either kind, expected, that raising makes it refuse.",
        ),
    ] = None,
    thorough: Annotated[
        bool,
        typer.Option(
            "--thorough",
            help="More seeds, steps and prompts, and KL over whole openings; takes longer.",
        ),
    ] = False,
    answer_opening: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="Put behind every prompt, such as a reasoning model's empty thinking block.",
        ),
    ] = "",
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="DIR", help="Write report.html and report.md there."),
    ] = None,
    as_json: JsonOption = False,
    revision: RevisionOption = None,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    layers_path: LayersOption = None,
    work_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keeps captured activations, from which an interrupted run goes on.",
            show_default="beside the guard",
        ),
    ] = None,
) -> None:
    """Pull the refusal carriers out of a model and write its guard.

    The model is loaded here (MODEL), by a vLLM that this command starts (MODEL --engine vllm), or
    read from a server that runs it already (--endpoint URL).

    Exit code 0: written; 2: bad input; 3: the model has no admissible carrier, nothing is written.
    """
    from cli.models import resolve_model
    from cli.output import RichProgress, note, print_json, print_tables
    from guard.errors import InputError

    if not out.absolute().parent.is_dir():
        raise InputError(f"--out {out}: the folder {out.absolute().parent} does not exist; make it")
    if out.is_dir():
        raise InputError(
            f"--out {out}: this is a folder; name the file, e.g. {out / 'guard.safetensors'}"
        )
    on_vllm = engine_name is EngineName.VLLM
    loading = ("revision", "dtype", "device", "trust_remote_code")
    given = [f"--{name.replace('_', '-')}" for name in loading if _given(context, name)]
    if (model is None) == (endpoint is None):
        raise InputError("give MODEL, or --endpoint URL of a server that runs it")
    if endpoint is not None and (on_vllm or given):
        names = ", ".join([*(["--engine vllm"] if on_vllm else []), *given])
        raise InputError(f"{names}: not with --endpoint, whose model is loaded already")
    if endpoint is not None and not admin_key:
        raise InputError("--endpoint needs the server's TRIMTAB_ADMIN_KEY, or --admin-key")
    if on_vllm and "--device" in given:
        raise InputError("--device is not an option of --engine vllm")
    if vllm_options and not on_vllm:
        raise InputError(f"{' '.join(vllm_options)}: options after -- need --engine vllm")
    folder = resolve_model(model) if model is not None else ""

    from pydantic import SecretStr, ValidationError

    from calibration.config import CalibrationConfig
    from calibration.pipeline import calibrate as run
    from cli.inspection import frontier_tables, tables
    from cli.memory import keep_freed_memory

    try:
        config = CalibrationConfig(
            model=folder,
            model_name=model,
            endpoint=endpoint,
            admin_key=SecretStr(admin_key or ""),
            out=out,
            revision=revision,
            dtype=dtype.value,
            device=_torch_device(device),
            trust_remote_code=trust_remote_code,
            layers_path=layers_path,
            harmful=tuple(harmful or ()),
            benign=tuple(benign or ()),
            hard_benign=tuple(hard_benign or ()),
            seed=seed,
            safe_kl_nats=safe_kl_nats,
            alpha=alpha,
            delta=delta,
            confidence=confidence,
            benign_nats=benign_nats,
            added_over_refusal=added_over_refusal,
            target_over_refusal=target_over_refusal,
            budget_nats=budget_nats,
            policy_prompts=policy_prompts,
            most_prompts=most_prompts,
            answer_opening=answer_opening,
            report_dir=report,
            work_dir=work_dir,
        )
    except ValidationError as err:
        faults = (
            f"--{'-'.join(map(str, e['loc'])).replace('_', '-')}: {e['msg']} (got {e['input']!r})"
            for e in err.errors()
        )
        raise InputError("; ".join(faults)) from err
    if thorough:
        config = config.thorough()
    _hush(folder)
    keep_freed_memory()
    with RichProgress() as progress:
        if on_vllm:
            options = _vllm_options(revision, dtype, trust_remote_code, vllm_options)
            result = _calibrate_in_vllm(config, options, progress)
        else:
            result = run(config, progress)
    if as_json:
        print_json({**result.summary(), "out": str(out)})
        return
    print_tables(*tables(result.artifact), *frontier_tables(result.frontier))
    if chosen := result.artifact.manifest.presets.get("chosen"):
        note("policy that keeps the target, for --policy or TRIMTAB_POLICY:")
        for key, value in chosen.as_policy("chosen").items():
            note(f"  {key}: {value}")
    for line in result.notes:
        note(f"note: {line}")
    note(f"guard {result.artifact_id} written to {out}")


def _calibrate_in_vllm(
    config: CalibrationConfig, options: list[str], progress: Progress
) -> CalibrationResult:
    import os

    from pydantic import SecretStr

    from calibration.pipeline import calibrate, gather_prompts
    from cli.vllm_calibrate import private_server

    gather_prompts(config)  # before a model is loaded for them in vain
    progress.stage("start vLLM", None)
    with private_server(config.model, options, os.environ) as server:
        there = {"model": "", "endpoint": server.url, "admin_key": SecretStr(server.key)}
        return calibrate(config.model_copy(update=there), progress)


@app.command()
def serve(
    context: typer.Context,
    model: ModelArgument,
    vllm_options: VllmOptions = None,
    engine_name: EngineOption = EngineName.TRANSFORMERS,
    guard: GuardOption = None,
    policy: PolicyOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="TRIMTAB_API_KEY", help="Key that clients must send; none lets everyone in."
        ),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name that requests use.", show_default="MODEL")
    ] = None,
    revision: RevisionOption = None,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    layers_path: LayersOption = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests that are decoded together.")] = 8,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Requests that may wait; above it the answer is 429.")
    ] = 64,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            min=1, help="Prompt and response together, in tokens.", show_default="the model's own"
        ),
    ] = None,
) -> None:
    """Serve a model behind its guard, with OpenAI's API and Prometheus metrics."""
    from cli.models import resolve_model
    from cli.output import note
    from guard.errors import InputError
    from guard.policy import load_policy
    from serve.vllm_limits import check_policy

    rules = load_policy(policy)
    if guard is None and rules.mode != "off":
        raise InputError(
            f"--guard FILE is needed in mode {rules.mode}; make one with `trimtab calibrate"
            f" {model}`, or serve without a guard by `mode: off` in the policy file"
        )
    if engine_name is EngineName.VLLM:
        check_policy(rules)
    folder = resolve_model(model)
    if engine_name is EngineName.VLLM:
        _serve_with_vllm(context, folder, guard, policy, vllm_options or [])
    elif vllm_options:
        raise InputError(f"{' '.join(vllm_options)}: options after -- need --engine vllm")

    from serve.server import bind_socket, run_server

    with bind_socket(host, port) as listener:  # before a model is loaded for it in vain
        from prometheus_client import REGISTRY

        from serve.guarded_batch import Observers
        from serve.metrics import GuardMetrics
        from serve.transformers_engine import load_engine

        note(f"loading {model}")
        _hush(folder)
        engine = load_engine(
            folder,
            guard,
            rules,
            revision=revision,
            dtype=dtype.value,
            device=_torch_device(device),
            trust_remote_code=trust_remote_code,
            layers_path=layers_path,
            max_batch=max_batch,
            max_queue=max_queue,
            max_model_len=max_model_len,
            served_model_name=served_model_name,
        )
        info = engine.info
        metrics = GuardMetrics(
            REGISTRY,
            model=info.model_name,
            mode=info.mode,
            artifact_id=info.artifact_id,
            format_version=info.format_version,
        )
        metrics.set_budgets(rules)
        engine.observers = Observers(metrics.observe, metrics.observe_gate, metrics.count_unguarded)

        def ready(url: str) -> None:
            by = "no guard" if info.artifact_id is None else f"guard {info.artifact_id}"
            note(f"serving {info.model_name} at {url} ({by}, mode {info.mode})")

        run_server(engine, metrics, api_key=api_key, sock=listener, on_ready=ready)


_VLLM_FLAGS = {
    "host": "--host",
    "port": "--port",
    "served_model_name": "--served-model-name",
    "revision": "--revision",
    "dtype": "--dtype",
    "trust_remote_code": "--trust-remote-code",
    "max_batch": "--max-num-seqs",
    "max_model_len": "--max-model-len",
}


def _serve_with_vllm(
    context: typer.Context, model: str, guard: Path | None, policy: Path | None, extra: list[str]
) -> NoReturn:
    """Become `vllm serve`, with this command's options under vLLM's names."""
    import os

    from cli.vllm_serve import run_vllm, vllm_command, vllm_environment
    from guard.errors import InputError

    for name in ("device", "max_queue", "layers_path"):
        if _given(context, name):
            raise InputError(f"--{name.replace('_', '-')} is not an option of --engine vllm")
    flags = {
        flag: context.params[name]
        for name, flag in _VLLM_FLAGS.items()
        if name in ("host", "port") or _given(context, name)
    }
    env = vllm_environment(os.environ, guard, policy)
    if context.params["api_key"] is not None:
        env["VLLM_API_KEY"] = context.params["api_key"]
    run_vllm(vllm_command(model, flags, extra), env)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Guard file.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Show what a guard file holds: carriers, thresholds, measurements, controls."""
    from cli.inspection import describe, mode_warning, tables
    from cli.output import note, print_json, print_tables
    from guard.artifact import load_artifact

    artifact = load_artifact(file)
    if as_json:
        print_json(describe(artifact, file))
        return
    print_tables(*tables(artifact))
    if warning := mode_warning(file):
        note(f"warning: {warning}")


@app.command()
def doctor(
    model: OptionalModel = None,
    vllm_options: VllmOptions = None,
    engine_name: EngineOption = EngineName.TRANSFORMERS,
    guard: GuardOption = None,
    policy: PolicyOption = None,
    as_json: JsonOption = False,
    revision: RevisionOption = None,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    layers_path: LayersOption = None,
) -> None:
    """Check this environment; with MODEL and --guard, that the guard works on this very setup.

    With --engine vllm it starts vLLM behind the guard, shows what every rank has armed, and serves
    prompts until one was raised and one was passed. Exit code 1 if anything fails.
    """
    import os

    from cli.doctor import check_environment, check_guard
    from cli.models import resolve_model
    from cli.output import note, print_json, print_tables, table
    from guard.errors import InputError
    from guard.policy import load_policy
    from serve.vllm_limits import check_policy

    on_vllm = engine_name is EngineName.VLLM
    if (model is None) != (guard is None):
        raise InputError("give MODEL and --guard FILE together, or neither")
    if on_vllm and model is None:
        raise InputError("--engine vllm needs MODEL and --guard FILE: it starts them")
    if vllm_options and not on_vllm:
        raise InputError(f"{' '.join(vllm_options)}: options after -- need --engine vllm")
    if on_vllm and (device != "auto" or layers_path is not None):
        raise InputError("--device and --layers-path are no options of --engine vllm")
    rules = load_policy(policy)
    if on_vllm:
        check_policy(rules)
    if guard is not None and rules.mode == "off":
        raise InputError(f"{policy}: mode off has no guard to prove")
    checks = check_environment()
    if model is not None and guard is not None:
        note(f"loading {model}")
        folder = resolve_model(model)
        _hush(folder)
        if on_vllm:
            from cli.vllm_doctor import check_vllm

            options = _vllm_options(revision, dtype, trust_remote_code, vllm_options)
            checks += check_vllm(folder, guard, policy, rules, options, os.environ)
        else:
            checks += check_guard(
                folder,
                guard,
                rules,
                revision=revision,
                dtype=dtype.value,
                device=_torch_device(device),
                trust_remote_code=trust_remote_code,
                layers_path=layers_path,
            )
    healthy = all(check.ok for check in checks)
    if as_json:
        print_json({"ok": healthy, "checks": [check.as_dict() for check in checks]})
    else:
        rows = [(c.name, "ok" if c.ok else "FAILED", c.detail, c.fix or "") for c in checks]
        print_tables(table("Doctor", ("check", "", "found", "fix"), rows))
    if not healthy:
        raise typer.Exit(1)


@models_app.command("fetch")
def models_fetch(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="See `trimtab models list`.", show_default=False)
    ],
    as_json: JsonOption = False,
) -> None:
    """Download a model, check it against its pinned SHA-256, and keep it as a model folder.

    Prints the folder. What is finished stays: after an interruption, run it again.
    """
    from cli.models import EMBEDDED, fetch
    from cli.output import RichProgress, print_json
    from guard.errors import InputError

    model = EMBEDDED.get(name)
    if model is None:
        raise InputError(
            f"{name}: not a model that trimtab fetches; it knows {', '.join(EMBEDDED)}."
            " Other models need no fetching: give their folder or hub id to the other commands"
        )
    with RichProgress() as progress:
        folder = fetch(model, progress)
    if as_json:
        print_json({"name": name, "folder": str(folder), "source_sha256": model.sha256})
    else:
        typer.echo(folder)


@models_app.command("list")
def models_list(as_json: JsonOption = False) -> None:
    """List the models that can be fetched by name, and which of them are here."""
    from cli.models import EMBEDDED, model_state
    from cli.output import print_json, print_tables, table

    states = {name: model_state(model) for name, model in EMBEDDED.items()}
    if as_json:
        listed = [
            {
                "name": name,
                "status": states[name].status,
                "folder": str(states[name].folder),
                "hub_repo": model.hub_repo,
                "license": model.license,
                "download_bytes": model.n_bytes,
                "source_sha256": model.sha256,
            }
            for name, model in EMBEDDED.items()
        ]
        print_json({"models": listed})
        return
    rows = [
        (
            name,
            states[name].status,
            f"{m.n_bytes / 1e6:.0f} MB",
            m.license,
            str(states[name].folder),
        )
        for name, m in EMBEDDED.items()
    ]
    print_tables(table("Models", ("name", "status", "download", "licence", "folder"), rows))


def _given(context: typer.Context, name: str) -> bool:
    """True if the user set an option."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _vllm_options(
    revision: str | None, dtype: Dtype, trust_remote_code: bool, extra: list[str] | None
) -> list[str]:
    """This command's options under vLLM's names, then what stands after --."""
    flags = {"--revision": revision, "--dtype": dtype.value}
    options = [part for flag, value in flags.items() if value for part in (flag, value)]
    return [*options, *(["--trust-remote-code"] if trust_remote_code else []), *(extra or [])]


def _hush(folder: str) -> None:
    """Keep transformers' bars off stderr; not while it downloads, which can take long."""
    if Path(folder).is_dir():
        from transformers.utils import logging

        logging.disable_progress_bar()


def _torch_device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0: done; 1: an error of the program or its surroundings; 2: bad input; 3: no admissible carrier;
    130: interrupted.
    """
    try:
        from guard.errors import GuardError
        from guard.ownership import check_ownership
    except ImportError as err:  # another `guard` hides ours: there is nothing to ask
        found = getattr(sys.modules.get("guard"), "__file__", None) or "nowhere"
        sys.stderr.write(
            f"error: package `guard` comes from {found}, expected"
            f" {Path(__file__).resolve().parent.parent / 'guard'} ({err}); uninstall what brought"
            " the other one, take its folder off PYTHONPATH, or use a clean virtual environment\n"
        )
        return 1
    try:
        check_ownership()
        app(args=list(argv) if argv is not None else None, prog_name="trimtab")
    except GuardError as err:
        sys.stderr.write(f"error: {err}\n")
        return err.exit_code
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as end:
        if end.code == 130:
            return _interrupted()
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return 0


def _interrupted() -> int:
    sys.stderr.write(
        "interrupted: finished work is kept; run the same command again to go on from there\n"
    )
    return 130


if __name__ == "__main__":
    sys.exit(main())
