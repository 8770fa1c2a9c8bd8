"""Fixtures that many tests share: the tiny refuser, and a guard made for it by hand."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from sklearn.linear_model import LogisticRegression
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from cli.models import QWEN_CODER, resolve_model
from guard.artifact import CarrierArtifact, CarrierSpec, GateSpec, Manifest, ModelIdentity
from guard.identity import model_identity
from guard.probe import linear_probe
from guard.steering import Carrier
from tests.tiny_refuser import (
    PLANTED_LAYER,
    REFUSAL_TEXT,
    build_tiny_refuser,
    chat_ids,
    hard_benign_prompts,
    hard_harmful_prompts,
    harmful_prompts,
    harmless_prompts,
)

# A runner that was started in the background ignores Ctrl-C, and what it starts would, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A machine that is busy with other work must not fail a test by being slow. The examples are the
# same in every run, so that one commit gives one answer; `make explore` draws new ones.
settings.register_profile("trimtab", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile(os.environ.get("TRIMTAB_HYPOTHESIS", "trimtab"))

SUFFIX_TOKENS = ["<eot>", "<assistant>"]


def tiny_identity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> ModelIdentity:
    """What the hand-made guard says it was made for."""
    return model_identity(model, tokenizer, "tiny-refuser")


@pytest.fixture(scope="session")
def embedded_model_dir() -> Path:
    """Folder of the embedded 0.5B model; its absence is an error, not a skip."""
    if folder := os.environ.get("TRIMTAB_TEST_MODEL"):
        return Path(folder)
    return Path(resolve_model(QWEN_CODER.name))


@pytest.fixture(scope="session")
def tiny_refuser_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny chat model that refuses harmful instructions."""
    folder = tmp_path_factory.mktemp("tiny-refuser")
    build_tiny_refuser(folder)
    return folder


@pytest.fixture(scope="session")
def never_refuses_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny chat model that follows every instruction."""
    folder = tmp_path_factory.mktemp("never-refuses")
    build_tiny_refuser(folder, refuses=False)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_refuser_dir: Path) -> PreTrainedModel:
    """The tiny refuser, float32, on one thread."""
    torch.set_num_threads(1)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_refuser_dir)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_refuser_dir: Path) -> PreTrainedTokenizerFast:
    """The tiny refuser's tokenizer, chat template included."""
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(tiny_refuser_dir)
    return tokenizer


@pytest.fixture(scope="session")
def tiny_guard(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> CarrierArtifact:
    """A guard for the tiny refuser, made by hand from its difference in means.

    Hard harmful prompts are raised, hard benign ones lowered; the others pass, because the model
    treats them as it should by itself.
    """
    hidden: dict[str, torch.Tensor] = {}
    for name, prompts in {
        "harmful": harmful_prompts(),
        "harmless": harmless_prompts(),
        "hard_harmful": hard_harmful_prompts(),
        "hard_benign": hard_benign_prompts(),
    }.items():
        with torch.no_grad():
            output = tiny_model(chat_ids(tiny_tokenizer, prompts), output_hidden_states=True)
        hidden[name] = output.hidden_states[PLANTED_LAYER]
    direction = hidden["harmful"][:, -1].mean(dim=0) - hidden["harmless"][:, -1].mean(dim=0)
    norm_share = float(direction.norm() / hidden["harmless"][:, -1].norm(dim=-1).mean())

    last_instruction_token = -1 - len(SUFFIX_TOKENS)
    read = {name: states[:, last_instruction_token] for name, states in hidden.items()}
    harmful = torch.cat([read["harmful"], read["hard_harmful"]])
    benign = torch.cat([read["harmless"], read["hard_benign"]])
    probe = LogisticRegression(max_iter=1000).fit(
        torch.cat([harmful, benign]).numpy(), [1] * len(harmful) + [0] * len(benign)
    )
    weight, bias = torch.tensor(probe.coef_[0]).float(), float(probe.intercept_[0])
    lowest_harmful = float((harmful @ weight + bias).min())
    highest_benign = float((benign @ weight + bias).max())
    threshold = (lowest_harmful + highest_benign) / 2

    def spec(family: str) -> CarrierSpec:
        return CarrierSpec(
            layer=PLANTED_LAYER, kind="add", family=family, position=-1, norm_share=norm_share
        )

    def ids(words: list[str]) -> list[int]:
        return [int(i) for i in tiny_tokenizer.convert_tokens_to_ids(words)]

    manifest = Manifest(
        created="2026-01-01T00:00:00Z",
        model=tiny_identity(tiny_model, tiny_tokenizer),
        seed=0,
        safe_kl_nats=0.1,
        datasets={},
        libraries={"torch": str(torch.__version__)},
        raise_carrier=spec("difference_in_means"),
        lower_carrier=spec("difference_in_means"),
        gate=GateSpec(
            layer=PLANTED_LAYER,
            instruction_suffix_ids=ids(SUFFIX_TOKENS),
            raise_above=threshold,
            lower_below=threshold,
            raise_if_refusal_below=0.9,
            lower_if_refusal_above=0.1,
            alpha=0.05,
            delta=0.05,
            n_by_stratum={name: len(states) for name, states in hidden.items()},
        ),
        refusal_examples=[REFUSAL_TEXT],
    )
    return CarrierArtifact(
        manifest,
        raise_carrier=Carrier.additive(PLANTED_LAYER, direction),
        lower_carrier=Carrier.additive(PLANTED_LAYER, -direction),
        probe=linear_probe(weight, bias),
        refusal_token_ids=torch.tensor(ids(REFUSAL_TEXT.split()[:1])),
        refusal_token_weights=torch.ones(1),
    )
