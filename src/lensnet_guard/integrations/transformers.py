"""A guard in the `Trainer` of Hugging Face transformers: one micro-step per micro-batch.

Needs ``pip install lensnet-guard[hf]``.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lensnet_guard import CallPolicy, Guard, Guards, Mode, Verdict, Verdicts
from lensnet_guard.integrations._preset import Decorator, around, contracts_of, preset_of
from lensnet_guard.integrations._watch import Log
from lensnet_guard.integrations._watches import Target, Watches, contracts_for, watches_for
from lensnet_guard.integrations.presets import Preset

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
    from transformers import TrainingArguments as Arguments
except ImportError as error:
    raise ImportError(
        "lensnet_guard.integrations.transformers needs transformers; "
        "install it with: pip install 'lensnet-guard[hf]'"
    ) from error


class LensNetGuardCallback(TrainerCallback):
    """Keeps the contract of a guard in ``train``: ``Trainer(callbacks=[...(guard)])``.

    From the start of a step to its end, and from there to the next end of a substep, runs a
    micro-step with the budgets of the policy; in between the context is inference, where calls are
    free: transformers has no hook before an evaluation. `guarded_trainer` makes one, and closes it
    in any case; the Trainer tells its callbacks of no exception, so that one alone stays open after
    an exception until the next ``train`` or `close`.

    Args:
        guard: The guard of a module that the training calls, or the guards of several.
        compare_ranks: As for `guarded_trainer`; not with ``watch``, which knows.
        watch: What is open already for that guard, and outlasts ``train``, as `guarded_trainer` has
            it; without one, every ``train`` has its own.

    Attributes:
        guard: The guard; of several the first.
        guards: All of them, by name.
        verdict: What the last ``train`` came to in this process; None before its end. As text it
            has a line for each module.

    Raises:
        NothingChecked: From ``train``, when it has ended without a micro-step: the trainer does not
            come to the hooks that open them.
        GuardLost: From ``train``, when the model held the guarded module when training began or
            when the last step did, and holds something else there now.
        LensNetViolation: From ``train``, the violations of the contract.
        RankStopped: From ``train``, when another rank has raised.
    """

    def __init__(
        self, guard: Guard | Guards, *, compare_ranks: bool = False, watch: Watches | None = None
    ) -> None:
        self._contracts = contracts_for(guard) if watch is None else {}
        self._compare_ranks = compare_ranks
        self._watch = watch
        self._owns_watch = watch is None
        self._substep = 0
        self._complete = False
        alone = guard if isinstance(guard, Guards) else {guard.name: guard}
        self.guards = alone if watch is None else watch.guards
        self.guard = next(iter(self.guards.values()))
        self.verdict: Verdict | Verdicts | None = None

    def close(self, error: BaseException | None = None) -> None:
        """Close what an exception has left open.

        Args:
            error: That exception, for the log and for other ranks.
        """
        if self._watch is not None and self._owns_watch:
            watch, self._watch = self._watch, None
            watch.close(error)

    def on_train_begin(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look where the guarded module hangs, when it is a part of the model."""
        self.verdict = None
        self._complete = state.global_step >= state.max_steps > 0  # resumed at its end
        if self._owns_watch:
            self.close()
            self._watch = watches_for(
                self._contracts,
                kwargs.get("model"),
                must_be_found=False,
                compare_ranks=self._compare_ranks,
            )
            self._watch.open()
        if self._watch is not None:
            self._watch.begin_training()
        self._enter("inference")

    def on_step_begin(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the first micro-step of an optimizer step."""
        self._begin(state, 0)

    def on_substep_end(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Settle one micro-step, and open the next: it has no hook of its own to begin."""
        self.settle()
        self._begin(state, self._substep + 1)

    def on_step_end(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Settle the last micro-step; an evaluation may come now."""
        self.settle()

    def on_epoch_end(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give up a micro-step that was opened and never came, when a callback ends the epoch."""
        self._enter("inference")

    def on_train_end(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say what the training came to."""
        self._enter("inference")
        if self._watch is not None:
            try:
                self.verdict = self._watch.conclude(trained=not self._complete)
            except BaseException as error:
                self.close(error)
                raise
            self.close()
            if state.is_world_process_zero:
                for line in str(self.verdict).splitlines():
                    print(f"lensnet_guard: {line}")

    def settle(self) -> None:
        """Settle the micro-step that is open: a step or a substep has ended."""
        self._end()
        self._enter("inference")

    def _begin(self, state: TrainerState, substep: int) -> None:
        self._substep = substep
        if self._watch is not None:
            self._watch.begin_step(state.global_step, substep)

    def _end(self) -> None:
        if self._watch is not None:
            self._watch.end_step()

    def _enter(self, context: Any) -> None:
        if self._watch is not None:
            self._watch.enter(context)


class UpdatesCallback(LensNetGuardCallback):
    """That of a trainer whose loop tells of the end of an update alone: one is one micro-step."""

    def on_train_begin(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the first update."""
        super().on_train_begin(args, state, control, **kwargs)
        self._begin(state, 0)

    def on_step_end(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Settle an update, and open the next; after the last it is given up."""
        self.settle()
        self._begin(state, 0)


class _Settles(TrainerCallback):
    """Comes before a trainer's other callbacks as a step ends, so that these are outside of it.

    Args:
        told: It comes after them, and opens what begins.
    """

    def __init__(self, told: LensNetGuardCallback) -> None:
        self._told = told

    def on_substep_end(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._told.settle()

    def on_step_end(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._told.settle()


_NO_PRESET = Preset("", ())


@contextmanager
def guarded_trainer(
    trainer: Trainer,
    target: Target | None = None,
    *,
    policy: CallPolicy | None = None,
    mode: Mode | None = None,
    log: Log | None = None,
    compare_ranks: bool = False,
) -> Iterator[LensNetGuardCallback]:
    """Guard what a trainer holds around ``trainer.train()`` and ``trainer.evaluate()``.

    ``with guarded_trainer(trainer): trainer.train()`` is all that one of TRL's trainers needs: its
    reference, reward models, value model or teacher are found, and have the contract that this
    kind of trainer keeps, from `lensnet_guard.integrations.presets`.

    Outside the micro-steps of ``train``, and in ``evaluate`` and ``predict``, calls are free; also
    in other callbacks as a step ends. Deep copies of whole modules are not guarded. At the end of
    the block, and after an exception, the modules are as they were.

    Args:
        trainer: The trainer; its callback is added for the length of the block.
        target: The attribute of the trainer that holds the module (``"reference"``,
            ``"model.critic"``, ``"reward_funcs.0"``); or a guard that exists, whose module hangs
            there somewhere. Of several modules a mapping from such attributes to policies, or what
            `lensnet_guard.guard_modules` has returned. Without one, what the preset says.
        policy: As for `lensnet_guard.guard_module`; only with an attribute.
        mode: As for `lensnet_guard.guard_module`; only with an attribute, or without a target.
        log: As for `lensnet_guard.guard_module`; likewise.
        compare_ranks: Whether the ranks of a distributed ``train`` compare what they call, and tell
            each other what stops one of them, as in `lensnet_guard.compare_ranks`; calls that a
            preset has a range for need not be equal.

    Yields:
        The callback, with ``guard``, ``guards`` and, after ``train``, ``verdict``.

    Raises:
        NoContract: There is no target, and no preset for this trainer; says what it holds.
        TypeError: The target is neither a name nor a guard, or ``log`` is not a path; or there is a
            policy and no target.
        ValueError: A guard that exists, with a policy, mode or log for it; or a module that this
            trainer's callbacks guard already.
        GuardLost: What the trainer calls is not the guarded module, at the start or at any step.
        LensNetViolation: The violations of the contract. The log is named on an exception; without
            a log the last calls are written to ``trainer.args.output_dir``.
    """
    contracts = contracts_for(
        _found(trainer, policy) if target is None else target, policy, mode, log
    )
    watch = watches_for(
        contracts, trainer, compare_ranks=compare_ranks, ranges=target is not None
    )  # by a preset's ranges each rank calls as its own data ask for: turns with tools, lots
    try:
        with _told(trainer, watch) as callback:
            yield callback
    except BaseException as error:
        watch.leave_evidence(error, trainer.args.output_dir)
        watch.close(error)
        raise
    watch.close()


def _found(trainer: Trainer, policy: CallPolicy | None) -> dict[str, CallPolicy | None]:
    """Return what a trainer holds, with the contract of its preset."""
    if policy is not None:
        raise TypeError(
            "guarded_trainer: a policy is given, and no attribute that it is for; name the one "
            'that holds the module, guarded_trainer(trainer, "ref_model", policy=...)'
        )
    return {**contracts_of(trainer)}


@contextmanager
def _told(trainer: Trainer, watch: Watches) -> Iterator[LensNetGuardCallback]:
    """Have a trainer tell a callback of its micro-steps and windows, while the block is open."""
    first, guards = watch.open(), set(watch.guards.values())
    for other in trainer.callback_handler.callbacks:
        if not isinstance(other, LensNetGuardCallback):
            continue
        for guard in guards.intersection(other.guards.values()):
            raise ValueError(
                f"{guard.name} of this {type(trainer).__name__} is guarded already: by a "
                "guarded_trainer that is open, or by a LensNetGuardCallback of the trainer's. "
                "Leave one of them out"
            )
    preset = preset_of(trainer) or _NO_PRESET
    kind = UpdatesCallback if preset.own_loop else LensNetGuardCallback
    callback = kind(first, watch=watch)
    handler, ours = trainer.callback_handler, (_Settles(callback), callback)

    def as_it_trains(train: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(train)
        def run(*args: Any, **kwargs: Any) -> Any:
            handler.callbacks[:] = _around(ours, handler.callbacks)  # others may have come since
            with watch.training():
                return train(*args, **kwargs)

        return run

    decorators: dict[str, Decorator] = {
        "train": as_it_trains,
        **dict.fromkeys((*_EVALUATES, *preset.evaluates), watch.freed),
        **{by: watch.window(name) for name, by in preset.windows.items()},
    }
    handler.callbacks[:] = _around(ours, handler.callbacks)
    try:
        with around(trainer, decorators):
            yield callback
    finally:
        handler.callbacks[:] = [other for other in handler.callbacks if other not in ours]


_EVALUATES = ("evaluate", "predict", "evaluation_loop")
_Ours = tuple[TrainerCallback, TrainerCallback]


def _around(ours: _Ours, callbacks: list[TrainerCallback]) -> list[TrainerCallback]:
    """Return the callbacks with one of ours before all others, and one after them."""
    return [ours[0], *(other for other in callbacks if other not in ours), ours[1]]
