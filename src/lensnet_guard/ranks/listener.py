"""The listener: a thread of each rank that tells the others, through torch's store, and hears them.

It does not depend on where the training waits. A rank that stands at a comparison writes down what
it has made; whoever has made more already says that they are apart, before all have come, for some
may never come. Then every rank writes down its lines and counts, and each reads those of all.
"""

import contextlib
import faulthandler
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from lensnet_guard.ranks.agreement import judge
from lensnet_guard.ranks.peers import BEAT_S, Peers
from lensnet_guard.ranks.processes import Process
from lensnet_guard.ranks.progress import Progress, RankState

POLL_S = 0.25  # between looks for what another rank has told
GATHER_S = 2.0  # that the lines and counts of all ranks are waited for
TELL_S = 3.0  # that a rank which stops waits for the others to hear why
RAISE_S = 0.5  # from telling that ranks differ to saying so for a training that does not
APART_S = 4.0  # from telling that ranks differ to the end of a process that still waits
GRACE_S = 10.0  # that a process stands still, when a rank has stopped, before it is ended

States = Sequence[RankState | None]


class Listener:
    """What this rank tells the others, and hears of them.

    Args:
        rank: The number of this rank.
        processes: Those of all ranks, in order.
        store: What all ranks read and write; None where it is unknown.
        progress: What this rank has done.
        record: Records and logs that the ranks differ; raises it, too, where that is done.
        enforced: Of each module, whether its contract is enforced; a process that still waits ends
            then, when the ranks have called it unequally, and of any when a rank has stopped.

    Attributes:
        enforced: The same.
        heard: What another rank said as it stopped; None as long as none has.
        states: What each rank had done when they were found to differ; None as long as they were
            not, and in the place of a rank that said nothing.
        told: Set as soon as one of the two is there.
    """

    def __init__(
        self,
        rank: int,
        processes: Sequence[Process],
        store: Any,
        progress: Progress,
        record: Callable[[States], None],
        *,
        enforced: Sequence[bool],
    ) -> None:
        self.enforced = tuple(enforced)
        self.heard: str | None = None
        self.states: States | None = None
        self.told = threading.Event()
        self._rank, self._processes, self._store = rank, processes, store
        self._progress, self._record = progress, record
        self._differ, self._taken = threading.Event(), threading.Lock()
        self._left, self._wake = threading.Event(), threading.Event()
        self._broken = threading.Event()
        self._peers = Peers(rank, processes)
        self._thread = threading.Thread(target=self._run, name="lensnet_guard ranks", daemon=True)
        if store is not None and len(processes) > 1:
            self._thread.start()

    # For the training --------------------------------------------------------------------------

    @property
    def listens(self) -> bool:
        """Whether what the ranks tell each other is heard."""
        return self._thread.is_alive()

    def differ(self) -> bool:
        """Have all ranks told that they differ; wait for what they have done.

        Returns:
            Whether it is there.
        """
        self._differ.set()
        self._wake.set()
        return self.listens and self.told.wait(GATHER_S + TELL_S)

    def take(self) -> bool:
        """Return whether it is for the caller to say that the ranks differ: for the first one."""
        return self._taken.acquire(blocking=False)

    def explain(self) -> None:
        """Wait a while for what may explain that a collective has broken."""
        self._broken.set()
        self._wake.set()
        self.told.wait(3 * BEAT_S)

    def come(self) -> None:
        """Note that the training ends by itself, however long its unwinding takes."""
        self._left.set()
        self._wake.set()

    def tell(self, error: BaseException) -> None:
        """Say to the other ranks that this one stops, and why; wait until they have heard."""
        if self._store is None or len(self._processes) == 1 or self.heard is not None:
            return
        with contextlib.suppress(RuntimeError):  # the store has gone with the rank that held it
            self._stop(self._store, f"{self._rank} {type(error).__name__}: {error}")
            _wait_for(self._store, "heard", len(self._processes) - 1, TELL_S)

    def part(self) -> None:
        """Say to the other ranks that this one leaves, having called as they have."""
        if self._store is not None and len(self._processes) > 1:
            with contextlib.suppress(RuntimeError):  # the store has gone with the rank that held it
                self._store.set(f"left{self._rank}", "")

    def leave(self) -> None:
        """Listen no more."""
        self.come()
        if self._thread.ident is not None:  # in the store as Python ends, it would abort
            self._thread.join(GATHER_S + TELL_S)

    def close(self) -> None:
        """Listen no more, and need no more telling."""
        self.leave()
        self._store = None  # the connection ends here, not when the garbage is collected

    # The thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        """Listen until the training ends, or has to."""
        try:
            self._listen()
        except RuntimeError as error:  # the store has gone, and with it the rank that held it
            # So may have the one that held it, by itself; and nobody compares who has differed.
            leaves = self._progress.count().leaving or self.states is not None
            if not (leaves or self._left.is_set()):
                reason = str(error).partition("\n")[0]
                _say(f"rank {self._rank} hears of the others no more, the store has gone: {reason}")
            while not self._left.wait(BEAT_S):
                told = not leaves or self._broken.is_set()
                if told and (lost := self._lost(None)) is not None:
                    self.heard = f"rank {lost} stopped: {self._words_for(lost)}"
                    break
        if self.heard is not None:
            self.told.set()
            with contextlib.suppress(RuntimeError):
                self._store.add("heard", 1)
            if any(self.enforced):
                _say(f"rank {self._rank} ends, because {self.heard}")
                self._see_that_it_ends()
            else:
                _say(f"rank {self._rank} hears that {self.heard}")

    def _see_that_it_ends(self) -> None:
        """End the process if its training stands still in torch, as in a collective.

        One that saves what there is, or evaluates, raises as soon as it comes to the guard.
        """
        before, deadline = None, 0.0
        while not self._left.wait(POLL_S):
            place, now = self._progress.standstill(), time.monotonic()
            if place is None or place != before:
                before, deadline = place, now + GRACE_S
            elif now > deadline:
                self._end(GRACE_S)

    def _listen(self) -> None:
        """Look now and then what the others have told, until one has stopped.

        Raises:
            RuntimeError: The store has gone.
        """
        store, seen, written, before = self._store, None, None, None
        store.add("news", 0)  # it is there from now on, and reading it writes nothing
        while not self._left.is_set():
            news, apart = store.get("news"), self._differ.is_set()
            if news != seen:
                seen = news
                if store.check(["stopped"]):
                    rank, _, message = store.get("stopped").decode().partition(" ")
                    if int(rank) != self._rank:
                        self.heard = f"rank {rank} stopped: {message}"
                    return
                apart = apart or store.check(["apart"])
                written = pickle.loads(store.get("made")) if store.check(["made"]) else None
            mine = self._progress.count()
            if self.states is None:
                found = "apart" if apart else judge(written, mine, before)
                if found == "apart":
                    self._tell_apart(store)
                elif found == "write":
                    store.set("made", pickle.dumps(mine))
                    store.add("news", 1)
                before = mine
                self._look_after(store)
            self._wake.wait(POLL_S)
            self._wake.clear()

    def _tell_apart(self, store: Any) -> None:
        """Tell the ranks that they differ, and what each has done; see that this one ends."""
        began = time.monotonic()
        with contextlib.suppress(RuntimeError):  # the others have left
            store.set(f"state{self._rank}", pickle.dumps(self._progress.state()))
            store.set("apart", "")
            store.add("news", 1)
            _wait_for(store, "stated", len(self._processes), GATHER_S, mine=1)
        self.states = self._read_states(store)
        self.told.set()
        module = differing(self.states)
        enforced = any(self.enforced) if module is None else self.enforced[module]
        if not (enforced and self._left.wait(RAISE_S)):  # what is raised says it itself
            name = self._progress.modules[module or 0]
            words = in_words(self.states)
            _say(f"rank {self._rank}: {name} was not called alike by all ranks:{words}")
        with contextlib.suppress(RuntimeError):  # whoever holds the store stays until all have read
            stated = sum(state is not None for state in self.states)
            _wait_for(store, "known", stated, TELL_S, mine=1)
        left = APART_S - (time.monotonic() - began)
        if not self._left.wait(max(0.0, left)) and self.take():
            with contextlib.suppress(Exception):  # raised in this thread, where nobody catches it
                self._progress.context.run(self._record, self.states)
            if enforced:
                self._end(APART_S)

    def _read_states(self, store: Any) -> States:
        """Return what each rank has done, of those that said so."""
        states: list[RankState | None] = [None] * len(self._processes)
        with contextlib.suppress(RuntimeError):
            for rank in range(len(states)):
                if store.check([f"state{rank}"]):
                    states[rank] = pickle.loads(store.get(f"state{rank}"))
        states[self._rank] = states[self._rank] or self._progress.state()
        return states

    def _look_after(self, store: Any) -> None:
        """Give a sign of life, and look for those of the others."""
        if self._peers.is_time() or self._broken.is_set():
            if (lost := self._lost(store)) is not None:
                self._stop(store, f"{lost} {self._words_for(lost)}")
            if remark := self._peers.exchange(store):
                _say(f"rank {self._rank} finds that {remark}")

    def _lost(self, store: Any) -> int | None:
        """Return a rank whose process has ended without a word.

        Args:
            store: Where those that have left by themselves have said so; None where it has gone.
        """
        lost = self._peers.lost()
        if lost is None or (store is not None and store.check([f"left{lost}"])):
            return None
        return lost

    def _words_for(self, rank: int) -> str:
        return f"its process {self._processes[rank].pid} has ended without a word"

    def _stop(self, store: Any, message: str) -> None:
        # The first who stops is the cause; who stops because of it changes nothing.
        store.compare_set("stopped", "", message)
        store.add("news", 1)

    def _end(self, seconds: float) -> None:
        """End the process, which waits for something that never comes."""
        _say(f"rank {self._rank} still waits after {seconds:.0f} s and is ended, here:")
        faulthandler.dump_traceback(sys.stderr)
        os._exit(1)


def differing(states: States) -> int | None:
    """Return the first module that the ranks have not called as often; None if all were."""
    return next(iter(_all_differing(states)), None)


def in_words(states: States) -> str:
    """Return a line for each rank, which names a few modules: those that differ come first."""
    modules = max((len(state.modules) for state in states if state is not None), default=0)
    ordered = sorted(range(modules), key=lambda module: module not in _all_differing(states))
    shown = sorted(ordered[:_SHOWN])
    told = [state.in_words(shown) if state is not None else "said nothing" for state in states]
    return "".join(f"\n  rank {rank:<7} {words}" for rank, words in enumerate(told))


_SHOWN = 4  # modules of a line


def _all_differing(states: States) -> list[int]:
    calls = [state.count.calls for state in states if state is not None]
    return [n for n, made in enumerate(zip(*calls, strict=True)) if len(set(made)) > 1]


def _wait_for(store: Any, key: str, number: int, seconds: float, *, mine: int = 0) -> None:
    """Wait, so many seconds at most, until so many ranks have counted themselves."""
    store.add(key, mine)
    deadline = time.monotonic() + seconds
    while store.add(key, 0) < number and time.monotonic() < deadline:
        time.sleep(POLL_S / 5)


def _say(text: str) -> None:
    print(f"lensnet_guard: {text}", file=sys.stderr, flush=True)
