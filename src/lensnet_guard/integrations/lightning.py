"""A guard in Lightning's `Trainer`: one micro-step per training batch, free calls in validation.

Needs ``pip install lensnet-guard[lightning]``.
"""

from typing import Any

from lensnet_guard import CallPolicy, Guard, Mode, Verdict, Verdicts
from lensnet_guard.integrations._watch import Log
from lensnet_guard.integrations._watches import Target, Watches, contracts_for, watches_for

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities.rank_zero import rank_zero_info
except ImportError as error:
    raise ImportError(
        "lensnet_guard.integrations.lightning needs Lightning; "
        "install it with: pip install 'lensnet-guard[lightning]'"
    ) from error


class LensNetGuardCallback(Callback):
    """Keeps a call contract in ``fit``: ``Trainer(callbacks=[LensNetGuardCallback("critic")])``.

    In ``fit`` the context is training, and every batch is a micro-step with the budgets of the
    policy; the sanity check, validation, testing and prediction are inference, where calls are
    free. The module is guarded when the strategy has finished wrapping and given back as it was at
    the end, also after an exception.

    Args:
        target: The attribute of the LightningModule that holds the module (``"critic"``,
            ``"model.critic"``, ``"rewards.0"``); or a guard that exists, whose module is a part of
            it. Of several modules a mapping from such attributes to policies, or what
            `lensnet_guard.guard_modules` has returned.
        policy: As for `lensnet_guard.guard_module`; only with an attribute.
        mode: As for `lensnet_guard.guard_module`; only with an attribute.
        log: As for `lensnet_guard.guard_module`; only with an attribute.
        compare_ranks: Whether the ranks of a distributed ``fit`` compare what they call, and tell
            each other what stops one of them, as in `lensnet_guard.compare_ranks`.

    Attributes:
        guard: The guard of this or the last run, of several the first; None before the first run.
        guards: All of them, by name.
        verdict: What the last ``fit`` came to in this process; None before its end. As text it has
            a line for each module.

    Raises:
        TypeError: The first argument is neither a name nor a guard, or ``log`` is not a path.
        ValueError: A guard that exists, with a policy, mode or log for it.
        NothingChecked: From ``fit``, when it has trained without a micro-step.
        GuardLost: From ``fit``, when what the module calls is not the guarded one.
        RankStopped: From ``fit``, when another rank has raised.
        LensNetViolation: From ``fit``, the violations of the contract. The log is named on an
            exception; without a log the last calls are written to ``trainer.default_root_dir``.
    """

    def __init__(
        self,
        target: Target,
        *,
        policy: CallPolicy | None = None,
        mode: Mode | None = None,
        log: Log | None = None,
        compare_ranks: bool = False,
    ) -> None:
        self._compare_ranks = compare_ranks
        self._contracts = contracts_for(target, policy, mode, log)
        self._watch: Watches | None = None
        self._opened = self._trained = False
        self.guard: Guard | None = None
        self.guards: dict[str, Guard] = {}
        self.verdict: Verdict | Verdicts | None = None

    # From the first hook to the last -------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before the strategy wraps anything: see whether there is a guard to be lost."""
        self._close()  # what an earlier run may have left open
        self._watch = watches_for(self._contracts, pl_module, compare_ranks=self._compare_ranks)
        self._trained = False
        if stage == "fit":
            self.verdict = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After it: guard the module, in inference context until the first epoch."""
        self._open()
        if self._watch is not None:
            self._watch.begin_training()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what the training came to."""
        if self._watch is not None:
            self.verdict = self._watch.conclude(trained=self._trained)
            for line in str(self.verdict).splitlines():
                rank_zero_info(f"lensnet_guard: {line}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module back."""
        self._close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave evidence, and give the module back; ``teardown`` is not called then."""
        if self._watch is not None and self._opened:
            self._watch.leave_evidence(exception, trainer.default_root_dir)
        self._close(exception)

    # Training ------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """There is something to train: not so in a run that is resumed at its end."""
        self._trained = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on no call is legal outside a micro-step's scope."""
        self._enter("training")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Open the batch's micro-step."""
        if self._watch is not None:
            micro_step = batch_idx % trainer.accumulate_grad_batches
            self._watch.begin_step(trainer.global_step, micro_step)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Settle it."""
        if self._watch is not None:
            self._watch.end_step()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation may have come before, or an ``on_train_batch_start`` that ended the epoch."""
        self._enter("training")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calls are free again."""
        self._enter("inference")

    # All the rest is inference -------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calls are free, in the middle of an epoch and in the sanity check too."""
        self._infer()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calls are free."""
        self._infer()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calls are free."""
        self._infer()

    def _infer(self) -> None:
        if not self._opened:  # trainer.validate, test or predict, which have no on_fit_start
            self._open()
        self._enter("inference")

    def _open(self) -> None:
        if self._watch is not None:
            self._opened = True
            self.guard = self._watch.open()
            self.guards = self._watch.guards

    def _enter(self, context: Any) -> None:
        if self._watch is not None:
            self._watch.enter(context)

    def _close(self, error: BaseException | None = None) -> None:
        watch, self._watch, self._opened = self._watch, None, False
        if watch is not None:
            watch.close(error)
