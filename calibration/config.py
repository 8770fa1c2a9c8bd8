"""Every setting of a calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from calibration.prompts import MOST_PROMPTS

__all__ = ["CalibrationConfig"]


class CalibrationConfig(BaseModel):
    """What `trimtab calibrate` was asked to do."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str = Field(default="", description="Local folder or hub id of the deployed chat model.")
    endpoint: str | None = Field(
        default=None, description="URL of a vLLM server that runs the model, in place of `model`."
    )
    admin_key: SecretStr = Field(
        default=SecretStr(""), description="The TRIMTAB_ADMIN_KEY of that server."
    )
    model_name: str | None = Field(
        default=None, description="What the guard calls the model; default: as `model` has it."
    )
    out: Path = Field(default=Path("guard.safetensors"), description="Where the guard is written.")
    revision: str | None = Field(default=None, description="Branch, tag or commit on the hub.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Type of the weights; auto is the checkpoint's own."
    )
    device: str = Field(default="cpu", description="A torch device, e.g. cpu or cuda:0.")
    trust_remote_code: bool = Field(
        default=False, description="Run Python code that comes with the model."
    )
    layers_path: str | None = Field(
        default=None, description="Dotted name of the decoder layers, where they are not found."
    )
    answer_opening: str = Field(
        default="",
        description="Put behind every prompt, such as the empty thinking block of a reasoning"
        " model, so that refusals are learned and carriers measured where answers begin.",
    )
    harmful: tuple[Path, ...] = Field(
        default=(), description="Prompt files to use in place of the shipped harmful prompts."
    )
    benign: tuple[Path, ...] = Field(
        default=(), description="Prompt files to use in place of the shipped ordinary prompts."
    )
    hard_benign: tuple[Path, ...] = Field(
        default=(), description="Prompt files to use in place of the shipped hard benign prompts."
    )
    seed: int = Field(default=0, ge=0, description="Of splits, controls and bootstraps.")
    safe_kl_nats: float = Field(
        default=0.1,
        gt=0.0,
        le=4.0,
        description="Mean KL on safe prompts at which all candidates are compared, in nats.",
    )
    alpha: float = Field(
        default=0.1, gt=0.0, lt=1.0, description="Most benign prompts of a stratum to be raised."
    )
    delta: float = Field(
        default=0.05, gt=0.0, lt=1.0, description="Most harmful prompts to be lowered."
    )
    confidence: float | None = Field(
        default=None,
        gt=0.0,
        lt=1.0,
        description="Confidence that alpha and delta hold with these very prompts (PAC); default:"
        " they hold on average over calibrations.",
    )
    benign_nats: float | None = Field(
        default=None,
        gt=0.0,
        description="Most nats that raising may spend on a benign prompt of a stratum, expected"
        " (conformal risk control): the threshold rises until that holds.",
    )
    added_over_refusal: float | None = Field(
        default=None,
        gt=0.0,
        lt=1.0,
        description="Most benign prompts of a stratum, expected, that raising makes the model"
        " refuse (conformal risk control).",
    )
    raise_budget_nats: float = Field(
        default=4.0, gt=0.0, description="Budget at which a raise carrier is confirmed."
    )
    lower_budget_nats: float = Field(
        default=1.0, gt=0.0, description="Budget at which a lower carrier is confirmed."
    )
    most_prompts: int | None = Field(
        default=None,
        ge=0,
        description="Prompts that are used, at most, drawn evenly from all kinds; 0: all of them;"
        f" default: {MOST_PROMPTS:,}, on a GPU all of them.",
    )
    message_width: int = Field(
        default=512,
        ge=0,
        le=512,
        description="Last tokens of a message over which the gate attends; 0: it reads the"
        " template's tokens behind it alone.",
    )
    long_prompts: int = Field(
        default=320,
        ge=0,
        description="Training prompts of which the gate also sees a copy between passages of"
        " unrelated text, so that it finds a request in a long message; 0: none.",
    )
    subspace_sizes: tuple[int, ...] = Field(
        default=(4,), description="Dimensions of the subspaces that are measured beside directions."
    )
    refine_steps: int = Field(
        default=24,
        ge=0,
        description="Gradient steps by which directions are refined; 0 for none.",
    )
    refine_layers: int = Field(
        default=2, ge=1, description="Layers refined to raise; half as many to lower."
    )
    refine_seeds: int = Field(default=1, ge=1, description="Refinements of each of them.")
    n_controls: int = Field(
        default=24, ge=20, description="Random directions that a carrier must beat."
    )
    batch_size: int = Field(default=64, ge=1, description="Prompts that are run together.")
    listen_tokens: int = Field(
        default=20, ge=4, description="Length of the responses from which refusals are learned."
    )
    confirm_tokens: int = Field(
        default=20, ge=8, description="Length of the responses by which carriers are confirmed."
    )
    test_tokens: int = Field(
        default=32, ge=8, description="Length of the responses to held-out prompts."
    )
    test_prompts: int = Field(
        default=48, ge=0, description="Held-out prompts answered with and without the guard."
    )
    disguised_prompts: int = Field(
        default=12,
        ge=0,
        description="Held-out prompts of each side on which the gate is tried in disguises, such as"
        " base64 or an earlier turn; 0: none.",
    )
    confirm_prompts: int = Field(
        default=24, ge=8, description="Prompts that confirm a carrier by generated responses."
    )
    safe_tokens: int = Field(
        default=0,
        ge=0,
        description="Tokens of responses to safe prompts over which the chosen carriers' KL is"
        " measured; 0: of the first token alone.",
    )
    policy_prompts: int = Field(
        default=32,
        ge=0,
        description="Prompts of each kind on which policies are compared; 0: no presets.",
    )
    target_over_refusal: float | None = Field(
        default=None,
        gt=0.0,
        lt=1.0,
        description="Share of ordinary prompts that the chosen policy may refuse at most.",
    )
    budget_nats: float | None = Field(
        default=None, gt=0.0, le=64.0, description="Most nats per request of the chosen policy."
    )
    report_dir: Path | None = Field(default=None, description="Folder for the report.")
    work_dir: Path | None = Field(
        default=None,
        description="Folder for captured activations, from which an interrupted run resumes;"
        " default: beside the guard file, removed on success.",
    )

    def thorough(self) -> CalibrationConfig:
        """The same with more prompts, seeds and steps: narrower intervals, and it takes longer."""
        more = {
            "most_prompts": 0,
            "subspace_sizes": (2, 4),
            "refine_seeds": 2,
            "refine_steps": 32,
            "confirm_prompts": 64,
            "safe_tokens": 16,
            "test_prompts": 96,
            "disguised_prompts": 48,
            "policy_prompts": max(64, self.policy_prompts),
        }
        return self.model_copy(update=more)

    @model_validator(mode="after")
    def _names_a_model(self) -> Self:
        if bool(self.model) == (self.endpoint is not None):
            raise ValueError("give a model or an endpoint, not both")
        return self

    @property
    def prompt_limit(self) -> int:
        """How many prompts are used at most; 0: all. A GPU runs the rest in seconds."""
        if self.most_prompts is not None:
            return self.most_prompts
        return MOST_PROMPTS if self.endpoint is not None or self.device == "cpu" else 0

    @property
    def work_folder(self) -> Path:
        """Where captured activations wait until the guard is written."""
        return self.work_dir or self.out.with_name(self.out.name + ".work")
