"""From a model folder to a guard file, on the tiny refuser: what is written, and what is not.

It refuses the harmful prompts but answers the hard ones among them: there is something to raise.
Hard benign prompts it mostly refuses: there is something to lower.
"""

from __future__ import annotations

import hashlib
import json
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save as save_tensors
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibration.capture import WorkFolder, capture
from calibration.causal import Sign
from calibration.config import CalibrationConfig
from calibration.disguises import DISGUISES, as_chat
from calibration.evaluate import answer_pairs, compare
from calibration.frontier import FrontierPoint
from calibration.html_report import html_page, worth_reading
from calibration.pipeline import (
    CalibrationResult,
    _longer,
    calibrate,
    calibrate_subject,
    gather_prompts,
)
from calibration.progress import Progress, Silent
from calibration.prompts import datasets_sha256, split_prompts, spread
from calibration.report import write_report
from calibration.statistics import auroc
from calibration.transformers_subject import TransformersSubject, load_subject
from cli.main import main
from guard.artifact import CarrierArtifact, Interval, load_artifact, save_artifact
from guard.errors import ArtifactError, InputError, NoAdmissibleCarrierError
from guard.gate import Zone
from guard.policy import Policy
from guard.steering import Carrier
from guard.template import turns
from tests.tiny_refuser import (
    REFUSAL_TEXT,
    hard_benign_prompts,
    hard_harmful_prompts,
    harmful_prompts,
    harmless_prompts,
    vocabulary,
)


@dataclass(frozen=True)
class PromptFiles:
    """The tiny model's prompts as a user would give them."""

    harmful: Path
    benign: Path
    hard_benign: Path

    def options(self) -> list[str]:
        """For the command line."""
        files = {
            "--harmful": self.harmful,
            "--benign": self.benign,
            "--hard-benign": self.hard_benign,
        }
        return [text for name, path in files.items() for text in (name, str(path))]

    def config(self, model: Path, out: Path, **settings: object) -> CalibrationConfig:
        """The settings of a calibration with these prompts."""
        return CalibrationConfig.model_validate(
            {
                "model": str(model),
                "out": out,
                "harmful": (self.harmful,),
                "benign": (self.benign,),
                "hard_benign": (self.hard_benign,),
                **settings,
            }
        )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> PromptFiles:
    folder = tmp_path_factory.mktemp("prompts")

    def write(name: str, texts: list[str]) -> Path:
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return path

    return PromptFiles(
        write("harmful", harmful_prompts() + hard_harmful_prompts()),
        write("benign", harmless_prompts()),
        write("hard_benign", hard_benign_prompts()),
    )


@dataclass(frozen=True)
class Done:
    """A finished calibration and where it wrote."""

    config: CalibrationConfig
    result: CalibrationResult
    artifact: CarrierArtifact
    report: Path


@pytest.fixture(scope="module")
def done(
    tiny_refuser_dir: Path, files: PromptFiles, tmp_path_factory: pytest.TempPathFactory
) -> Done:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("calibrated")
    report = folder / "report"
    config = files.config(tiny_refuser_dir, folder / "guard.safetensors", report_dir=report)
    result = calibrate(config)
    return Done(config, result, load_artifact(config.out), report)


@pytest.fixture(scope="module")
def subject(done: Done) -> TransformersSubject:
    return load_subject(done.config)


def tensors(artifact: CarrierArtifact) -> dict[str, torch.Tensor]:
    found = {
        "raise": artifact.raise_carrier.basis,
        "ids": artifact.refusal_token_ids,
        "weights": artifact.refusal_token_weights,
    }
    found |= {f"probe {name}": tensor for name, tensor in artifact.probe.tensors.items()}
    if artifact.lower_carrier is not None:
        found["lower"] = artifact.lower_carrier.basis
    return found


def assert_same_guard(first: CarrierArtifact, second: CarrierArtifact) -> None:
    mine, other = tensors(first), tensors(second)
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, other[name]), name
    assert first.thresholds == second.thresholds
    assert first.manifest.gate == second.manifest.gate
    assert first.manifest.raise_carrier == second.manifest.raise_carrier
    assert first.manifest.lower_carrier == second.manifest.lower_carrier


# --- what is written ------------------------------------------------------------------------------


def test_the_guard_loads_and_fits_the_model_it_was_made_for(
    done: Done, subject: TransformersSubject
) -> None:
    done.artifact.check_model(subject.identity)
    assert done.artifact.artifact_id == done.result.artifact_id
    assert done.artifact.lower_carrier is not None
    assert done.config.out.stat().st_mode & 0o777 == 0o600


def test_the_gate_reads_the_last_token_of_the_instruction(done: Done) -> None:
    """What follows every instruction is <eot> <assistant>, whatever the words before it."""
    words = vocabulary()
    suffix = [words.index("<eot>"), words.index("<assistant>")]
    assert done.artifact.manifest.gate.instruction_suffix_ids == suffix


def test_the_work_folder_is_removed_once_the_guard_is_written(done: Done) -> None:
    assert not done.config.work_folder.exists()
    assert sorted(p.name for p in done.config.out.parent.iterdir()) == [
        "guard.safetensors",
        "report",
    ]


@pytest.mark.parametrize("sign", ["raise", "lower"])
def test_the_chosen_carrier_beats_every_random_control(done: Done, sign: str) -> None:
    choice = done.result.chosen["raise" if sign == "raise" else "lower"]
    admission = choice.admission
    assert len(admission.at_kl) >= 20
    assert len(admission.at_norm) >= 20
    for control in admission.at_kl:
        assert control.shift.high < choice.effect.shift.low
    for control in admission.at_norm:
        assert control.full_shift.high < choice.effect.full_shift.low
    best = done.artifact.manifest.controls
    assert best[f"{sign}_best_at_equal_kl"].high < choice.effect.shift.low
    assert best[f"{sign}_best_at_equal_norm"].high < choice.effect.full_shift.low


@pytest.mark.parametrize(
    ("zone", "prompts", "at_base", "guarded"),
    [
        (Zone.RAISE, hard_harmful_prompts()[:40], (0.0, 0.05), (0.95, 1.0)),
        (Zone.LOWER, hard_benign_prompts()[:40], (0.9, 1.0), (0.0, 0.05)),
    ],
)
def test_steering_inside_a_budget_moves_nearly_every_response(
    done: Done,
    subject: TransformersSubject,
    zone: Zone,
    prompts: list[str],
    at_base: tuple[float, float],
    guarded: tuple[float, float],
) -> None:
    check_steering(subject, done.artifact, zone, prompts, at_base, guarded)


@pytest.mark.parametrize(
    ("zone", "prompts", "at_base", "guarded"),
    [
        (Zone.RAISE, harmless_prompts()[:40], (0.0, 0.05), (0.95, 1.0)),
        (Zone.LOWER, harmful_prompts()[:40], (0.95, 1.0), (0.0, 0.05)),
    ],
)
def test_the_best_difference_in_means_moves_prompts_of_every_kind(
    done: Done,
    subject: TransformersSubject,
    zone: Zone,
    prompts: list[str],
    at_base: tuple[float, float],
    guarded: tuple[float, float],
) -> None:
    """Refined carriers are taught to leave ordinary prompts alone; differences in means are not."""

    def best(sign: Sign, towards: float) -> Carrier:
        means = [
            e for e in done.result.effects[sign] if e.candidate.family == "difference_in_means"
        ]
        effect = max((e for e in means if e.can_spend), key=lambda e: e.shift_per_nat)
        return effect.candidate.carrier(2.0 * towards * effect.scale)

    artifact = replace(
        done.artifact, raise_carrier=best("raise", 1.0), lower_carrier=best("lower", -1.0)
    )
    check_steering(subject, artifact, zone, prompts, at_base, guarded)


def check_steering(
    subject: TransformersSubject,
    artifact: CarrierArtifact,
    zone: Zone,
    prompts: list[str],
    at_base: tuple[float, float],
    guarded: tuple[float, float],
) -> None:
    """Rates before and after lie where they should, and no budget is passed."""
    budget = 4.0
    policy = Policy(raise_budget_nats=budget, lower_budget_nats=budget, token_cap_nats=budget)
    pairs = answer_pairs(subject, artifact, policy, prompts, 12, zone=zone)
    rates = compare(pairs, seed=0)
    assert at_base[0] <= rates["refused_base"].value <= at_base[1]
    assert guarded[0] <= rates["refused_guarded"].value <= guarded[1]
    assert {pair.record.zone for pair in pairs} == {zone}
    assert max(pair.record.kl_nats for pair in pairs) <= budget
    assert min(pair.record.kl_nats for pair in pairs) > 0.0


def test_thresholds_are_the_conformal_quantiles_of_the_calibration_split(done: Done) -> None:
    """Scores and quantiles are computed anew, from plain forward passes and a sorted list."""
    split = split_prompts(gather_prompts(done.config), done.config.seed).calibration
    gate = done.artifact.manifest.gate
    model = AutoModelForCausalLM.from_pretrained(done.config.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(done.config.model)
    scores: dict[str, list[float]] = {"ordinary": [], "hard": [], "harmful": []}
    probe = done.artifact.probe
    assert probe.message is not None
    assert probe.hidden is not None
    assert gate.message is not None
    n_before = tokenizer.apply_chat_template(
        [{"role": "user", "content": ""}], return_dict=True, add_generation_prompt=True
    )["input_ids"].index(gate.message.suffix_ids[0])
    for prompt in split:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.text}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )["input_ids"]
        with torch.no_grad():
            hidden = model(ids, output_hidden_states=True).hidden_states
        first, last = n_before, ids.shape[1] - len(gate.message.suffix_ids)
        tokens = hidden[gate.message.layer][0, first:last] @ probe.message.T
        attention, values = tokens[:, : probe.n_heads].softmax(0), tokens[:, probe.n_heads :]
        read = hidden[gate.layer][0, last - 1] @ probe.template.T
        features = torch.cat([(attention.T @ values).flatten(), read, torch.ones(1)])
        units = torch.nn.functional.gelu(probe.hidden @ features)
        group = "harmful" if prompt.label == "harmful" else prompt.stratum
        scores[group].append(float(probe.out @ torch.cat([units, torch.ones(1)])))

    def upper(values: list[float], level: float) -> float:
        rank = -int(-(len(values) + 1) * (1 - level) // 1)  # rounded up
        return sorted(values)[rank - 1]

    raise_above = max(upper(scores["ordinary"], gate.alpha), upper(scores["hard"], gate.alpha))
    lower_below = -upper([-s for s in scores["harmful"]], gate.delta)
    assert gate.raise_above == pytest.approx(raise_above, abs=1e-3)
    assert gate.lower_below == pytest.approx(min(lower_below, raise_above), abs=1e-3)
    assert gate.n_by_stratum == {
        "ordinary benign": len(scores["ordinary"]),
        "hard benign": len(scores["hard"]),
        "harmful": len(scores["harmful"]),
    }


def test_longer_copies_are_of_training_prompts_alone_and_fit_the_context(
    done: Done, subject: TransformersSubject
) -> None:
    splits = split_prompts(gather_prompts(done.config), done.config.seed)
    copies = _longer(subject, splits.train, done.config)
    assert len(splits.train) / 8 < len(copies) <= len(splits.train) / 4
    ids = {prompt.id for prompt in splits.train}
    assert {copy.id.removesuffix("-long") for copy in copies} <= ids
    assert max(len(subject.encode(copy.text)) for copy in copies) + 64 <= 256
    unread = TransformersSubject(
        subject.runner.model, subject.tokenizer, "tiny-refuser", message_width=0
    )
    assert _longer(unread, splits.train, done.config) == []
    none = done.config.model_copy(update={"long_prompts": 0})
    assert _longer(subject, splits.train, none) == []


def test_reported_rates_are_those_of_the_test_split(
    done: Done, subject: TransformersSubject, tmp_path: Path
) -> None:
    test = split_prompts(gather_prompts(done.config), done.config.seed).test
    texts = {p.text for p in test}
    for group, pairs in done.result.tested.items():
        assert pairs, group
        assert {pair.prompt for pair in pairs} <= texts
    found = done.artifact.manifest.gate.measurements
    harmful = [p for p in test if p.label == "harmful"]
    captured = capture(
        subject, harmful, range(4), range(4), 32, WorkFolder(tmp_path / "w", "x"), "test", Silent()
    )
    gate = done.artifact.manifest.gate
    scores = done.result.probe.scores(captured)
    share = float((scores > gate.raise_above).float().mean())
    assert found["harmful_above_raise"].n == len(harmful)
    assert found["harmful_above_raise"].value == pytest.approx(share)
    manifest = done.artifact.manifest
    assert manifest.datasets["test"] == datasets_sha256(test)
    assert len(set(manifest.datasets.values())) == 4


def test_the_gate_is_tried_in_every_disguise_that_fits_and_the_report_names_the_others(
    done: Done, subject: TransformersSubject, tmp_path: Path
) -> None:
    """300 words and more do not fit the 256 tokens of the tiny model."""
    test = split_prompts(gather_prompts(done.config), done.config.seed).test
    n = done.config.disguised_prompts
    plain = [*spread(test, "harmful", None, n), *spread(test, "benign", "hard", n)]
    found = done.artifact.manifest.gate.measurements
    tried = {name.removeprefix("auroc_disguised_") for name in found if "disguised" in name}
    assert set(DISGUISES) - tried == {"inside_a_long_document"}
    for name in ("upper_case", "permissive_system_prompt", "second_turn", "asked_a_turn_before"):
        chats = subject.encode_chats([as_chat(DISGUISES[name](p.text)) for p in plain])
        work = WorkFolder(tmp_path / "work", name)
        data = capture(subject, plain, range(4), range(4), 32, work, name, Silent(), chats)
        scores = done.result.probe.scores(data)
        area = auroc(scores[data.harmful], scores[~data.harmful], done.config.seed)
        assert found[f"auroc_disguised_{name}"] == area
    page = (done.report / "report.md").read_text()
    assert "| auroc disguised second turn |" in page
    assert re.search(
        r"not tried in these disguises: inside a long document \(.* do not fit the model's 256\)",
        page,
    )


def test_a_model_without_a_system_role_is_calibrated_without_the_system_prompts(
    tiny_refuser_dir: Path, files: PromptFiles, tmp_path: Path
) -> None:
    other = tmp_path / "model"
    shutil.copytree(tiny_refuser_dir, other)
    template = (other / "chat_template.jinja").read_text()
    assert template.count("in ('user', 'system')") == 1
    (other / "chat_template.jinja").write_text(
        template.replace("in ('user', 'system')", "== 'user'")
    )
    report = tmp_path / "report"
    artifact = calibrate(
        files.config(other, tmp_path / "guard", report_dir=report, policy_prompts=0, refine_steps=0)
    ).artifact
    found = artifact.manifest.gate.measurements
    assert "auroc_disguised_second_turn" in found
    for name in ("operator", "permissive"):
        assert f"auroc_disguised_{name}_system_prompt" not in found
        said = f"{name} system prompt (the chat template takes no such chat)"
        assert said in (report / "report.md").read_text()
        assert said in (report / "report.html").read_text()


def test_a_thorough_calibration_follows_safe_prompts_over_whole_openings(
    tiny_refuser_dir: Path, files: PromptFiles, tmp_path: Path
) -> None:
    config = files.config(
        tiny_refuser_dir, tmp_path / "guard.safetensors", policy_prompts=0, refine_steps=0
    ).thorough()
    assert (config.confirm_prompts, config.safe_tokens) == (64, 16)
    artifact = calibrate(config.model_copy(update={"refine_steps": 2})).artifact
    found = artifact.manifest.raise_carrier.measurements
    for stratum in ("ordinary", "hard"):
        for how in ("added", "ablated"):
            mean = found[f"validation_{how}_kl_mean_of_{stratum}"]
            p95 = found[f"validation_{how}_kl_p95_of_{stratum}"]
            assert 0.0 <= mean.low <= mean.value <= mean.high
            assert mean.value <= p95.value
            assert mean.n == p95.n > 0


def test_risk_control_raises_the_threshold_until_the_expected_loss_holds(
    files: PromptFiles, tiny_refuser_dir: Path, tmp_path: Path
) -> None:
    target = 0.05
    config = files.config(
        tiny_refuser_dir, tmp_path / "guard.safetensors", alpha=0.3, added_over_refusal=target
    )
    artifact = calibrate(config).artifact
    plain = calibrate(config.model_copy(update={"added_over_refusal": None})).artifact
    assert artifact.thresholds.raise_above > plain.thresholds.raise_above
    for stratum in ("ordinary", "hard"):
        bound = artifact.manifest.gate.measurements[
            f"{stratum}_benign_added_over_refusal_by_raising_expected"
        ]
        assert bound.value <= bound.high <= target
        assert bound.n == artifact.manifest.gate.n_by_stratum[f"{stratum} benign"]
    above = [preset.raise_above for preset in artifact.manifest.presets.values()]
    assert min(above) >= artifact.thresholds.raise_above


def test_a_risk_that_cannot_be_certified_is_refused_before_anything_is_measured(
    files: PromptFiles, tiny_refuser_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "guard.safetensors"
    with pytest.raises(InputError, match=r"nats of ordinary benign prompts: 0\.001 cannot be"):
        calibrate(files.config(tiny_refuser_dir, out, benign_nats=0.001))
    assert not out.exists()


def test_held_out_prompts_that_are_answered_are_spread_over_the_files(done: Done) -> None:
    """The hard harmful prompts, which alone can be raised, stand at the end of their file."""
    answered = {pair.prompt for pair in done.result.tested["harmful"]}
    assert answered & set(harmful_prompts())
    assert answered & set(hard_harmful_prompts())


def test_the_refusal_opening_is_the_models_own(done: Done) -> None:
    opening = vocabulary().index(REFUSAL_TEXT.split()[0])
    assert done.artifact.refusal_token_ids.tolist() == [opening]
    assert 0.9 < float(done.artifact.refusal_token_weights[0]) < 1.0
    assert done.artifact.manifest.refusal_examples == [REFUSAL_TEXT]


def test_an_opening_in_another_tongue_is_learned_too(
    tiny_refuser_dir: Path, files: PromptFiles, tmp_path: Path
) -> None:
    """Exchange "i" and "sorry" in the vocabulary: the same weights now say "sorry cannot …"."""
    other = tmp_path / "model"
    shutil.copytree(tiny_refuser_dir, other)
    text = (other / "tokenizer.json").read_text()
    assert text.count('"i"') == 1
    (other / "tokenizer.json").write_text(text.replace('"i"', '"sorry"'))
    result = calibrate(files.config(other, tmp_path / "guard.safetensors"))
    tokenizer = AutoTokenizer.from_pretrained(other)
    (learned,) = result.artifact.refusal_token_ids.tolist()
    assert tokenizer.decode([learned]) == "sorry"
    assert result.artifact.manifest.refusal_examples == [REFUSAL_TEXT.replace("i ", "sorry ", 1)]


def test_behind_an_answers_opening_refusals_are_learned_and_the_gate_reads_where_it_did(
    done: Done, tiny_refuser_dir: Path, files: PromptFiles, tmp_path: Path
) -> None:
    """A second <assistant> stands in for an empty thinking block; the model minds it little."""
    config = files.config(
        tiny_refuser_dir, tmp_path / "guard.safetensors", answer_opening="<assistant>"
    )
    subject = load_subject(config)
    eot, assistant = vocabulary().index("<eot>"), vocabulary().index("<assistant>")
    assert subject.encode("ask steal car")[-3:] == [eot, assistant, assistant]
    (chat,) = subject.encode_chats([turns("ask paint car", "sure", "ask steal car")])
    assert chat[-3:] == [eot, assistant, assistant]
    guard = calibrate(config).artifact
    mine, plain = guard.manifest.gate, done.artifact.manifest.gate
    assert mine.instruction_suffix_ids == plain.instruction_suffix_ids == [eot, assistant]
    assert mine.positions == plain.positions
    assert mine.raise_above == pytest.approx(plain.raise_above, rel=0.05)  # the same token is read
    assert guard.refusal_token_ids.tolist() == done.artifact.refusal_token_ids.tolist()
    assert guard.manifest.raise_carrier.position is not None
    assert not torch.equal(guard.raise_carrier.basis, done.artifact.raise_carrier.basis)


def test_the_same_seed_gives_the_same_guard_bit_for_bit(
    done: Done, tiny_refuser_dir: Path, files: PromptFiles, tmp_path: Path
) -> None:
    calibrate(files.config(tiny_refuser_dir, tmp_path / "guard.safetensors"))
    assert_same_guard(load_artifact(tmp_path / "guard.safetensors"), done.artifact)


# --- the report -----------------------------------------------------------------------------------


def test_every_picture_of_the_report_exists_and_opens_at_a_sensible_size(done: Done) -> None:
    page = (done.report / "report.md").read_text()
    linked = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page)
    assert sorted(linked) == sorted(p.name for p in done.report.glob("*.png"))
    assert len(linked) == len(set(linked)) >= 4
    for name in linked:
        with Image.open(done.report / name) as picture:
            width, height = picture.size
            shades = picture.convert("L").histogram()
        assert 600 <= width <= 2400, name
        assert 300 <= height <= 2000, name
        assert sum(shades[:128]) > 500 < sum(shades[128:]), f"{name} is blank"


def test_every_measurement_of_the_report_has_its_interval_and_n(done: Done) -> None:
    page = (done.report / "report.md").read_text()
    table = page.split("| held-out measurement | value |")[1].split("\n\n")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) == len(done.artifact.manifest.gate.measurements)
    number = r"-?\d+\.\d+"
    for row in rows:
        assert re.search(rf"\| {number} \[{number}, {number}\] \(n=\d+\) \|$", row), row
    assert re.search(rf"^\| raise \|.*{number} \[{number}, {number}\] \(n=\d+\) \|$", page, re.M)


def test_the_report_shows_refusal_beside_over_refusal_and_names_the_guard(done: Done) -> None:
    page = (done.report / "report.md").read_text()
    assert done.result.artifact_id in page
    for row in ("harmful refused guarded", "hard benign refused guarded"):
        assert f"| {row} |" in page
    for note in done.result.notes:
        assert note in page


class Page(HTMLParser):
    """What an HTML page holds: its elements with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called by the parser."""
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        """Called by the parser."""
        self.text += data

    def values(self, *names: str) -> list[str]:
        """Of these attributes, wherever they stand."""
        found = (attributes.get(name) for _, attributes in self.elements for name in names)
        return [value for value in found if value is not None]


def test_the_html_report_is_one_file_that_fetches_and_runs_nothing(done: Done) -> None:
    text = (done.report / "report.html").read_text()
    page = Page(text)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert not re.search(r"@import|url\((?!#)", text)
    for target in page.values("href", "xlink:href", "src"):
        assert target.startswith(("#", "data:image/png;base64,")), target
    assert sum(tag == "svg" for tag, _ in page.elements) == 7
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {target[1:] for target in page.values("xlink:href") if target[0] == "#"} <= set(ids)
    assert text.count("currentColor") > 100  # axes and their text are seen in the dark, too


def test_the_html_report_says_what_the_markdown_says(done: Done) -> None:
    page = Page((done.report / "report.html").read_text())
    gate = done.artifact.manifest.gate
    assert done.result.artifact_id in page.text
    for value in gate.measurements.values():
        shown = f"[{value.low:.2f}, {value.high:.2f}] n={value.n}"
        assert f"{value.value:.2f} {shown}" in page.text
    for name, value in done.artifact.manifest.geometry.items():
        assert name.replace("_", " ") in page.text
        assert f"{value:.4g}" in page.text
    assert gate.guarantee in page.text
    assert all(name in page.text for name in ("difference in means", "random controls"))
    assert "Frontier" in page.text
    assert "Frontier" not in Page(html_page(replace(done.result, frontier=[]))).text


def test_the_html_report_escapes_what_users_and_models_wrote(done: Done) -> None:
    nasty = "<script>alert('&amp;')</script>\n<b>"
    result = replace(done.result, tested={}, notes=[nasty])
    for group, pairs in done.result.tested.items():
        result.tested[group] = [replace(p, prompt=nasty, guarded=nasty) for p in pairs]
    page = Page(html_page(result))
    assert "script" not in {tag for tag, _ in page.elements}
    assert page.text.count(nasty) == 1 + 2 * len(worth_reading(result.tested))


def test_the_html_report_draws_the_frontier_and_names_the_chosen_point(done: Done) -> None:
    share = Interval(value=0.5, low=0.25, high=0.75, n=40)
    point = FrontierPoint("small", 0.5, 1.0, 16, 0.25, share, share, share, share, chosen=False)
    points = [point, replace(point, name="large <4>", raise_budget_nats=4.0, chosen=True)]
    page = Page(html_page(replace(done.result, frontier=points)))
    assert sum(tag == "svg" for tag, _ in page.elements) == 7
    assert re.search(r"large <4> chosen\s*4 / 1", page.text)
    assert page.text.count("small") >= 3  # twice in the picture, once in the table
    assert page.text.count("0.50 [0.25, 0.75] n=40") == 8


def test_the_html_report_shows_candidates_of_every_family(done: Done) -> None:
    able = next(e for e in done.result.effects["raise"] if e.can_spend)
    other = replace(able, candidate=replace(able.candidate, family="subspace_3_affine"))
    effects = {**done.result.effects, "raise": [other, *done.result.effects["raise"]]}
    text = Page(html_page(replace(done.result, effects=effects))).text
    assert "subspace 3 affine (n=1)" in text
    assert re.search(r"gradient refined \(n=\d+\)", text)
    assert re.search(r"difference in means \(n=\d+\)", text)


def test_the_responses_to_read_begin_with_changed_verdicts_of_all_groups(done: Done) -> None:
    chosen = worth_reading(done.result.tested)
    assert len(chosen) == 20
    changed = [pair.base_verdict != pair.record.verdict for pair in chosen]
    assert changed == sorted(changed, reverse=True)
    assert {pair.record.zone for pair in chosen[:2]} == {Zone.RAISE, Zone.LOWER}


# --- no guard -------------------------------------------------------------------------------------


def test_a_model_that_never_refuses_gets_no_guard(
    never_refuses_dir: Path, files: PromptFiles, tmp_path: Path
) -> None:
    config = files.config(never_refuses_dir, tmp_path / "guard.safetensors", report_dir=tmp_path)
    with pytest.raises(NoAdmissibleCarrierError, match=r"refused 0 of \d+ prompts") as raised:
        calibrate(config)
    assert raised.value.exit_code == 3
    assert not config.out.exists()
    assert not list(tmp_path.glob("*.md"))
    assert not list(tmp_path.glob("*.png"))


# --- the command line -----------------------------------------------------------------------------


def test_calibrate_prints_one_json_object_and_keeps_progress_on_stderr(
    tiny_refuser_dir: Path,
    files: PromptFiles,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "guard.safetensors"
    options = ["--out", str(out), "--device", "cpu", "--json"]
    assert main(["calibrate", str(tiny_refuser_dir), *files.options(), *options]) == 0
    said = capsys.readouterr()
    summary = json.loads(said.out)
    assert summary["artifact_id"] == load_artifact(out).artifact_id
    assert summary["out"] == str(out)
    assert "capture hidden states" in said.err
    assert "capture hidden states" not in said.out


def test_calibrate_ends_with_three_where_there_is_nothing_to_steer(
    never_refuses_dir: Path,
    files: PromptFiles,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "guard.safetensors"
    out.write_bytes(b"the guard of before")
    options = ["--out", str(out), "--device", "cpu", "--json"]
    assert main(["calibrate", str(never_refuses_dir), *files.options(), *options]) == 3
    said = capsys.readouterr()
    assert said.out == ""
    assert "refused 0 of" in said.err
    assert "No guard written" in said.err
    assert out.read_bytes() == b"the guard of before"


def test_calibrate_ends_with_two_where_the_folder_for_the_guard_is_missing(
    tiny_refuser_dir: Path,
    files: PromptFiles,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "missing" / "guard.safetensors"
    assert main(["calibrate", str(tiny_refuser_dir), *files.options(), "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert str(out.parent) in said.err
    assert not out.parent.exists()


def test_calibrate_ends_with_two_on_a_bad_line_and_names_it(
    tiny_refuser_dir: Path,
    files: PromptFiles,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "ask steal car"}\n{"text": \n')
    out = tmp_path / "guard.safetensors"
    options = ["--harmful", str(bad), "--out", str(out)]
    assert main(["calibrate", str(tiny_refuser_dir), *files.options()[2:], *options]) == 2
    assert f"{bad}, line 2" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [bad]


# --- interrupted ----------------------------------------------------------------------------------


class Interrupted:
    """Progress of a user who presses Ctrl-C after some prompts of a stage."""

    def __init__(self, stage: str, after: int) -> None:
        self._at, self._left, self._name = stage, after, ""

    def stage(self, name: str, total: int | None) -> None:  # noqa: ARG002
        """Remember where we are."""
        self._name = name

    def advance(self, n: int = 1) -> None:
        """Count down, and press."""
        if self._name == self._at:
            self._left -= n
            if self._left <= 0:
                raise KeyboardInterrupt

    def note(self, text: str) -> None:
        """Read nothing."""


class Counting(TransformersSubject):
    """A subject that counts the prompts it has to run for their hidden states."""

    captured = 0

    def states(
        self, prompts: Sequence[Sequence[int]], capture: Sequence[int], n_last: int
    ) -> dict[int, torch.Tensor]:
        """Count, then run."""
        self.captured += len(prompts)
        return super().states(prompts, capture, n_last)


BATCH = 16
Run = Callable[..., tuple[CalibrationResult, int]]


@pytest.fixture
def run(tiny_refuser_dir: Path, files: PromptFiles, tmp_path: Path) -> Run:
    """Calibrate with a work folder that stays, and tell how many prompts were captured."""
    model = AutoModelForCausalLM.from_pretrained(tiny_refuser_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_refuser_dir)

    def calibrated(
        progress: Progress | None = None, fingerprint: str = "same", **settings: object
    ) -> tuple[CalibrationResult, int]:
        subject = Counting(model, tokenizer, "tiny-refuser")
        config = files.config(
            tiny_refuser_dir,
            tmp_path / "guard.safetensors",
            batch_size=BATCH,
            n_controls=20,
            test_prompts=6,
            **settings,
        )
        work = WorkFolder(config.work_folder, fingerprint)
        prompts = gather_prompts(config)
        result = calibrate_subject(subject, prompts, config, work, progress or Silent())
        return result, subject.captured

    return calibrated


def pieces(folder: Path) -> dict[str, tuple[int, int]]:
    """Finished batches, with inode and time of writing."""
    found = (p for p in folder.rglob("*.piece"))
    return {str(p.relative_to(folder)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in found}


def with_checksum(data: bytes) -> bytes:
    """A whole piece, as another release might have written it."""
    return hashlib.sha256(data).digest() + data


def test_an_interrupted_calibration_goes_on_and_ends_in_the_same_guard(
    run: Run, tmp_path: Path
) -> None:
    work = tmp_path / "guard.safetensors.work"
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted("capture hidden states", 5 * BATCH))
    kept = pieces(work)
    finished = [name for name in kept if "listen" not in name]
    assert len(finished) == 5
    assert not (tmp_path / "guard.safetensors").exists()

    resumed, captured = run()
    after = pieces(work)
    assert {name: after[name] for name in kept} == kept, "a finished batch was written again"

    shutil.rmtree(work)
    whole, captured_whole = run()
    assert captured_whole - captured == 5 * BATCH
    assert_same_guard(resumed.artifact, whole.artifact)


@pytest.mark.parametrize(
    "damage", ["truncated", "empty", "not safetensors", "flipped bit", "other tensors"]
)
def test_a_damaged_piece_is_computed_again(run: Run, tmp_path: Path, damage: str) -> None:
    stop = ("capture hidden states", 3 * BATCH)
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(*stop))
    [piece] = (tmp_path / "guard.safetensors.work").rglob("directions-0001.piece")
    before, good = pieces(piece.parent), piece.read_bytes()
    piece.write_bytes(
        {
            "truncated": good[: len(good) // 2],
            "empty": b"",
            "not safetensors": b"\x80\x04" + good[2:],
            "flipped bit": good[:-1] + bytes([good[-1] ^ 0x40]),  # a float32's exponent
            "other tensors": with_checksum(save_tensors({"tokens": torch.zeros(BATCH, 2)})),
        }[damage]
    )
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(*stop))
    assert piece.read_bytes() == good
    after = pieces(piece.parent)
    assert after.pop(piece.name) != before.pop(piece.name)
    assert after == before, "a good piece was computed again"


def test_another_fingerprint_starts_anew(run: Run, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted("capture hidden states", 3 * BATCH))
    before = pieces(tmp_path / "guard.safetensors.work")
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted("listen to refusals", BATCH), fingerprint="other")
    left = pieces(tmp_path / "guard.safetensors.work")
    assert len(before) > 3
    assert {name: left[name] for name in before} == before
    assert set(left) - set(before) == {"trimtab-other/listen-0000.piece"}


CHANGES: dict[str, dict[str, object]] = {
    "seed": {"seed": 1},
    "window": {"message_width": 100},
    "longer copies": {"long_prompts": 7},
}


@pytest.mark.parametrize("change", [*CHANGES, "model", "nothing"])
def test_a_changed_setting_or_model_starts_anew_and_an_unchanged_run_goes_on(
    tiny_refuser_dir: Path,
    never_refuses_dir: Path,
    files: PromptFiles,
    tmp_path: Path,
    change: str,
) -> None:
    out = tmp_path / "guard.safetensors"
    with pytest.raises(KeyboardInterrupt):
        calibrate(
            files.config(tiny_refuser_dir, out, batch_size=BATCH),
            Interrupted("capture hidden states", BATCH),
        )
    work = tmp_path / "guard.safetensors.work"
    before = pieces(work)
    model = never_refuses_dir if change == "model" else tiny_refuser_dir
    settings = CHANGES.get(change, {})
    with pytest.raises(KeyboardInterrupt):
        calibrate(
            files.config(model, out, batch_size=BATCH, **settings),
            Interrupted("listen to refusals", BATCH),
        )
    after = pieces(work)
    if change == "nothing":
        assert after == before
    else:
        assert {name: after[name] for name in before} == before
        [new] = set(after) - set(before)
        assert new.endswith("/listen-0000.piece")


def test_the_work_folder_leaves_a_users_own_files_alone(tmp_path: Path) -> None:
    """`--work-dir` may name a folder that holds other things, such as the model itself."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "notes.txt").write_text("notes")
    work = WorkFolder(tmp_path, "fingerprint")
    work.save("train-0000", {"instruction": torch.zeros(1)})
    work.remove()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "notes.txt"]


# --- no room on the disk --------------------------------------------------------------------------


@contextmanager
def file_limit(n_bytes: int) -> Iterator[None]:
    """Files of this process cannot grow beyond `n_bytes`: a disk that is full, but only for us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_guard_that_cannot_be_written_whole_leaves_the_old_one(
    done: Done, tmp_path: Path
) -> None:
    old = tmp_path / "guard.safetensors"
    shutil.copy(done.config.out, old)
    before = old.read_bytes()
    assert len(before) > 2048
    with file_limit(2048), pytest.raises(ArtifactError) as raised:
        save_artifact(done.artifact, old)
    assert str(old) in str(raised.value)
    assert "untouched" in str(raised.value)
    assert raised.value.exit_code == 2
    assert old.read_bytes() == before
    assert list(tmp_path.iterdir()) == [old], "half a file was left"


def test_calibrate_on_a_full_disk_ends_with_two_and_names_the_file(
    tiny_refuser_dir: Path,
    files: PromptFiles,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "guard.safetensors"
    out.write_bytes(b"the guard of before")
    options = ["--out", str(out), "--device", "cpu"]
    with file_limit(20_000):  # a batch of states needs more
        code = main(["calibrate", str(tiny_refuser_dir), *files.options(), *options])
    said = capsys.readouterr()
    assert code == 2, said.err
    assert re.search(
        re.escape(f"{out}.work/") + r"trimtab-[0-9a-f]{16}/(train|directions)-0000\.piece", said.err
    )
    assert out.read_bytes() == b"the guard of before"


def test_a_picture_that_cannot_be_written_is_an_artifact_error(done: Done, tmp_path: Path) -> None:
    (tmp_path / "candidates.png").mkdir()
    with pytest.raises(ArtifactError, match=re.escape(str(tmp_path / "candidates.png"))):
        write_report(done.result, tmp_path)


def test_a_small_filesystem_that_is_full_leaves_the_old_guard(done: Done, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = shutil.which("mount")
    mounted = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True
    )
    if not mounted or mounted.returncode != 0:
        pytest.skip("no tmpfs can be mounted here")
    try:
        old = small / "guard.safetensors"
        save_artifact(done.artifact, old)
        before = old.read_bytes()
        with (small / "filler").open("wb", buffering=0) as filler, suppress(OSError):
            while filler.write(bytes(4096)):
                pass
        with pytest.raises(ArtifactError, match=re.escape(str(old))):
            save_artifact(done.artifact, old)
        assert old.read_bytes() == before
        assert sorted(p.name for p in small.iterdir()) == ["filler", "guard.safetensors"]
    finally:
        subprocess.run(["umount", str(small)], check=True, capture_output=True)
