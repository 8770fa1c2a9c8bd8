"""The guard in real vLLM on the CPU: zones, budgets, bits, caches and storms."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pytest

from guard.artifact import load_artifact
from tests.serve.vllm_setup import ROOT, vllm_env

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


class Run:
    """Runs scenarios of `vllm_driver`, each one once.

    Args:
        folder: where they write.
        model: of scenarios that name no other.
        guard: likewise.
    """

    def __init__(self, folder: Path, model: Path, guard: Path) -> None:
        self.folder, self.model, self.guard = folder, model, guard
        self._done: dict[str, Any] = {}
        self._numbers = itertools.count()

    def __call__(
        self,
        scenario: str,
        *,
        model: Path | None = None,
        guard: Path | Literal["ours"] | None = "ours",
        mode: str = "enforce",
        **options: Any,
    ) -> Any:
        """Return what a scenario wrote; guard None: vLLM without the plugin."""
        model = model or self.model
        guard = self.guard if guard == "ours" else guard
        key = json.dumps([scenario, str(model), str(guard), mode, options])
        if key not in self._done:
            self._done[key] = self._start(scenario, model, guard, mode, options)
        return self._done[key]

    def together(self, *calls: dict[str, Any]) -> list[Any]:
        """Several at a time: vLLM computes on one core of two, and loads on one."""
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda call: self(**call), calls))

    def _start(
        self, scenario: str, model: Path, guard: Path | None, mode: str, options: dict[str, Any]
    ) -> Any:
        number = next(self._numbers)
        out, policy = self.folder / f"{number}.json", self.folder / f"{number}.yaml"
        policy.write_text(f"mode: {mode}\n")
        extra = {"TRIMTAB_GUARD": str(guard), "TRIMTAB_POLICY": str(policy)} if guard else {}
        command = [sys.executable, "-m", "tests.serve.vllm_driver", scenario]
        process = subprocess.run(
            [*command, str(model), str(out), json.dumps(options)],
            cwd=ROOT,
            env={**vllm_env(self.folder), **extra},
            capture_output=True,
            text=True,
            check=False,
        )
        assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
        return json.loads(out.read_text())


@pytest.fixture(scope="module")
def run(vllm_model_dir: Path, vllm_guard: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("vllm"), vllm_model_dir, vllm_guard)


def zones_of(answers: list[dict[str, Any]]) -> set[str]:
    return {answer["record"]["zone"] for answer in answers}


def bits(answer: dict[str, Any]) -> tuple[Any, Any]:
    """What of an answer must not differ by a bit: its tokens and their log-probabilities."""
    return answer["tokens"], answer["logprobs"]


def same_batches(*runs: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The answers of runs whose steps had the same rows; others would differ by rounding."""
    first, *others = (run["batches"] for run in runs)
    assert others == [first] * len(others)
    return [run["answers"] for run in runs]


def within_budget(record: dict[str, Any]) -> bool:
    """Σ KL(mixed ‖ base), recomputed from dumped logits, against ledger and budget."""
    assert record["recomputed"] == pytest.approx(record["kl_nats"], abs=1e-6)
    return bool(record["recomputed"] <= record["budget_nats"] + 1e-4)


# ------------------------------------------------------------------ zones


def test_zones_are_those_of_the_transformers_engine_on_66_prompts(
    run: Run, vllm_guard: Path
) -> None:
    rounds, there = run.together(
        {"scenario": "zones", "n_each": 22}, {"scenario": "reference", "n_each": 22}
    )
    here = [answer["record"] for answer in rounds[0]]
    assert len(here) == len(there) == 66
    gap = max(abs(a["score"] - b["score"]) for a, b in zip(here, there, strict=True))
    spread = max(b["score"] for b in there) - min(b["score"] for b in there)
    assert gap < 0.03 * spread  # bfloat16, other kernels
    gate = load_artifact(vllm_guard).manifest.gate
    assert gate.lower_below is not None
    cuts = (gate.raise_above, gate.lower_below)
    close = [i for i, b in enumerate(there) if min(abs(b["score"] - c) for c in cuts) <= gap]
    differ = [i for i in range(66) if here[i]["zone"] != there[i]["zone"]]
    assert set(differ) <= set(close)  # a score nearer to a threshold than rounding may fall over
    assert len(differ) <= 2
    assert {a["zone"] for a in here} == {"pass", "raise", "lower"}


def test_a_prompt_that_lies_whole_in_the_prefix_cache_is_scored_by_its_slots(run: Run) -> None:
    first, second = run("zones", n_each=22)
    assert sum(answer["cached"] for answer in second) > 66 * 16
    beyond_gate = [i for i, answer in enumerate(second) if answer["cached"]]
    for i in beyond_gate:
        assert second[i]["record"]["score"] == first[i]["record"]["score"]
        assert second[i]["record"]["zone"] == first[i]["record"]["zone"]


# ------------------------------------------------------------------ budgets and bits


def test_sum_of_kl_recomputed_from_dumped_logits_stays_inside_the_budget(run: Run) -> None:
    asked = {"scenario": "answers", "n_each": 8, "eager": True}
    answers = run.together(asked, {**asked, "guard": None})[0]["answers"]
    assert zones_of(answers) == {"pass", "raise", "lower"}
    assert all(within_budget(answer["record"]) for answer in answers)
    steered = [a["record"] for a in answers if a["record"]["zone"] != "pass"]
    assert all(0 < record["shadow_passes"] <= 16 for record in steered)
    assert max(record["kl_nats"] for record in steered) > 0.5


@pytest.mark.parametrize("eager", [True, False])
def test_unflagged_batchmates_are_bit_identical_to_vllm_without_the_plugin(
    run: Run, eager: bool
) -> None:
    asked = {"scenario": "answers", "n_each": 8, "eager": eager}
    stock, guarded = same_batches(*run.together({**asked, "guard": None}, asked))
    passed = [i for i, a in enumerate(guarded) if a["record"]["zone"] == "pass"]
    assert 4 <= len(passed) < len(guarded)
    assert [bits(guarded[i]) for i in passed] == [bits(stock[i]) for i in passed]
    moved = [i for i in range(len(guarded)) if i not in passed]
    assert any(bits(guarded[i]) != bits(stock[i]) for i in moved)


def test_a_zone_that_is_known_a_step_late_is_the_same_and_costs_others_nothing(run: Run) -> None:
    asked = {"scenario": "answers", "n_each": 8, "eager": True}
    stock, guarded = run.together({**asked, "guard": None}, asked)
    late = guarded["late"]
    stock, at_once, late = same_batches(stock, guarded, late)
    records = [answer["record"] for answer in late]
    assert all(within_budget(record) for record in records)
    assert [r["zone"] for r in records] == [a["record"]["zone"] for a in at_once]
    passed = [i for i, record in enumerate(records) if record["zone"] == "pass"]
    assert [bits(late[i]) for i in passed] == [bits(stock[i]) for i in passed]
    for i, record in enumerate(records):  # as many rows round otherwise in a pass of their own
        if i not in passed:
            assert record["shadow_passes"] > 0
            nats = at_once[i]["record"]["kl_nats"]
            if late[i]["tokens"] == at_once[i]["tokens"]:
                assert record["kl_nats"] == pytest.approx(nats, abs=0.05)


@pytest.mark.parametrize("eager", [True, False])
def test_observe_mode_changes_no_bit_and_books_what_it_would_have_spent(
    run: Run, eager: bool
) -> None:
    asked = {"scenario": "answers", "n_each": 8, "eager": eager}
    stock, observed = same_batches(
        *run.together({**asked, "guard": None}, {**asked, "mode": "observe"})
    )
    assert [bits(a) for a in observed] == [bits(a) for a in stock]
    assert zones_of(observed) == {"pass", "raise", "lower"}
    assert sum(a["record"]["kl_nats"] for a in observed) > 1.0


def test_a_grammar_still_binds_a_steered_response(run: Run) -> None:
    constrained = run("answers", n_each=8, eager=True)["answers"][7]
    assert constrained["text"] in ("yes", "no")


def test_request_features_work_on_steered_responses_inside_their_budgets(run: Run) -> None:
    features = run("answers", n_each=8, eager=True)["features"]
    choices = [choice for choices in features.values() for choice in choices]
    assert {choice["record"]["zone"] for choice in choices} == {"raise"}
    assert all(within_budget(choice["record"]) for choice in choices)
    assert all(choice["record"]["shadow_passes"] > 0 for choice in choices)
    # Choices have a budget each, and spend it on their own tokens.
    assert len({choice["text"] for choice in features["n"]}) > 1
    assert len({choice["record"]["kl_nats"] for choice in features["n"]}) > 1
    assert " " not in features["stop"][0]["text"]
    assert features["stop"][0]["n_tokens"] < 20
    assert json.loads(features["json"][0]["text"])["answer"] in ("yes", "no")
    assert "sorry" not in features["sampling"][0]["text"]
    assert features["sampling"][0]["n_tokens"] == 20
    assert features["logprobs"][0]["n_logprobs"] == 6
    assert features["logprobs"][0]["n_prompt_logprobs"] > 20


# ------------------------------------------------------------------ adapters, quantised weights


def test_rows_with_lora_adapters_are_shadowed_with_their_own_adapter(run: Run) -> None:
    asked = {"scenario": "lora", "n_each": 4}
    plain, seen = run.together({**asked, "guard": None}, asked)
    stock, guarded = same_batches(plain, seen)
    assert zones_of(guarded) == {"pass", "raise", "lower"}
    assert all(within_budget(answer["record"]) for answer in guarded)
    assert any(a["record"]["zone"] != "pass" for a in guarded[1::2])  # those with the adapter
    passed = [i for i, a in enumerate(guarded) if a["record"]["zone"] == "pass"]
    assert {i % 2 for i in passed} == {0, 1}
    assert [bits(guarded[i]) for i in passed] == [bits(stock[i]) for i in passed]
    # In another order, too, every row is its base row but for rounding, as the canary allows.
    assert len(seen["gaps"]) >= 12
    assert max(seen["gaps"]) < 0.1


def test_a_quantised_checkpoint_is_served_behind_a_guard_of_its_own(
    run: Run, tmp_path: Path
) -> None:
    model = Path(run("quantise"))
    guard = tmp_path / "guard.safetensors"
    subprocess.run(
        [sys.executable, "-m", "tests.serve.vllm_driver", "make_guard", str(model), str(guard)],
        cwd=ROOT,
        env=vllm_env(tmp_path),
        check=True,
    )
    assert load_artifact(guard).manifest.model.quantization == "compressed-tensors"
    answers = run("zones", model=model, guard=guard, n_each=5)[0]
    assert zones_of(answers) == {"pass", "raise", "lower"}
    assert all(within_budget(answer["record"]) for answer in answers)
    steered = [a["record"] for a in answers if a["record"]["zone"] != "pass"]
    assert min(record["kl_nats"] for record in steered) > 0


# ------------------------------------------------------------------ caches


def test_guarded_requests_leave_the_prefix_cache_as_vllm_would(run: Run) -> None:
    guarded, stock = run.together({"scenario": "prefix"}, {"scenario": "prefix", "guard": None})
    assert zones_of(guarded["warm"]) > {"pass"}
    # Hits are as many as without the plugin, and start with the second request.
    assert [a["cached"] for a in guarded["warm"]] == [a["cached"] for a in stock["warm"]]
    assert all(a["cached"] >= 256 for a in guarded["warm"][1:])
    assert all(not a["cached"] for a in guarded["cold"])
    # vLLM itself may differ between cached and cold by rounding: where it does not, nor do we.
    for i, (warm, cold) in enumerate(zip(guarded["warm"], guarded["cold"], strict=True)):
        if bits(stock["warm"][i]) == bits(stock["cold"][i]) or warm["record"]["zone"] != "pass":
            assert warm["record"]["zone"] == cold["record"]["zone"]
        if warm["record"]["zone"] == "pass":
            assert bits(warm) == bits(stock["warm"][i])
            assert bits(cold) == bits(stock["cold"][i])
    assert guarded["again"]["record"]["score"] == guarded["warm"][0]["record"]["score"]


def test_a_storm_with_aborts_and_preemptions_mixes_nothing_up(run: Run) -> None:
    storm = run("storm", n_blocks=40)
    calm = run("zones", n_each=22)[0]
    assert storm["preemptions"] > 0
    assert "no such policy" in storm["refused"]
    assert len(storm["aborted"]) >= 8
    assert set(storm["finished"]) | set(storm["aborted"]) == {f"s{i}" for i in range(64)}
    assert len(storm["running"]) <= 1  # the last request is told to be over with the next one
    records = {name: r for name, r in storm["records"].items() if name.startswith("s")}
    assert set(storm["finished"]) <= set(records)
    assert {record["zone"] for record in records.values()} == {"pass", "raise", "lower"}
    scores = [answer["record"]["score"] for answer in calm]
    spread = max(scores) - min(scores)
    for name, record in records.items():
        assert not record["failed"]
        assert within_budget(record)
        # Its own prompt's score, whatever else was in the batch and however it was cut up.
        assert abs(record["score"] - scores[int(name[1:])]) < 0.03 * spread


def test_two_tensor_parallel_ranks_read_and_spend_the_same(run: Run) -> None:
    seen = run("two_ranks", n_each=6)
    assert [status["rank"] for status in seen["statuses"]] == [0, 1]
    assert all(status["armed"] for status in seen["statuses"])
    first, second = seen["ranks"]
    assert len(first) >= 18
    assert first == second
    assert {record["zone"] for record in first.values()} == {"pass", "raise", "lower"}
    assert all(r["kl_nats"] <= r["budget_nats"] + 1e-9 for r in first.values())
