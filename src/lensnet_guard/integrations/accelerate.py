"""A guard in a loop of Hugging Face accelerate: `prepare` and `accumulate` that keep it.

Needs ``pip install lensnet-guard[hf]``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import nn

from lensnet_guard import (
    CallPolicy,
    Guard,
    Guards,
    Mode,
    Verdict,
    Verdicts,
    guard_module,
    guard_of,
)
from lensnet_guard._text import absolute
from lensnet_guard.integrations._place import GuardLost, find
from lensnet_guard.integrations._watch import Contract, Log, Watch
from lensnet_guard.integrations._watches import Watches, contracts_for

try:
    from accelerate import Accelerator
except ImportError as error:
    raise ImportError(
        "lensnet_guard.integrations.accelerate needs accelerate; "
        "install it with: pip install 'lensnet-guard[hf]'"
    ) from error


class GuardedAccelerator:
    """Keeps a call contract in a loop of accelerate's, around an `accelerate.Accelerator`.

    `prepare` lets accelerate wrap a module (DDP, FSDP, mixed precision, compilation) and guards
    what comes out; or it makes sure that a guard put on before is still there. Inside
    ``with guarded:`` every ``with guarded.accumulate(model):`` is a micro-step, and the context is
    inference in between, where calls are free.

    Args:
        accelerator: The accelerator of the loop.
        guard: A guard that exists, of a module that `prepare` gets as a part of another, or that is
            not prepared at all; or those of several, from `lensnet_guard.guard_modules`. Without
            one `prepare` makes it.
        policy: As for `lensnet_guard.guard_module`; only without ``guard``.
        mode: As for `lensnet_guard.guard_module`; only without ``guard``.
        log: As for `lensnet_guard.guard_module`; only without ``guard``.
        name: As for `lensnet_guard.guard_module`; only without ``guard``.
        compare_ranks: Whether the ranks of a distributed training compare what they call, and tell
            each other what stops one of them, as in `lensnet_guard.compare_ranks`.

    Attributes:
        guards: All of them, by name.
        verdict: What the last block came to in this process; None before its end. As text it has a
            line for each module.

    Raises:
        NothingChecked: At the end of the block, when there was no ``accumulate`` in it.
        TypeError: ``guard`` is no guard, or ``log`` is not a path.
        ValueError: A guard that exists, with a policy, mode or log for it.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        guard: Guard | Guards | None = None,
        *,
        policy: CallPolicy | None = None,
        mode: Mode | None = None,
        log: Log | None = None,
        name: str | None = None,
        compare_ranks: bool = False,
    ) -> None:
        self.guards: dict[str, Guard] = {}
        if guard is not None:
            contracts_for(guard, policy, mode, log)  # refuses what does not go together
            self.guards = dict(guard) if isinstance(guard, Guards) else {guard.name: guard}
        self._accelerator = accelerator
        folder = absolute(log) if log is not None else None
        self._contract: dict[str, Any] = {"policy": policy, "mode": mode, "log": folder}
        self._name = name
        self._compare_ranks = compare_ranks
        self._held_by: dict[str, Any] = {}
        self._watch: Watches | None = None
        self._step = self._micro_step = 0
        self.verdict: Verdict | Verdicts | None = None

    @property
    def guard(self) -> Guard | None:
        """The guard, of several the first; None before `prepare` when it is made there."""
        return next(iter(self.guards.values()), None)

    def prepare(self, *objects: Any) -> Any:
        """Return what ``accelerator.prepare`` gives back, with the guard on.

        Args:
            objects: Without a guard so far, the first is the module to guard; it comes back
                guarded, and is what to call.

        Raises:
            TypeError: There is no guard, and the first object is no module.
            ValueError: There is none, and the first object is guarded already.
            GuardLost: Accelerate gave back a module without the guarded module in it.
        """
        if self.guard is None:
            return self._prepare_and_guard(*objects)
        prepared = self._accelerator.prepare(*objects)
        results = prepared if isinstance(prepared, tuple) else (prepared,)
        for given, result in zip(objects, results, strict=True):
            if isinstance(given, nn.Module):
                self._check_held(given, result)
        return prepared

    def _check_held(self, given: nn.Module, result: Any) -> None:
        """Make sure that what was guarded in a model is still so in what accelerate made of it."""
        for name, guard in self.guards.items():
            if _holds(given, guard):
                if not _holds(result, guard):
                    raise GuardLost(
                        f"the guard of {guard.name} is lost: what accelerator.prepare made of the "
                        f"{type(given).__name__} does not hold the guarded module any more.\n"
                        "  what to do   Guard it afterwards: give the raw module to "
                        "GuardedAccelerator(accelerator, policy=...).prepare."
                    )
                self._held_by[name] = result

    @contextmanager
    def accumulate(self, *models: nn.Module) -> Iterator[None]:
        """``accelerator.accumulate(*models)`` and one micro-step, numbered as accelerate counts.

        Raises:
            RuntimeError: Outside ``with guarded:``.
            GuardLost: The module that held the guarded one holds something else now.
            LensNetViolation: As ``guard.micro_step``.
        """
        watch = self._watch
        if watch is None:
            raise RuntimeError(
                "guarded.accumulate needs the block of the guard open around the training loop: "
                "with guarded:"
            )
        with self._accelerator.accumulate(*models):
            watch.begin_step(self._step, self._micro_step)
            try:
                yield
                watch.end_step()
            except BaseException as error:
                watch.abandon(error)
                raise
            finally:  # the loop may catch it, skip the batch and go on
                watch.enter("inference")
            if self._accelerator.sync_gradients:
                self._step, self._micro_step = self._step + 1, 0
            else:
                self._micro_step += 1

    def __enter__(self) -> "GuardedAccelerator":
        if self.guard is None:
            raise RuntimeError("there is no guard yet: call guarded.prepare(module, ...) first")
        watch = Watches(
            {
                name: Watch(
                    Contract(guard), self._held_by.get(name), must_be_found=name in self._held_by
                )
                for name, guard in self.guards.items()
            },
            compare_ranks=self._compare_ranks,
        )
        watch.open()
        watch.begin_training()
        self._watch, self.verdict = watch, None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        watch, self._watch = self._watch, None
        assert watch is not None
        try:
            self.verdict = watch.verdict()
            if error is None:
                watch.conclude()
        except BaseException as raised:
            error = raised
            raise
        finally:
            if error is not None:
                watch.leave_evidence(error, self._accelerator.project_dir)
            watch.close(error)

    def _prepare_and_guard(self, *objects: Any) -> Any:
        module = objects[0] if objects else None
        if not isinstance(module, nn.Module):
            raise TypeError(
                "the first object to prepare must be the module to guard, not "
                f"{type(module).__name__}"
            )
        if (before := guard_of(module)) is not None:
            raise ValueError(
                f"{before.name} is guarded already, and accelerate must wrap the raw module. "
                "Prepare that one; or, when another model holds the guarded one, say so: "
                "GuardedAccelerator(accelerator, guard)"
            )
        name = self._name or type(module).__name__
        prepared = self._accelerator.prepare(*objects)
        first, *others = prepared if isinstance(prepared, tuple) else (prepared,)
        guard = guard_module(first, name=name, **self._contract)
        self.guards = {name: guard}
        return (guard.module, *others) if others else guard.module


def _holds(module: nn.Module, guard: Guard) -> bool:
    return module is guard.module or find(module, guard) is not None
