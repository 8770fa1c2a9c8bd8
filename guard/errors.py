"""Every error that trimtab raises on purpose.

GuardError
├── InputError                what the user gave cannot be used (exit code 2)
│   ├── PromptSetError        a prompt file is unreadable, empty or one-sided
│   ├── PolicyError           the policy file has unknown keys or values out of range
│   └── ArtifactError         the guard file is missing, damaged or of another format version
│       └── ModelMismatchError    the guard was calibrated on another model, tokenizer or template
├── UnsupportedModelError     no decoder layers, no chat template, no exact shadow pass
├── NoAdmissibleCarrierError  calibration found nothing that meets the KL constraint (exit code 3)
├── RequestError              a request the server must answer with status 400
│   └── ContextOverflowError  prompt and answer do not fit the model's context
├── QueueFullError            too many requests wait (status 429)
├── EndpointError             the server under calibration broke off or cannot do what was asked
├── NumericsError             NaN or infinite values where a guard must compute
├── BudgetError               a charge that would pass the KL budget: a bug, never swallowed
└── NotArmedError             the guard cannot guard, so nothing is served
"""

from __future__ import annotations

__all__ = [
    "ArtifactError",
    "BudgetError",
    "ContextOverflowError",
    "EndpointError",
    "GuardError",
    "InputError",
    "ModelMismatchError",
    "NoAdmissibleCarrierError",
    "NotArmedError",
    "NumericsError",
    "PolicyError",
    "PromptSetError",
    "QueueFullError",
    "RequestError",
    "UnsupportedModelError",
]


class GuardError(Exception):
    """Base of all errors of trimtab; `exit_code` is what the command line returns for it."""

    exit_code = 1


class InputError(GuardError):
    """What the user gave cannot be used; the message says what, where, expected and got."""

    exit_code = 2


class PromptSetError(InputError):
    """A prompt file is unreadable, empty, one-sided, or wrong on a named line."""


class PolicyError(InputError):
    """The policy file has an unknown key or a value out of range."""


class ArtifactError(InputError):
    """The guard file is missing, damaged, not finite, or of another format version."""


class ModelMismatchError(ArtifactError):
    """The guard was calibrated on another model, tokenizer or chat template."""


class UnsupportedModelError(InputError):
    """The model cannot be guarded exactly; the message names what is missing."""


class NoAdmissibleCarrierError(GuardError):
    """No candidate meets the KL constraint and beats the random controls."""

    exit_code = 3


class RequestError(GuardError):
    """A request that must be answered with HTTP status 400; `param` names the field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextOverflowError(RequestError):
    """Prompt and answer together do not fit the model's context."""


class QueueFullError(GuardError):
    """Too many requests wait; `retry_after_seconds` is a fair time to come back."""

    def __init__(self, message: str, retry_after_seconds: int) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class EndpointError(GuardError):
    """The server under calibration broke off, or could not do what it was asked."""


class NumericsError(GuardError):
    """NaN or infinite values where the guard must compute."""


class BudgetError(GuardError):
    """A charge that would pass the KL budget. It is a bug when it is raised, never a warning."""


class NotArmedError(GuardError):
    """The guard cannot guard; nothing may be served."""
