"""Comparing: the block in which the ranks hold one contract together, seen from the training.

Unequal calls on two ranks hang a collective, and a rank that raises leaves the others waiting for
it until they time out, with no word of why. So at the end of a micro-step the ranks compare what
they did, in one small all-reduce between the hosts (gloo, which no device waits for). What hangs
before it, in a call, and what stops one rank, is told by a thread (`ranks/listener`).
"""

import itertools
import operator
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from lensnet_guard._torch_internals import default_store
from lensnet_guard.calls.errors import RankDivergence, RankStopped
from lensnet_guard.guard import Guard
from lensnet_guard.logs.sinks import Sink
from lensnet_guard.ranks.listener import Listener, States, differing, in_words
from lensnet_guard.ranks.processes import Process, this_process
from lensnet_guard.ranks.progress import Progress

if TYPE_CHECKING:
    from lensnet_guard.calls.budget import MicroStep
    from lensnet_guard.calls.record import CallRecord

_numbers = itertools.count()


@contextmanager
def compare_ranks(
    guard: Guard[Any] | Mapping[str, Guard[Any]], *, every: int = 1, ranges: bool = True
) -> Iterator[None]:
    """Hold guards' contracts across the ranks of a distributed run, while the block is open.

    Open it on all ranks at the same point, around the training loop. Whenever ``every`` further
    training micro-steps have ended, and as the block ends, the ranks compare how many micro-steps
    and training calls they have made. That is before the backward which unequal calls would hang.
    A rank that waits there is heard by the others at once: whoever has made more calls by then, and
    may hang in one, is told without having to come there.

    In the mode ``"enforce"`` all ranks raise when they differ, and a process that cannot, since it
    waits in a collective, is ended; in observe mode it is written down and said, once.
    What raises out of the block on one rank is told to all others, which raise it too where one of
    their guards enforces.

    Args:
        guard: The module's guard, or those of several modules (`guard_modules`), which are
            compared together; the same on all ranks.
        every: Micro-steps between comparisons. 1 notices before the backward of the very micro-step
            that differs; a comparison takes as long as a small all-reduce between the hosts.
        ranges: Whether calls of scopes whose budget is a range, such as ``(1, None)``, must be
            equal too; not so where each rank makes as many as its own data ask for.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialised.
        TypeError: ``guard`` is neither, or ``every`` is no whole number.
        ValueError: ``every`` is less than 1, there is no guard, or the ranks compare other modules
            than each other, or at other intervals.
        RankDivergence: The ranks differ; names every rank's counts and callers.
        RankStopped: Another rank raised, or its process ended; says what.
    """
    members = _members(guard)
    ranks = Ranks(members, every, ranges=ranges)
    sinks = [
        _Calls(ranks, number, _left_out(member, ranges=ranges))
        for number, member in enumerate(members)
    ]
    for member, sink in zip(members, sinks, strict=True):
        member.add_sink(sink)
    try:
        yield
        ranks.compare(leaving=True)
        ranks.part()
    except BaseException as error:
        said = ranks.leave(error)
        if said is not None:
            raise said from error
        raise
    finally:
        for member, sink in zip(members, sinks, strict=True):
            member.remove_sink(sink)
        ranks.leave()


def _members(guard: object) -> list[Guard[Any]]:
    """Return the guards, in the same order on all ranks."""
    found = list(guard.values()) if isinstance(guard, Mapping) else [guard]
    members = [member for member in found if isinstance(member, Guard)]
    if len(members) < len(found):
        raise TypeError(
            "compare_ranks takes a guard, or a mapping of names to guards as guard_modules returns "
            f"it, not {guard!r}"
        )
    return sorted(members, key=lambda member: member.name)


def _left_out(guard: Guard[Any], *, ranges: bool) -> frozenset[str]:
    """Return the scopes whose calls need not be equal."""
    scopes = guard.policy.in_full.items()
    return frozenset(name for name, one in scopes if not ranges and one.least != one.most)


class _Calls(Sink):
    """Tells of the calls and the micro-steps of one module.

    Args:
        ranks: Who is told.
        module: The module's number among those that are compared.
        left_out: The scopes whose calls are not compared.
    """

    def __init__(self, ranks: "Ranks", module: int, left_out: frozenset[str]) -> None:
        self._ranks, self._module, self._left_out = ranks, module, left_out

    def begin(self, record: "CallRecord") -> None:
        """Count a training call, unless the ranks are known to differ.

        Raises:
            RankDivergence: They are.
            RankStopped: Another rank has raised.
        """
        self._ranks.check()
        if record.context == "training" and record.kind != "recompute":
            compared = record.scope not in self._left_out
            self._ranks.progress.begin(self._module, record, compared=compared)

    def settled(self, ledger: "MicroStep") -> None:
        """Count a training micro-step that has ended well, and compare when it is time to.

        Raises:
            RankDivergence: The ranks differ.
            RankStopped: Another rank has raised.
        """
        self._ranks.end_micro_step(self._module, ledger)


class Ranks:
    """This rank among the others.

    Args:
        guards: Of the modules whose calls are compared.
        every: Micro-steps between comparisons.
        ranges: Whether ranges are compared; alike on all ranks.

    Attributes:
        progress: What this rank has done.
    """

    def __init__(self, guards: Sequence[Guard[Any]], every: int, *, ranges: bool) -> None:
        names = [guard.name for guard in guards]
        if not names:
            raise ValueError("there is nothing to compare: the mapping of guards is empty")
        if operator.index(every) < 1:
            raise ValueError(f"ranks are compared every 1 or more micro-steps, not {every}")
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                f"the ranks that call {', '.join(names)} cannot be compared: torch.distributed is "
                "not initialised; call torch.distributed.init_process_group first"
            )
        self.progress = Progress(names)
        self._every, self._guards = every, guards
        self._world = dist.get_world_size()
        self._group = dist.new_group(backend="gloo")
        said = f"{', '.join(names)}, every {every}{'' if ranges else ', without ranges'}"
        _check_alike(said, self._world, self._group)
        store = default_store(f"lensnet_guard/{next(_numbers)}")  # numbered alike everywhere
        self._apart = False  # nobody compares any more: the ranks have differed, or one has stopped
        self._listener = Listener(
            dist.get_rank(),
            _exchange_processes(self._world, self._group),
            store,
            self.progress,
            self._violate,
            enforced=[guard.mode == "enforce" for guard in guards],
        )

    def check(self) -> None:
        """Stop when another rank has, or when the ranks differ.

        Raises:
            RankDivergence: Saying what each rank has done.
            RankStopped: Saying what the rank that stopped has said; not in observe mode, where
                nobody compares any more from then on.
        """
        listener = self._listener
        if listener.heard is not None and any(listener.enforced):
            listener.come()
            raise RankStopped(listener.heard)
        self._apart = self._apart or listener.heard is not None
        if listener.states is not None and not self._apart:
            self._apart = True
            if listener.take():
                self._violate(listener.states)

    def _stops(self) -> bool:
        """Return whether nobody compares any more; raise like `check`."""
        self.check()
        return self._apart

    def end_micro_step(self, module: int, ledger: "MicroStep") -> None:
        """Count a training micro-step that has ended well, and compare when it is time to.

        The first module whose micro-step ends stands for all whose micro-steps end with it.
        """
        ended = self.progress.end_micro_step(module, ledger)
        if ended is not None and ended % self._every == 0:
            self.compare()
        self.check()

    def compare(self, *, leaving: bool = False) -> None:
        """Wait for the others, and look whether they have done the same.

        Args:
            leaving: This rank will not compare again.
        """
        if self._stops() or self._world == 1:
            return
        mine = torch.tensor(self.progress.stand(leaving=leaving).numbers)
        # Of the numbers and of their negatives the greatest: alike on all ranks if they are alike.
        both = torch.cat([mine, -mine])
        work = dist.all_reduce(both, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        while not work.is_completed():
            if self._stops():
                return
            time.sleep(20e-6)
        work.wait()  # raises where the connection broke
        most, least = both[: len(mine)], -both[len(mine) :]
        if torch.equal(most, least):
            if not leaving:  # whoever leaves stays where it is, and misses nobody who has left
                self.progress.go_on()
        elif self._listener.differ():
            self.check()
        else:  # there is no store; what is known of the others has come with the comparison
            self._apart = True
            rows = zip(("made here", "at least", "at most"), (mine, least, most), strict=True)
            text = "".join(f"\n  {row:<12} {_numbers_in_words(n.tolist())}" for row, n in rows)
            self._guards[0].violate("RankDivergence", text)

    def part(self) -> None:
        """Leave the others, who have called as this rank has, and end the group."""
        self._listener.part()
        self._listener.close()
        if not self._apart:  # somebody may still wait in it
            dist.destroy_process_group(self._group)

    def leave(self, error: BaseException | None = None) -> BaseException | None:
        """Listen no more, and tell the others why, if it is because of an error.

        Returns:
            What another rank said, where that explains the error; to be raised in its place.
        """
        said: BaseException | None = None
        # What a collective raises when a peer is gone says less than the peer did.
        by_collective = isinstance(error, RuntimeError) and not isinstance(error, RankStopped)
        if by_collective:
            self._listener.explain()
        self._listener.leave()
        if by_collective:
            try:
                self.check()
            except (RankStopped, RankDivergence) as explained:
                said = explained
        if error is not None and said is None and not isinstance(error, RankDivergence):
            self._listener.tell(error)
        return said

    def _violate(self, states: States) -> None:
        """Record and log that the ranks differ, and raise it where that is done."""
        module = differing(states)
        enforced = (guard for guard in self._guards if guard.mode == "enforce")
        guard = self._guards[module] if module is not None else next(enforced, self._guards[0])
        try:
            guard.violate("RankDivergence", in_words(states), self.progress.frame())
        except RankDivergence:
            self._listener.come()
            raise


def _numbers_in_words(numbers: Sequence[int]) -> str:
    micro_steps, *calls, step, micro_step, _ = numbers
    made = " and ".join(map(str, calls))
    return f"{made} training calls in {micro_steps} micro-steps, step {step}, {micro_step}"


def _check_alike(mine: str, world: int, group: dist.ProcessGroup | None) -> None:
    """Refuse ranks that would compare other things than each other, on all of them.

    Raises:
        ValueError: They would.
    """
    written = torch.tensor(list(mine.encode()))
    lengths = _gathered(torch.tensor([len(written)]), world, group)
    padded = nn.functional.pad(written, (0, int(max(lengths)) - len(written)))
    everyone = _gathered(padded, world, group)
    if not all(torch.equal(one, padded) for one in everyone):
        lines = "".join(
            f"\n  rank {rank:<7} {bytes(one.tolist()[: int(length)]).decode()}"
            for rank, (one, length) in enumerate(zip(everyone, lengths, strict=True))
        )
        raise ValueError(
            f"compare_ranks must be opened alike on all ranks, with the same modules:{lines}"
        )


def _gathered(
    mine: torch.Tensor, world: int, group: dist.ProcessGroup | None
) -> list[torch.Tensor]:
    """Return the tensors of all ranks, which are as long, in order."""
    everyone = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(everyone, mine, group=group)
    return everyone


def _exchange_processes(world: int, group: dist.ProcessGroup | None) -> list[Process]:
    """Return the processes of all ranks, in order."""
    everyone = _gathered(torch.tensor(this_process()), world, group)
    return [Process(*one.tolist()) for one in everyone]
