"""KL on safe prompts over whole openings, on the tiny refuser."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from calibration.causal import Admission, Effect
from calibration.choose import Choice
from calibration.directions import Candidate
from calibration.safety import safe_kl
from calibration.transformers_subject import TransformersSubject
from guard.artifact import Interval
from tests.tiny_refuser import PLANTED_LAYER, harmless_prompts, planted_direction

NOTHING = Interval(value=0.0, low=0.0, high=0.0, n=0)
N_TOKENS = 6


@pytest.fixture(scope="module")
def subject(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> TransformersSubject:
    return TransformersSubject(tiny_model, tiny_tokenizer, "tiny-refuser")


def choice(dose: float, scale: float = 4.0) -> Choice:
    candidate = Candidate(PLANTED_LAYER, -1, planted_direction(), 1.0)
    effect = Effect(candidate, "raise", scale, dose, True, NOTHING, NOTHING, 0.0, NOTHING)
    admission = Admission(effect, effect, [], [])
    return Choice(effect, admission, scale, [], {}, torch.empty(0))


def test_a_dose_of_zero_costs_nothing_and_more_costs_more(subject: TransformersSubject) -> None:
    texts = {"ordinary": harmless_prompts()[:6]}
    means = [
        safe_kl(subject, {"raise": choice(dose)}, texts, N_TOKENS, 4, 0)["raise"][
            "added_kl_mean_of_ordinary"
        ].value
        for dose in (0.0, 0.5, 1.0)
    ]
    assert means[0] == pytest.approx(0.0, abs=1e-6)
    assert means[0] < means[1] < means[2]


def test_it_is_the_kl_of_full_forwards_token_by_token(subject: TransformersSubject) -> None:
    """Recomputed prompt by prompt, without batches, over the base model's own words."""
    texts = harmless_prompts()[:5]
    found = safe_kl(subject, {"raise": choice(1.0)}, {"ordinary": texts}, N_TOKENS, 3, 0)["raise"]
    nats = []
    for text in texts:
        ids = subject.encode(text)
        [response] = subject.respond([ids], N_TOKENS)
        for said in range(len(response)):
            step = subject.prefill([ids + response[:said]], [PLANTED_LAYER])
            hidden = step.last_hidden(PLANTED_LAYER) + 4.0 * planted_direction()
            steered = torch.log_softmax(subject.shadow(step, [0], PLANTED_LAYER, hidden), -1)
            base = torch.log_softmax(step.logits, -1)
            nats.append(float((steered.exp() * (steered - base)).sum()))
    assert found["added_kl_mean_of_ordinary"].value == pytest.approx(
        sum(nats) / len(nats), rel=1e-3, abs=1e-5
    )
    p95 = float(torch.tensor(nats).quantile(0.95))
    assert found["added_kl_p95_of_ordinary"].value == pytest.approx(p95, rel=1e-2, abs=1e-4)
    assert found["added_kl_mean_of_ordinary"].n == len(texts)


def test_ablating_what_is_not_there_costs_nothing(subject: TransformersSubject) -> None:
    """A direction orthogonal to every state that is met: taking it out changes nothing."""
    texts = harmless_prompts()[:4]
    ids = [subject.encode(text) for text in texts]
    states = [
        subject.prefill([row + response[:said]], [PLANTED_LAYER]).last_hidden(PLANTED_LAYER)
        for row, response in zip(ids, subject.respond(ids, 3), strict=True)
        for said in range(len(response))
    ]
    absent = torch.linalg.svd(torch.cat(states).float(), full_matrices=True).Vh[-1]
    one = choice(1.0, scale=40.0)
    lost = replace(
        one, effect=replace(one.effect, candidate=Candidate(PLANTED_LAYER, -1, absent, 1.0))
    )
    found = safe_kl(subject, {"raise": lost}, {"ordinary": texts}, 3, 4, 0)["raise"]
    assert found["ablated_kl_p95_of_ordinary"].value == pytest.approx(0.0, abs=1e-5)
    assert found["added_kl_p95_of_ordinary"].value > 1e-3
