"""Ranks: whether all processes of a distributed run call alike, and what stopped one of them.

Unequal calls on two ranks hang a collective, and a rank that raises leaves the others waiting for
it until they time out, with no word of why. So at the end of a micro-step the ranks compare what
they did, in one small all-reduce between the hosts (gloo, which no device waits for); and what
stops one rank is told to the others through torch's store, by a thread that does not depend on
where the training waits.
"""

import contextlib
import faulthandler
import itertools
import operator
import os
import pickle
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from lensnet_guard._torch_internals import default_store
from lensnet_guard.calls.errors import RankStopped
from lensnet_guard.guard import Guard
from lensnet_guard.logs.sinks import Sink

if TYPE_CHECKING:
    from lensnet_guard.calls.budget import MicroStep
    from lensnet_guard.calls.record import CallRecord

POLL_S = 0.25  # between looks for what stopped another rank
TELL_S = 3.0  # that a rank which stops waits for the others to hear why
GRACE_S = 10.0  # from hearing it to the end of a process that still waits for something
_KEPT_CALLERS = 3

_numbers = itertools.count()


@dataclass(frozen=True)
class RankState:
    """What one rank has done so far.

    Attributes:
        micro_steps: How many training micro-steps it has ended.
        calls: How many training calls it has begun.
        step: The optimizer step of the micro-step that ended last; -1 where it has no number.
        micro_step: The number of that micro-step in it, likewise.
        callers: The newest lines that made training calls.
        leaving: Whether it compares no more.
    """

    micro_steps: int
    calls: int
    step: int
    micro_step: int
    callers: tuple[str, ...]
    leaving: bool = False

    def __str__(self) -> str:
        text = f"{self.calls} training calls in {self.micro_steps} micro-steps"
        if self.step >= 0:
            text += f", the last one step {self.step}, micro-step {self.micro_step}"
        if self.leaving:
            text += ", and no more to come"
        return f"{text}; called from {', '.join(self.callers) or 'nowhere'}"


@contextmanager
def compare_ranks(guard: Guard, *, every: int = 1) -> Iterator[None]:
    """Hold a guard's contract across the ranks of a distributed run, while the block is open.

    Open it on all ranks at the same point, around the training loop. Whenever ``every`` further
    training micro-steps have ended, and as the block ends, the ranks compare how many micro-steps
    and training calls they have made. That is before the backward which unequal calls would hang.
    What raises out of the block on one rank is told to all others, which end too.

    Args:
        guard: The module's guard.
        every: Micro-steps between comparisons. 1 notices before the backward of the very micro-step
            that differs; a comparison takes as long as a small all-reduce between the hosts.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialised.
        TypeError: ``every`` is no whole number.
        ValueError: ``every`` is less than 1.
        RankDivergence: The ranks differ; names every rank's counts and callers.
        RankStopped: Another rank raised; says what.
    """
    ranks = Ranks(guard.name, every, guard.violate)
    guard.add_sink(ranks)
    try:
        yield
        ranks.compare(leaving=True)
        ranks.close()
    except BaseException as error:
        # What a collective raises when a peer is gone says less than the peer did.
        by_collective = isinstance(error, RuntimeError) and not isinstance(error, RankStopped)
        heard = ranks.listen() if by_collective else None
        ranks.leave()
        ranks.tell(error)
        if heard is not None:
            raise RankStopped(heard) from error
        raise
    finally:
        guard.remove_sink(ranks)
        ranks.leave()


class Ranks(Sink):
    """What this rank has done, and what it hears of the others.

    Args:
        module: The guarded module's name.
        every: Micro-steps between comparisons.
        violate: Records, logs and raises a violation: its class's name, and details.
    """

    def __init__(self, module: str, every: int, violate: Callable[[str, str], None]) -> None:
        if operator.index(every) < 1:
            raise ValueError(f"ranks are compared every 1 or more micro-steps, not {every}")
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                f"the ranks that call {module} cannot be compared: torch.distributed is not "
                "initialised; call torch.distributed.init_process_group first"
            )
        self._every, self._violate = every, violate
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo")
        self._lock = threading.Lock()
        self._apart = False  # the ranks have differed
        self._micro_steps = self._calls = 0
        self._last = (-1, -1)
        self._callers: deque[str] = deque(maxlen=_KEPT_CALLERS)
        self._store = default_store(f"lensnet_guard/{next(_numbers)}")  # numbered alike everywhere
        self._heard: str | None = None  # what another rank said as it stopped
        self._told, self._left = threading.Event(), threading.Event()
        self._listener = threading.Thread(
            target=self._listen, name="lensnet_guard ranks", daemon=True
        )
        if self._store is not None and self._world > 1:
            self._listener.start()

    # Comparing ---------------------------------------------------------------------------------

    def begin(self, record: "CallRecord") -> None:
        """Count a training call."""
        if record.context == "training" and record.kind != "recompute":
            caller = str(record.caller)
            with self._lock:  # carried threads call too
                self._calls += 1
                if caller in self._callers:
                    self._callers.remove(caller)
                self._callers.append(caller)

    def settled(self, ledger: "MicroStep") -> None:
        """Count a training micro-step that has ended well, and compare when it is time to.

        Raises:
            RankDivergence: The ranks differ.
            RankStopped: Another rank has raised.
        """
        self._micro_steps += 1
        step, micro_step = ledger.step, ledger.micro_step
        self._last = (-1 if step is None else step, -1 if micro_step is None else micro_step)
        if self._micro_steps % self._every == 0:
            self.compare()
        self.check()

    def check(self) -> None:
        """Stop when another rank has.

        Raises:
            RankStopped: Saying what that rank said.
        """
        if self._heard is not None:
            self._left.set()  # however long the unwinding takes
            raise RankStopped(self._heard)

    def compare(self, *, leaving: bool = False) -> None:
        """Wait for the others, and look whether they have done the same.

        Args:
            leaving: This rank will not compare again.
        """
        if self._world == 1 or self._apart:
            return
        mine = torch.tensor([self._micro_steps, self._calls, *self._last, leaving])
        # Of the numbers and of their negatives the greatest: alike on all ranks if they are alike.
        both = torch.cat([mine, -mine])
        work = dist.all_reduce(both, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        while not work.is_completed():
            self.check()
            time.sleep(20e-6)
        work.wait()  # raises where the connection broke
        if torch.equal(both[: len(mine)], -both[len(mine) :]):
            return
        self._apart = True  # as all ranks know now: nobody compares any more
        state = RankState(
            self._micro_steps, self._calls, *self._last, tuple(self._callers), leaving
        )
        states = _gather(state, self._world, self._group)
        self._violate(
            "RankDivergence", "".join(f"\n  rank {n:<7} {s}" for n, s in enumerate(states))
        )

    # Telling -----------------------------------------------------------------------------------

    def tell(self, error: BaseException) -> None:
        """Say to the other ranks that this one stops, and why; wait until they have heard."""
        if self._store is None or self._world == 1 or self._heard is not None:
            return
        with contextlib.suppress(RuntimeError):  # the store has gone with the rank that held it
            # The first who stops is the cause; who stops because of it changes nothing.
            self._store.compare_set("stopped", "", f"{self._rank} {type(error).__name__}: {error}")
            deadline = time.monotonic() + TELL_S
            while self._store.add("heard", 0) < self._world - 1 and time.monotonic() < deadline:
                time.sleep(POLL_S / 5)

    def listen(self) -> str | None:
        """Return what another rank said as it stopped, if it says so now."""
        self._told.wait(2 * POLL_S)
        return self._heard

    def close(self) -> None:
        """End the group, when nobody will compare in it any more."""
        self.leave()
        self._store = None
        dist.destroy_process_group(self._group)

    def leave(self) -> None:
        """Listen no more."""
        self._left.set()
        if self._listener.ident is not None:  # in the store as Python ends, it would abort
            self._listener.join(TELL_S)

    def _listen(self) -> None:
        """Look now and then whether another rank has stopped. Runs in a thread of its own."""
        store = self._store
        assert store is not None
        try:
            while not store.check(["stopped"]):
                if self._left.wait(POLL_S):
                    return
            rank, _, message = store.get("stopped").decode().partition(" ")
            if int(rank) == self._rank:
                return
            self._heard = f"rank {rank} stopped: {message}"
            self._told.set()
            _say(f"rank {self._rank} ends, because {self._heard}")
            store.add("heard", 1)
        except RuntimeError:  # the store has gone, and with it the rank that held it
            return
        # The training raises as soon as it comes to the guard; a collective may never let it.
        if not self._left.wait(GRACE_S):
            _say(f"rank {self._rank} still waits after {GRACE_S:.0f} s and is ended, here:")
            faulthandler.dump_traceback(sys.stderr)
            os._exit(1)


def _gather(state: RankState, world: int, group: dist.ProcessGroup | None) -> list[RankState]:
    """Return the states of all ranks, in order. Torch's own way to gather objects needs numpy."""
    data = pickle.dumps(state)
    longest = torch.tensor(len(data))
    dist.all_reduce(longest, dist.ReduceOp.MAX, group=group)
    padded = torch.frombuffer(bytearray(data.ljust(int(longest), b"\0")), dtype=torch.uint8)
    gathered = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(gathered, padded, group=group)
    return [pickle.loads(bytes(one.tolist())) for one in gathered]  # no pickle reads past its end


def _say(text: str) -> None:
    print(f"lensnet_guard: {text}", file=sys.stderr, flush=True)
