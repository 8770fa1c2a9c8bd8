"""What the guard exports: every Prometheus metric of trimtab, in one place.

`docs/metrics.md` defines each one. No metric carries user text, and every label value comes from a
closed set, so the number of series is known at start; all of them start at 0, so that `rate()`
sees the first event. Nothing here knows HTTP: the embedded server and vLLM's both use it.
"""

from __future__ import annotations

import math
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from guard.gate import Zone
from guard.refusal import Verdict
from guard.session import Record

__all__ = ["NONE", "ErrorKind", "GuardMetrics"]

NONE = "none"
"""Label value of a request without a zone, and of a response without a verdict."""

# 1-2-5 series: log-spaced, and the values one sets as budgets are bucket bounds.
_KL_BUCKETS = (*(float(f"{m}e{e}") for e in range(-4, 1) for m in (1, 2, 5)), 10.0)
_SCORE_BUCKETS = (
    *(-32.0, -16.0, -12.0, -8.0, -6.0, -4.0, -3.0, -2.0, -1.0, 0.0),
    *(1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0),
)
_REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_GATE_BUCKETS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0)


class ErrorKind(StrEnum):
    """Why a request was not served, not to its end, or (`unguarded`) not as it should have been."""

    BAD_REQUEST = "bad_request"
    UNAUTHORIZED = "unauthorized"
    NOT_FOUND = "not_found"
    TOO_LARGE = "too_large"
    CONTEXT_OVERFLOW = "context_overflow"
    QUEUE_FULL = "queue_full"
    NUMERICS = "numerics"
    BUDGET = "budget"
    NOT_ARMED = "not_armed"
    INTERNAL = "internal"
    UNGUARDED = "unguarded"
    CLIENT_DISCONNECT = "client_disconnect"


class GuardMetrics:
    """The metrics of one guarded model.

    An engine calls `observe` once per response it began, whether finished, aborted or failed, and
    `observe_gate` once per gate reading. Both may come from the engine's own thread.

    Args:
        registry: where the metrics are registered; a registry holds one GuardMetrics.
        model: the served model's name.
        mode: the policy's mode.
        artifact_id: of the guard; None when mode is off.
        format_version: of the guard file; None likewise.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        model: str,
        mode: str,
        artifact_id: str | None = None,
        format_version: int | None = None,
    ) -> None:
        self.registry = registry
        self._model, self._mode = model, mode

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, ("model", *labels), registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, text, ("model", *labels), registry=registry, buckets=buckets)

        self._requests = counter(
            "trimtab_requests_total", "Responses begun, by the gate's decision.", "mode", "zone"
        )
        self._responses = counter(
            "trimtab_responses_total",
            "Responses ended, by zone and verdict of a string match; none: not finished.",
            "zone",
            "verdict",
        )
        self._over_refusals = counter(
            "trimtab_suspected_over_refusals_total",
            "Refused though the gate says benign; suspected, because truth needs a label.",
        )
        self._under_refusals = counter(
            "trimtab_suspected_under_refusals_total",
            "Answered though the gate says harmful; suspected, because truth needs a label.",
        )
        self._kl = histogram(
            "trimtab_kl_nats",
            "KL(mixed || base) a response spent, nats; in observe mode what it would have spent.",
            _KL_BUCKETS,
            "zone",
        )
        self._exhausted = counter(
            "trimtab_kl_budget_exhausted_total", "Responses that used up their KL budget."
        )
        self._flips = counter(
            "trimtab_token_flips_total", "Steered tokens whose most likely token changed."
        )
        self._shadows = counter("trimtab_shadow_passes_total", "Shadow passes run.")
        self._scores = histogram(
            "trimtab_gate_score", "The gate's probe logit; higher is more harmful.", _SCORE_BUCKETS
        )
        self._armed = Gauge(
            "trimtab_guard_armed",
            "1 if the guard is proven to work and the engine is running.",
            ("model",),
            registry=registry,
            multiprocess_mode="livemin",  # several API servers: armed if all of them are
        )
        self._info = Gauge(
            "trimtab_guard_info",
            "1, labelled with the guard in use.",
            ("artifact", "model", "format_version"),
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._errors = counter(
            "trimtab_errors_total", "Requests not served, or not to their end.", "kind"
        )
        self._request_seconds = histogram(
            "trimtab_request_duration_seconds",
            "From a request's admission to its last byte, seconds.",
            _REQUEST_BUCKETS,
        )
        self._gate_seconds = histogram(
            "trimtab_gate_duration_seconds", "Time one gate reading took, seconds.", _GATE_BUCKETS
        )
        self._start_at_zero()
        if artifact_id is not None:
            self._info.labels(artifact_id, model, str(format_version)).set(1)

    def observe(self, record: Record | None) -> None:
        """Count one response. None stands for a response made with mode off: it has no record."""
        zone = NONE if record is None or record.zone is None else record.zone.value
        verdict = NONE if record is None or record.verdict is None else record.verdict.value
        self._requests.labels(self._model, self._mode, zone).inc()
        self._responses.labels(self._model, zone, verdict).inc()
        if record is None:
            return
        self._over_refusals.labels(self._model).inc(record.suspected_over_refusal)
        self._under_refusals.labels(self._model).inc(record.suspected_under_refusal)
        self._exhausted.labels(self._model).inc(record.exhausted)
        self._flips.labels(self._model).inc(record.token_flips)
        self._shadows.labels(self._model).inc(record.shadow_passes)
        # A NaN would poison the histogram's sum for good; engines report it as an error instead.
        if record.zone is not None and math.isfinite(record.kl_nats):
            self._kl.labels(self._model, zone).observe(record.kl_nats)
        if record.gate_score is not None and math.isfinite(record.gate_score):
            self._scores.labels(self._model).observe(record.gate_score)

    def observe_gate(self, seconds: float) -> None:
        """Book the time of one gate reading."""
        self._gate_seconds.labels(self._model).observe(seconds)

    def observe_request(self, seconds: float) -> None:
        """Book the time of one admitted request, however it ended."""
        self._request_seconds.labels(self._model).observe(seconds)

    def count_error(self, kind: ErrorKind) -> None:
        """Count one request that was not served, or not to its end."""
        self._errors.labels(self._model, kind.value).inc()

    def count_unguarded(self) -> None:
        """Count one response that went on without its guard: `on_failure: open` allowed it."""
        self.count_error(ErrorKind.UNGUARDED)

    def set_armed(self, armed: bool) -> None:
        """Say whether the guard works; servers call it before each scrape."""
        self._armed.labels(self._model).set(armed)

    def _start_at_zero(self) -> None:
        """Create every series whose labels are known, so that dashboards find them from the start.

        Only the current mode's: the others cannot occur in this process.
        """
        for zone in (*Zone, NONE):
            self._requests.labels(self._model, self._mode, str(zone))
            for verdict in (*Verdict, NONE):
                self._responses.labels(self._model, str(zone), str(verdict))
        for zone in Zone:
            self._kl.labels(self._model, zone.value)
        for kind in ErrorKind:
            self._errors.labels(self._model, kind.value)
        for metric in (
            self._over_refusals,
            self._under_refusals,
            self._exhausted,
            self._flips,
            self._shadows,
            self._scores,
            self._armed,
            self._request_seconds,
            self._gate_seconds,
        ):
            metric.labels(self._model)
