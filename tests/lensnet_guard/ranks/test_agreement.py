"""The judge, asked as ranks run that are as fast and as slow as they like."""

from collections.abc import Iterator
from functools import partial
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lensnet_guard.ranks.agreement import judge
from lensnet_guard.ranks.progress import Count

Call = tuple[int, bool]  # which of two modules, and whether there is a collective in it
Schedule = tuple[int, list[int]]  # a seed, and how fast each training and each listener is
Program = list[list[Call]]  # the calls of each micro-step


def count(window: int, calls: tuple[int, ...], *, final: bool = False, step: int = 0) -> Count:
    return Count(window, final, window - (not final), calls, step, 0, leaving=False)


class TestJudge:
    @pytest.mark.parametrize(
        ("mine", "found"),
        [
            (count(2, (3,)), None),  # may still make as many
            (count(2, (4,)), None),  # as many, and may make no more
            (count(2, (5,)), "apart"),
            (count(2, (4,), final=True), None),
            (count(2, (3,), final=True), "apart"),  # will not make it any more
            (count(2, (4,), final=True, step=1), "apart"),
            (count(3, (5,)), None),  # the comparison is over
            (count(1, (5,)), None),  # nothing of this one is known
        ],
    )
    def test_what_another_has_made(self, mine: Count, found: str | None) -> None:
        """It waits with four calls at the end of window 2."""
        assert judge(count(2, (4,), final=True), mine, None) == found

    def test_a_micro_step_more(self) -> None:
        """Without any call in it."""
        mine = Count(2, False, 3, (4,), 0, 0, False)
        assert judge(count(2, (4,), final=True), mine, None) == "apart"

    def test_who_waits_says_so_once(self) -> None:
        """When it has been there for a while, and nobody has said it of this comparison."""
        mine = count(2, (4,), final=True)
        assert judge(None, mine, mine) == "write"
        assert judge(count(1, (9,), final=True), mine, mine) == "write"
        assert judge(None, mine, None) is None
        assert judge(mine, mine, mine) is None
        assert judge(None, count(2, (4,)), count(2, (4,))) is None


class World:
    """Ranks that run programs, step by step; what is written down is read late, and written late.

    Every comparison, and every collective in a call, waits for the same one of all ranks.
    """

    def __init__(self, programs: list[Program], every: int) -> None:
        self.ranks = range(len(programs))
        self.told = False
        self._every = every
        self._came: dict[object, int] = {}
        self._made = [Count(1, False, 0, (0, 0), -1, 0, False) for _ in programs]
        self._written: Count | None = None
        self._trainings = [self._train(rank, programs[rank]) for rank in self.ranks]
        self._listeners = [self._listen(rank) for rank in self.ranks]

    def train(self, rank: int) -> bool:
        """Let a rank's training do one step; return whether it has moved."""
        return next(self._trainings[rank], False)

    def listen(self, rank: int) -> None:
        """Let a rank's listener do one step: look, or act on what it has seen."""
        next(self._listeners[rank])

    def run(self, schedule: Schedule) -> None:
        """Let all go on at their speeds for a while, and then until nothing moves any more."""
        seed, speeds = schedule
        steps = [partial(act, rank) for act in (self.train, self.listen) for rank in self.ranks]
        for step in Random(seed).choices(steps, speeds[: len(steps)], k=400):
            step()
        moved = True
        while moved:
            moved = sum(self.train(rank) for rank in self.ranks) > 0
        for _ in range(12):
            for rank in self.ranks:
                self.listen(rank)

    @property
    def finished(self) -> bool:
        return all(next(training, None) is None for training in self._trainings)

    def _meet(self, what: object) -> Iterator[bool]:
        self._came[what] = self._came.get(what, 0) + 1
        while self._came[what] < len(self.ranks):
            yield False

    def _train(self, rank: int, program: Program) -> Iterator[bool]:
        collectives = 0
        for number, calls in enumerate(program, 1):
            for module, collective in calls:
                made = list(self._made[rank].calls)
                made[module] += 1
                self._made[rank] = self._made[rank]._replace(calls=tuple(made))
                yield True
                if collective:
                    collectives += 1
                    yield from self._meet(collectives)
            self._made[rank] = self._made[rank]._replace(micro_steps=number, step=number)
            yield True
            if number % self._every == 0:
                yield from self._compare(rank, leaving=False)
        yield from self._compare(rank, leaving=True)

    def _compare(self, rank: int, *, leaving: bool) -> Iterator[bool]:
        mine = self._made[rank] = self._made[rank]._replace(final=True, leaving=leaving)
        yield True
        self._came[mine.window, mine.numbers] = 1 + self._came.get((mine.window, mine.numbers), 0)
        yield from self._meet(("compared", mine.window))
        if self._came[mine.window, mine.numbers] < len(self.ranks):
            self.told = True
            yield from iter(lambda: False, True)
        self._made[rank] = mine._replace(window=mine.window + 1, final=False)
        yield True

    def _listen(self, rank: int) -> Iterator[None]:
        before = None
        while True:
            written = self._written
            yield
            mine = self._made[rank]
            yield
            found = judge(written, mine, before)
            if found == "apart":
                self.told = True
            elif found == "write":
                self._written = mine
            before = mine
            yield


MODULES = st.integers(0, 1)
EVERY = st.integers(1, 3)
SPEEDS = st.lists(st.sampled_from([1, 10, 100]), min_size=6, max_size=6)
SCHEDULE = st.tuples(st.integers(0, 10**6), SPEEDS)


WHERE = st.booleans().map(lambda here: (here,) * 3) | st.tuples(*[st.booleans()] * 3)


@given(
    st.lists(st.lists(st.tuples(MODULES, WHERE), max_size=3), max_size=4),
    st.integers(2, 3),
    EVERY,
    SCHEDULE,
)
def test_ranks_that_call_alike_are_left_alone(
    calls: list[list[tuple[int, tuple[bool, ...]]]],
    world: int,
    every: int,
    schedule: Schedule,
) -> None:
    """However fast each is, and however late anything is read; also where collectives differ."""
    programs = [
        [[(module, where[rank]) for module, where in step] for step in calls]
        for rank in range(world)
    ]
    ranks = World(programs, every)
    ranks.run(schedule)
    assert not ranks.told
    assert ranks.finished or any(program != programs[0] for program in programs)


@given(
    st.lists(
        st.lists(st.lists(st.tuples(MODULES, st.just(True)), max_size=3), max_size=4),
        min_size=2,
        max_size=3,
    ).filter(lambda programs: any(program != programs[0] for program in programs)),
    EVERY,
    SCHEDULE,
)
def test_ranks_that_differ_are_told(
    programs: list[Program], every: int, schedule: Schedule
) -> None:
    """With a collective in each call, where those who make more hang before they can compare."""
    ranks = World(programs, every)
    ranks.run(schedule)
    sums = {tuple(sum(map(len, p[: n * every])) for n in range(5)) for p in programs}
    modules = {
        tuple(sum(m for c in p[: n * every] for m, _ in c) for n in range(5)) for p in programs
    }
    same = len(sums) == len(modules) == len({len(p) for p in programs}) == 1
    assert ranks.told != same
