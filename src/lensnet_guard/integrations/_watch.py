"""One guarded module in one training: what a trainer's hooks open, and what must close in any case.

A trainer tells of its stages by pairs of hooks, and leaves the second of a pair out when something
is raised. Here is held what is open between them.
"""

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, ParamSpec, TypeVar

from lensnet_guard import (
    CallPolicy,
    Guard,
    MicroStep,
    Mode,
    guard_module,
    guard_of,
    lensnet_guard,
)
from lensnet_guard._text import absolute, add_note, short_path
from lensnet_guard.integrations._place import (
    GuardLost,
    Items,
    Place,
    find,
    getattr_path,
    locate,
    replace,
)
from lensnet_guard.tally import Tally, Verdict

P = ParamSpec("P")
R = TypeVar("R")

Log = str | os.PathLike[str]
STEP = "step"  # the window of an optimizer step


@dataclass(frozen=True)
class Contract:
    """Which module to guard and how; the arguments that all integrations take.

    Args:
        target: The attribute that holds the module (``"reference"``, ``"model.critic"``), to be
            guarded for the training; or a guard that exists.
        policy: As for `lensnet_guard.guard_module`; only with an attribute.
        mode: As for `lensnet_guard.guard_module`; only with an attribute.
        log: As for `lensnet_guard.guard_module`; only with an attribute. A relative one
            is taken from where the process is now, not where it is as the training starts.

    Raises:
        TypeError: ``target`` is neither, or ``log`` is not a path.
        ValueError: Policy, mode or log for a guard that exists.
    """

    target: str | Guard
    policy: CallPolicy | None = None
    mode: Mode | None = None
    log: Log | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.target, (str, Guard)):
            raise TypeError(
                "the first argument must be the name of the attribute that holds the module, or "
                f"its guard, not {self.target!r}"
            )
        given = [n for n in ("policy", "mode", "log") if getattr(self, n) is not None]
        if isinstance(self.target, Guard) and given:
            raise ValueError(
                f"{self.target.name} has a guard already, which {' and '.join(given)} cannot "
                "change; give them to guard_module"
            )
        if self.log is not None:
            object.__setattr__(self, "log", absolute(self.log))


class Watch:
    """Guards a module for the length of one training. Made before the trainer wraps anything.

    Args:
        contract: What to guard.
        root: Where to look for it.
        must_be_found: Whether a guard that exists must be found there; otherwise its place is
            checked only if it is.

    Attributes:
        guard: The guard; None before `open` when it is made there.
        micro_step: The one that is open, if any.
        begun: Training micro-steps that were begun since `open`, or since `count_from_here`.
        log: Where `Watches` are to log, when this one is their first.
    """

    def __init__(self, contract: Contract, root: Any, *, must_be_found: bool = True) -> None:
        self.log = contract.log
        self._contract = contract
        self._root = root
        self._must_be_found = must_be_found
        self._began_in = absolute(".")
        self._place: Place | None = None
        self._installed = ExitStack()
        self._context: Literal["training", "inference"] | None = None
        self._in_context = ExitStack()
        self._step: ExitStack | None = None
        self._optimizer_step = ExitStack()
        self._number: int | None = None  # of the optimizer step whose window is open
        self._tally: Tally | None = None
        self.guard: Guard | None = None
        self.micro_step: MicroStep | None = None
        self.begun = 0
        target = contract.target
        if isinstance(target, Guard):
            self.guard, self._place = target, find(root, target) if root is not None else None
        elif (guard := guard_of(found := getattr_path(root, target))) and guard.module is found:
            self.guard = guard  # it was guarded before, and must still be so at the start

    # Beginning and end -------------------------------------------------------------------------

    def open(self) -> Guard:
        """Guard the module, or check that it still is; inference context from now on.

        Raises:
            GuardLost: It was guarded before, and what hangs in its place is something else.
            TypeError: As `lensnet_guard.lensnet_guard`.
            ValueError: As `lensnet_guard.lensnet_guard`.
        """
        target = self._contract.target
        if isinstance(target, Guard):
            guard = target
            if self._place is None and self._must_be_found:
                self._place = self._find(target)
            self.check()
            self._install_beside(guard)
        else:
            self._place = locate(self._root, target)
            if self.guard is not None:
                self._place.check(self.guard)
            guard = self._install(self._place)
        self.guard = guard
        self.check()
        self.count_from_here()
        self.enter("inference")
        return guard

    def close(self, error: BaseException | None = None) -> None:
        """Close whatever is open, and put back what was there before `open`."""
        self.cut_short(error)
        self.enter(None)
        if self._tally is not None:
            self._tally.close()
        leave(self._installed, error)

    def check(self) -> None:
        """Make sure that what the training calls is the guarded module.

        Raises:
            GuardLost: It is not.
        """
        if self._place is not None and self.guard is not None:
            self._place.check(self.guard)

    # In between --------------------------------------------------------------------------------

    def enter(self, context: Literal["training", "inference"] | None) -> None:
        """Switch to a context; a micro-step that never ended is given up."""
        self.abandon()
        if self._context == context:
            return
        self._context = None
        self._in_context.close()
        if context is not None and self.guard is not None:
            self._in_context.enter_context(self.guard.context(context))
            self._context = context

    def begin_step(self, step: int, micro_step: int) -> None:
        """Open a training micro-step, and the window of its optimizer step if the policy has one.

        Raises:
            GuardLost: What the training calls is not the guarded module any more.
            BudgetUnmet: The optimizer step before this one has made too few calls.
        """
        assert self.guard is not None
        self.check()
        self.enter("training")
        if STEP in self.guard.policy.windows and step != self._number:
            self.end_optimizer_step()
            self._optimizer_step.enter_context(self.guard.window(STEP))
            self._number = step
        block = ExitStack()
        self.begun += 1
        self.micro_step = block.enter_context(self.guard.micro_step(step, micro_step))
        self._step = block

    def end_step(self) -> None:
        """Close the micro-step, if one is open, and settle its budgets.

        Raises:
            BudgetUnmet: As the end of ``guard.micro_step``.
            LensNetViolation: As the end of ``guard.micro_step``.
        """
        block, self._step, self.micro_step = self._step, None, None
        if block is not None:
            block.close()

    def end_optimizer_step(self) -> None:
        """Close the window of an optimizer step, if one is open, and settle its budgets.

        It stays open until the next one begins, for what belongs to a step may come after its last
        micro-step: an EMA's update, say.

        Raises:
            BudgetUnmet: As the end of ``guard.window``.
        """
        self._end_optimizer_step(None)

    def _end_optimizer_step(self, error: BaseException | None) -> None:
        window, self._optimizer_step, self._number = self._optimizer_step, ExitStack(), None
        leave(window, error)

    def abandon(self, error: BaseException | None = None) -> None:
        """Close a micro-step that was cut short: no budget is due."""
        block, self._step, self.micro_step = self._step, None, None
        if block is not None:
            leave(block, error or Abandoned())

    def cut_short(self, error: BaseException | None = None) -> None:
        """Close a micro-step and an optimizer step that were cut short: no budget is due."""
        self.abandon(error)
        self._end_optimizer_step(error or Abandoned())

    def freed(self, method: Callable[P, R]) -> Callable[P, R]:
        """Have a method run outside of whatever is open as it is called, where calls are free.

        What is open then goes on afterwards. To be called where nothing but inference is open.
        """
        assert self.guard is not None
        return self.guard.carry(method)

    # What it came to ---------------------------------------------------------------------------

    def count_from_here(self) -> None:
        """Begin the sums of the verdict anew."""
        assert self.guard is not None
        if self._tally is not None:
            self._tally.close()
        self._tally = Tally(self.guard)
        self.begun = 0

    def verdict(self) -> Verdict:
        """Return the sums since `open`, or since the last `count_from_here`."""
        assert self._tally is not None
        return self._tally.verdict()

    def leave_evidence(self, error: BaseException, folder: Log | None) -> None:
        """Say on an exception where the calls are written down, in a log or now.

        Args:
            error: What ends the training; the place is added to it as a note.
            folder: Where to write them for a guard without a log, relative to where the process was
                when the watch was made; with None nothing is written.
        """
        guard = self.guard
        if guard is None or guard.mode == "off":
            return
        path = guard.log_path
        if path is None and folder is not None:
            path = guard.evidence(self._began_in / folder)
        if path is not None:
            add_note(
                error, f"lensnet_guard: the calls of {guard.name} are in {short_path(str(path))}"
            )

    def _find(self, guard: Guard) -> Place:
        place = find(self._root, guard)
        if place is None:
            raise GuardLost(
                f"the guard of {guard.name} is lost: its module is nowhere in "
                f"{type(self._root).__name__}.\n"
                "  what to do   Make guard.module an attribute of the model or of one of its "
                "submodules, and call it there; or give the integration the name of the attribute "
                "that holds the raw module."
            )
        return place

    def _install(self, place: Place) -> Guard:
        """Guard what hangs at ``place`` until `close`."""
        contract, module = self._contract, place.module
        attribute = place.attribute
        # A number alone would say little: "reward_funcs.0".
        name = str(contract.target) if isinstance(place.owner, Items) else attribute
        if guard_of(module) is not None:
            block = lensnet_guard(
                place.owner, attribute=attribute, policy=contract.policy, mode=contract.mode
            )
            guard = self._installed.enter_context(block)
            self._install_beside(guard)
            return guard
        if module is None:
            raise TypeError(
                f"{place.path} is None, so there is nothing to guard; it must be made before the "
                "training starts (in __init__, setup or configure_model)"
            )
        guard = guard_module(
            module, policy=contract.policy, mode=contract.mode, name=name, guard_copies=False
        )  # for whoever keeps a copy knows nothing of the blocks that are opened here
        if guard.mode != "off":  # wherever it went meanwhile, as into DDP's wrapper
            self._installed.callback(replace, self._root, guard.module, module)
        self._installed.callback(guard.uninstall)
        if guard.mode != "off":  # the proxy in its place, and the raw module again afterwards
            self._installed.enter_context(lensnet_guard(place.owner, attribute=attribute))
            replace(self._root, module, guard.module)
        return guard

    def _install_beside(self, guard: Guard) -> None:
        """Put the proxy of a guard that exists wherever its raw module hangs, until `close`."""
        proxy = guard.module
        if guard.mode == "off" or self._root is None:
            return
        raw = proxy.__wrapped__
        for place in replace(self._root, raw, proxy):
            self._installed.callback(place.put_for, proxy, raw)


class Abandoned(Exception):
    """What breaks off a micro-step that never came to its end, as the log calls it."""


def leave(blocks: ExitStack, error: BaseException | None) -> None:
    """Close blocks: at their end, or by an exception that is on its way through them."""
    if error is None:
        blocks.close()
    else:
        blocks.__exit__(type(error), error, error.__traceback__)
