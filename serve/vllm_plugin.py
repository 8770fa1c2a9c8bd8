"""The vLLM plugin: with TRIMTAB_GUARD set, `vllm serve` and `vllm.LLM` serve behind the guard.

vLLM calls `register()` in every process: API server, engine core and workers. What it installs:

    EngineArgs.create_engine_config   refuse what is not exact, salt the compile cache
    Executor.__init__                 the model is the one the guard was calibrated on
    WorkerWrapperBase.load_model      attach the guard; .compile_or_warm_up_model: prove it (canary)
    EngineCore._initialize_kv_caches  every rank has to say that it is armed, or the start fails
    front end (`vllm_front`)          nothing is served, /health says 503 until they did; metrics

With TRIMTAB_ADMIN_KEY set the server can be calibrated as well, or only, without a guard:

    AsyncLLM.__init__, build_app      the routes of `calibration_routes`, for that key
    WorkerWrapperBase                 a desk that reads hidden states (`vllm_desk`)

vLLM itself fails open: an error in a plugin may be logged and serving goes on without it. So an
error here is raised *and* leaves a patch behind that lets no engine start in this process.
With none of the three variables set, nothing at all is imported or changed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guard.artifact import CarrierArtifact
    from guard.policy import Policy

__all__ = ["Armament", "register"]

_log = logging.getLogger("trimtab.vllm")


@dataclass(frozen=True)
class Armament:
    """What this process was told to guard with.

    Attributes:
        artifact: the guard file.
        policy: the operator's.
    """

    artifact: CarrierArtifact
    policy: Policy

    @property
    def salt(self) -> str:
        """What makes guarded compiled code differ: the guard, whose layers are returned."""
        return f"guard {self.artifact.artifact_id}"

    @property
    def name(self) -> str:
        """What tells this armament from another, for errors and logs."""
        return f"{self.salt}, policy {self.policy.digest}"


_installed: str | None = None  # what was installed in this process


def register() -> None:
    """Entry point `trimtab` of the group `vllm.general_plugins`; vLLM may call it several times.

    Raises:
        GuardError: this process cannot guard, and no engine will start in it.
    """
    guard, policy = os.environ.get("TRIMTAB_GUARD"), os.environ.get("TRIMTAB_POLICY")
    key = os.environ.get("TRIMTAB_ADMIN_KEY", "").strip() or None
    if not guard and not policy and key is None:
        return
    try:
        armament = _load(guard, policy) if guard or policy else None
        if armament is not None or key is not None:
            _install(armament, key)
    except BaseException as error:
        _refuse(error)
        raise


def _load(guard: str | None, policy_file: str | None) -> Armament | None:
    """Read what the environment names; None if the policy's mode is off."""
    from guard.artifact import load_artifact
    from guard.errors import InputError
    from guard.ownership import check_ownership
    from guard.policy import load_policy
    from serve.vllm_limits import check_policy

    check_ownership()
    policy = load_policy(Path(policy_file) if policy_file else None)
    if policy.mode == "off":
        _log.warning("TRIMTAB_POLICY says mode off: vLLM serves without a guard")
        return None
    if not guard:
        raise InputError(f"TRIMTAB_POLICY is set, so TRIMTAB_GUARD is needed in mode {policy.mode}")
    check_policy(policy)
    with _one_thread():
        return Armament(load_artifact(Path(guard)).with_preset(policy.preset), policy)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let PyTorch start no threads before vLLM forks: a child would wait for them for ever.

    PyTorch keeps them in GNU OpenMP's pool, which a fork copies without its threads. Tensors of
    some 30,000 numbers are enough to start it, such as the probe of a 7B model.
    """
    import torch

    n = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n)


def _install(armament: Armament | None, key: str | None) -> None:
    global _installed
    name = armament.name if armament is not None else "no guard, only to be calibrated"
    if _installed is not None:
        if _installed != name:
            from guard.errors import NotArmedError

            raise NotArmedError(
                f"this process already serves with {_installed}, and TRIMTAB_GUARD and"
                f" TRIMTAB_POLICY now name {name}; start a new process"
            )
        return
    if armament is not None:
        from serve import vllm_front

        _patch_config(armament)
        _patch_executor(armament)
        _patch_worker(armament, calibrated=key is not None)
        _patch_engine_core(armament)
        vllm_front.install(armament.artifact, armament.policy)
        _log.info("%s in mode %s", armament.name, armament.policy.mode)
    if key is not None:
        from serve import vllm_calibration

        vllm_calibration.install(key, guarded=armament is not None)
    _installed = name


def _patch_config(armament: Armament) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from serve.vllm_limits import check_config, salt_config
    from serve.vllm_patch import wrap

    def guarded(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        config = original(self, *args, **kwargs)
        check_config(config)
        salt_config(config, armament.salt)
        return config

    wrap(EngineArgs, "create_engine_config", guarded)


def _patch_executor(armament: Armament) -> None:
    from vllm.v1.executor.abstract import Executor

    from serve.vllm_patch import wrap

    def guarded(original: Callable[..., Any], self: Any, vllm_config: Any) -> None:
        _check_start(armament, vllm_config)
        original(self, vllm_config)

    wrap(Executor, "__init__", guarded)


def _check_start(armament: Armament, config: Any) -> None:
    """Before anything is loaded: the same guard as in the front end, and the right model."""
    from guard.errors import NotArmedError
    from serve.vllm_identity import checkpoint_identity
    from serve.vllm_limits import SALT, check_config

    check_config(config)
    salt = config.additional_config.get(SALT) if isinstance(config.additional_config, dict) else 0
    if salt != armament.salt:
        raise NotArmedError(
            f"the front end started with {salt or 'no guard'}, this engine with {armament.salt}:"
            " was the guard file replaced, or does TRIMTAB_GUARD differ between processes?"
        )
    with _one_thread():
        armament.artifact.check_model(checkpoint_identity(config.model_config))


def _patch_worker(armament: Armament, *, calibrated: bool) -> None:
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from guard.errors import NotArmedError
    from serve.vllm_worker import WorkerGuard

    def mine(wrapper: Any) -> WorkerGuard:
        found = wrapper.__dict__.get("trimtab")
        if not isinstance(found, WorkerGuard):
            raise NotArmedError("this worker loaded its model without a guard")
        return found

    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = self.worker.load_model(*args, **kwargs)
        self.__dict__["trimtab"] = WorkerGuard(
            self.worker, armament.artifact, armament.policy, calibrated=calibrated
        )
        return result

    def compile_or_warm_up_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = self.worker.compile_or_warm_up_model(*args, **kwargs)
        mine(self).arm()
        return result

    def trimtab_status(self: Any) -> str:
        return mine(self).status()

    def trimtab_drain(self: Any, request_ids: Sequence[str] | None = None) -> str:
        return mine(self).drain(request_ids)

    for function in (load_model, compile_or_warm_up_model, trimtab_status, trimtab_drain):
        # The wrapper forwards what it does not have to the worker; now it has these.
        setattr(WorkerWrapperBase, function.__name__, function)


def _patch_engine_core(armament: Armament) -> None:
    from vllm.v1.engine.core import EngineCore

    from serve.vllm_patch import check_statuses, wrap

    def guarded(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        statuses = self.model_executor.collective_rpc("trimtab_status")
        n_ranks = self.vllm_config.parallel_config.world_size
        check_statuses(statuses, armament.artifact.artifact_id, armament.policy, n_ranks)
        return result

    wrap(EngineCore, "_initialize_kv_caches", guarded)


def _refuse(error: BaseException) -> None:
    """Let no engine start in this process, whatever vLLM does with the error."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.executor.abstract import Executor
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    why = f"{type(error).__name__}: {error}"

    def refuse(*_: Any, **__: Any) -> Any:
        from guard.errors import NotArmedError

        raise NotArmedError(f"trimtab could not be installed, so nothing is served: {why}")

    EngineArgs.create_engine_config = refuse
    Executor.__init__ = refuse
    WorkerWrapperBase.load_model = refuse
