"""The guard under fault: random sequences of blocks, calls and failures, against a plain model.

The model is written from the decision table and the docstrings, and shares no code with the guard.
What it says must hold after every step, whatever was closed out of order, dropped, thrown,
swallowed or interrupted before.
"""

import gc
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run
from torch import nn

from lensnet_guard import CallPolicy, LensNetViolation, Scope, guard_module

X = torch.ones(1, 3)


# The model -----------------------------------------------------------------------------------


@dataclass(eq=False)
class Refusal:
    """A violation that the model expects; ``error`` is the guard's own once it was raised."""

    reason: str
    context: str | None
    error: Exception | None = None


@dataclass(frozen=True)
class Budget:
    """How many calls of a scope are due, and in which window."""

    least: int
    most: int | None
    per: str = "micro_step"

    def scope(self):
        """As a policy is told."""
        return Scope((self.least, self.most), per=self.per)


@dataclass(eq=False)
class Step:
    """A micro-step or another window: what is due at its end, what was spent and refused in it."""

    due: dict[str, Budget]
    context: str | None
    name: str = "micro_step"
    spent: Counter[str] = field(default_factory=Counter)
    refusals: list[Refusal] = field(default_factory=list)
    noted_by: "Step | None" = None  # where it is noted that too few calls were made
    ledger: Any = None  # the guard's own


@dataclass(eq=False)
class Block:
    """An open block.

    ``step`` takes note of what is refused in it, and ``owns`` is the window that ends with it.
    """

    stands_in: str | None
    context: str | None = None
    step: Step | None = None
    scope: str | None = None
    within: Step | None = None  # the micro-step that the scope was opened in
    owns: Step | None = None
    gives: Step | None = None  # what the block is ``as``


class Model:
    """Where a guard must be. Outcomes are what must be raised: None, a Refusal or an exception."""

    def __init__(self, budgets, enforce):
        self.budgets = budgets
        self.enforce = enforce
        self.open_blocks = []
        self.counts = Counter()
        self.refusals = []
        self.unseen = []
        self.runs = 0

    def where(self):
        """Context, micro-step and scope: the sum of the open blocks, outermost first.

        Inner blocks win; a new micro-step has no scope yet. A micro-step counts in the context that
        it was opened in and in no other, and so does a scope, and only with its micro-step.
        """
        context = step = scope = None
        for block in self.open_blocks:
            if block.context is not None:
                context = block.context
            if block.owns and block.owns.name == "micro_step":
                step, scope = block.owns, None
            if block.scope is not None:
                scope = block
        if step is not None and step.context != context:
            step = None
        if scope is None or scope.stands_in != context or scope.within is not step:
            return context, step, None
        return context, step, scope.scope

    def window(self, name=None):
        """The innermost open window of that name, or of any; micro-steps are looked up by where."""
        for block in reversed(self.open_blocks):
            if block.owns and block.owns.name != "micro_step" and name in (None, block.owns.name):
                return block.owns
        return None

    def noting(self):
        """What takes note of a refusal."""
        return self.where()[1] or self.window()

    def due(self, name, context):
        """The budgets of a window that is opened in a context."""
        if context == "inference" or (context is None and name == "micro_step"):
            return {}
        return {scope: due for scope, due in self.budgets.items() if due.per == name}

    def refuse(self, reason, context, step, background=False):
        """Book a violation; only in enforce mode it is raised."""
        refusal = Refusal(reason, context)
        self.refusals.append(refusal)
        if step is not None:
            step.refusals.append(refusal)
        elif background and self.enforce:
            self.unseen.append(refusal)
        return refusal if self.enforce else None

    def open(self, kind, word):
        """The new block, or None and what its opening must raise."""
        context, step, _ = self.where()
        noting = self.noting()
        reasons = []
        if kind == "context":
            block = Block(context, context=word)
            steps = [b.owns for b in self.open_blocks if b.owns and b.owns.name == "micro_step"]
            if word == "inference" and any(s.context == "training" for s in steps):
                reasons.append("ContextSwitchRefused")
        elif context is None and kind != "window":
            reasons.append("NoContext")
        if kind in ("micro_step", "window"):
            name = word if kind == "window" else kind
            own = Step(self.due(name, context), context, name)
            block = Block(context, step=own, owns=own, gives=own)
            if (step if kind == "micro_step" else self.window(name)) is not None:
                reasons.append("ContextSwitchRefused")
        elif kind == "sanctioned":
            per = self.budgets[word].per
            window = step if per == "micro_step" else self.window(per)
            block = Block(context, step=noting, scope=word, within=step, gives=window)
            if window is None and per == "micro_step":  # it is one of its own
                due = {s: d for s, d in self.due(per, context).items() if s == word}
                own = block.step = block.within = block.owns = block.gives = Step(due, context)
            elif window is None:
                block.gives = Step({}, context, per)
                if context == "training":
                    reasons.append("UnsanctionedCall")
        for reason in reasons:
            if refusal := self.refuse(reason, context, noting):
                return None, refusal
        self.open_blocks.append(block)
        if block.owns:
            block.owns.noted_by = self.noting()
        return block, None

    def close(self, block, error):
        """What the end of a block must raise; ``error`` is what its body raised, if anything."""
        self.open_blocks.remove(block)
        step, own = block.step, block.owns
        if error is not None:
            return error
        if self.enforce and step and step.refusals:  # the body has swallowed them
            return step.refusals[0]
        if own and own.name == "micro_step" and self.unseen:
            first = self.unseen[0]
            self.unseen.clear()
            return first
        if own and any(own.spent[scope] < due.least for scope, due in own.due.items()):
            return self.refuse("BudgetUnmet", block.stands_in, own.noted_by)
        return None

    def call(self, reason=None, forward=lambda: None, *, background=False, breach=False):
        """What a call must raise.

        Args:
            reason: why it is refused wherever it is made.
            forward: what the module does; it gives back what it raises.
            background: whether it is made in another thread.
            breach: whether it is made in a state that the contract does not allow.
        """
        context, step, scope = self.where()
        budget = self.budgets[scope] if scope else None
        window = None
        if budget is not None:
            other = self.window(budget.per) if context == "training" else None
            window = step if budget.per == "micro_step" else other
        if reason is None and context is None:
            reason = "NoContext"
        elif reason is None and context == "training":
            if window is None:
                reason = "UnsanctionedCall"
            elif budget.most is not None and window.spent[scope] >= budget.most:
                reason = "BudgetExceeded"
            elif breach:
                reason = "ConditionUnmet"
        if reason is None:
            self.counts[context, scope] += 1
            if window is not None:
                window.spent[scope] += 1
        elif refusal := self.refuse(reason, context, self.noting(), background):
            return refusal
        elif reason == "ConditionUnmet":  # it runs, and is one of those that were due
            window.spent[scope] += 1
        self.runs += 1
        return forward()


# What is driven ------------------------------------------------------------------------------


class Lens(nn.Module):
    """A module that counts its forwards and calls ``within`` in the next one only."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.runs = 0
        self.within = None
        self.wrong = None  # what a condition finds

    def forward(self, x):
        self.runs += 1
        within, self.within = self.within, None
        if within is not None:
            within()
        return self.linear(x)


def generator(guard, blocks, itself):
    """Opens a block at each advance and ends them all at the last one.

    ``itself`` is a list that holds the generator: a circle, which only gc can break.
    """
    (kind, word), *rest = blocks
    with getattr(guard, kind)(word) as ledger:
        yield ledger
        if rest:
            yield from generator(guard, rest, itself)


class ByHand:
    """One block that is entered and left by hand, with the face of a generator."""

    def __init__(self, guard, blocks):
        ((kind, word),) = blocks
        self.manager = getattr(guard, kind)(word)
        self.entered = False

    def __next__(self):
        if not self.entered:
            self.entered = True
            return self.manager.__enter__()
        assert not self.manager.__exit__(None, None, None)
        raise StopIteration

    def throw(self, error):
        assert not self.manager.__exit__(type(error), error, error.__traceback__)
        raise error

    def close(self):
        self.manager = None


@dataclass(eq=False)
class Holder:
    """A `generator` or a `ByHand`, the blocks that it has yet to open and those it holds open."""

    body: Any
    waiting: list[tuple[str, Any]]
    blocks: list[Block] = field(default_factory=list)


def in_thread(act):
    """Act in a fresh thread, where nothing is open; raise what it raised."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(act).result(timeout=30)


def in_order(call):
    """The condition of the contract."""
    return call.module.wrong


SCOPES = [("sanctioned", 0), ("sanctioned", 1), ("sanctioned", 2)]
CONTEXTS = [("context", "training"), ("context", "inference")]
WINDOWS = [("window", 0), ("window", 1)]
BLOCK = st.sampled_from([*SCOPES, ("micro_step", 7), *CONTEXTS, *WINDOWS])
BLOCKS = st.one_of(st.lists(BLOCK, min_size=1, max_size=n) for n in (1, 4))
ABNORMALLY = ["throw", "throw a violation", "close", "drop"]
ERROR = st.sampled_from([RuntimeError, KeyboardInterrupt])
RARELY = st.sampled_from([False] * 5 + [True])
WHICH = st.sampled_from([0] * 5 + [1, 2, 3])  # most often the newest
anything_open = precondition(lambda self: self.model.open_blocks)
anything_held = precondition(lambda self: self.holders)


class GuardMachine(RuleBasedStateMachine):
    """Does everything to a guard and to its model; ``seen`` collects what came of it."""

    def __init__(self, mode, budgets, seen):
        super().__init__()
        self.lens = Lens()
        scopes = {name: budget.scope() for name, budget in budgets.items()}
        policy = CallPolicy(scopes, requires=(in_order,))
        self.guard = guard_module(self.lens, policy=policy, mode=mode)
        self.model = Model(budgets, enforce=mode == "enforce")
        self.scopes = list(budgets)
        self.holders = []
        self.seen = seen

    # What must hold ----------------------------------------------------------------------------

    @invariant()
    def the_guard_is_where_the_model_says(self):
        context, step, scope = self.model.where()
        here = self.guard._admission.open.position()
        assert self.guard.current_context == here.context == context
        assert here.micro_step is (step and step.ledger)
        assert here.scope == scope
        assert self.guard._admission.inside.here is False

    @invariant()
    def the_books_are_those_of_the_model(self):
        assert self.lens.runs == self.model.runs
        for context in (None, "training", "inference"):
            for scope in (None, *self.scopes):
                made = self.model.counts.items()
                due = [n for (c, s), n in made if context in (None, c) and scope in (None, s)]
                assert self.guard.count(context, scope) == sum(due)
        assert self.guard.violation_count == len(self.model.refusals)
        refusals = [(refusal.reason, refusal.context) for refusal in self.model.refusals]
        assert [(r.reason, r.context) for r in self.guard.violations] == refusals
        for step in (block.owns for block in self.model.open_blocks if block.owns):
            assert step.ledger.calls == {**dict.fromkeys(step.due, 0), **step.spent}
            assert len(step.ledger.violations) == len(step.refusals)

    def expect(self, outcome, act, elsewhere=False):
        """Act, and compare what is raised: a violation by class at first, then by its record."""
        caught = None
        try:
            in_thread(act) if elsewhere else act()
        except BaseException as error:
            caught = error
        if isinstance(outcome, Refusal):
            if outcome.error is not None:
                self.seen.add("raised again")
            elif type(caught).__name__ == outcome.reason:
                outcome.error = caught
            outcome = outcome.error or outcome.reason
        # By identity too, but for one that comes out of a block which outlives its micro-step.
        again = isinstance(outcome, LensNetViolation) and type(caught) is type(outcome)
        if caught is not outcome and not (again and caught.record is outcome.record):
            raise AssertionError(f"expected {outcome!r}, not {caught!r}") from caught
        if caught is not None:
            caught.__traceback__ = None  # its frames would hold what a later step drops

    # Blocks ------------------------------------------------------------------------------------

    def advance(self, holder, elsewhere=False):
        """Let a holder open its next block, or end all that it has open."""
        ledgers = []
        if not holder.waiting:
            self.expect(self.ended(holder), lambda: next(holder.body, None), elsewhere)
            return
        block, outcome = self.model.open(*holder.waiting.pop(0))
        if block is None:
            outcome = self.ended(holder, outcome)
        self.expect(outcome, lambda: ledgers.append(next(holder.body)))
        if block is not None:
            holder.blocks.append(block)
            if block.gives and block.gives.ledger is None:
                (block.gives.ledger,) = ledgers
            assert ledgers == [block.gives and block.gives.ledger]

    def ended(self, holder, error=None):
        """What comes out of a holder that ends, where ``error`` is raised inside it."""
        self.holders.remove(holder)
        while holder.blocks:
            error = self.model.close(holder.blocks.pop(), error)
        return error

    def start(self, blocks, make):
        """Make a holder and let it open its first block."""
        scopes = [*self.scopes, *self.scopes, *self.scopes]  # policies have one to three
        windows = ["step", *sorted(self.guard.policy.windows - {"step"})]
        words = {"sanctioned": scopes, "window": [*windows, *windows]}
        blocks = [(kind, words[kind][w] if kind in words else w) for kind, w in blocks]
        holder = Holder(make(self.guard, blocks), list(blocks))
        self.holders.append(holder)
        self.advance(holder)
        return holder

    @rule(blocks=BLOCKS, rash=RARELY, inference=RARELY)
    def open(self, blocks, rash, inference):
        """One block by hand or a generator of several, in a context if this is not ``rash``."""
        if self.model.where()[0] is None and not rash:
            self.start([("context", "inference" if inference else "training")], ByHand)
        if len(blocks) == 1:
            self.start(blocks, ByHand)
            return
        itself = []
        self.start(blocks, lambda *args: itself.append(generator(*args, itself)) or itself[0])

    @anything_held
    @rule(which=WHICH, elsewhere=RARELY)
    def go_on(self, which, elsewhere):
        """The newest holder, or one further out while the inner ones stay open."""
        self.advance(self.holders[-1 - which % len(self.holders)], elsewhere)

    @anything_held
    @rule(which=WHICH, how=st.sampled_from(ABNORMALLY), make=ERROR, elsewhere=RARELY)
    def end_abnormally(self, which, how, make, elsewhere):
        """Nothing is due then, and nothing that was swallowed is raised again."""
        holder = self.holders[-1 - which % len(self.holders)]
        raised = [refusal.error for refusal in self.model.refusals if refusal.error]
        if how == "throw":
            self.throw(holder, make("mine"), elsewhere)
        elif how == "throw a violation" and raised:  # the body did not swallow it
            self.throw(holder, raised[-1], elsewhere)
        elif how == "close":
            self.ended(holder, GeneratorExit())
            self.expect(None, holder.body.close, elsewhere)
        else:
            self.ended(holder, GeneratorExit())
            del holder
            gc.collect()

    def throw(self, holder, error, elsewhere=False):
        steps = [block.step for block in holder.blocks if block.step]
        swallowed = self.model.enforce and any(step.refusals for step in steps)
        self.expect(self.ended(holder, error), lambda: holder.body.throw(error), elsewhere)
        if sys.version_info >= (3, 11) and not isinstance(error, LensNetViolation):
            assert hasattr(error, "__notes__") == swallowed  # of what was swallowed before it

    # Calls -------------------------------------------------------------------------------------

    @anything_open
    @rule(through=st.sampled_from(["__call__", "forward", "carry"]))
    def call(self, through):
        """What is refused here is swallowed."""
        before, module = self.lens.runs, self.guard.module
        carried = through == "carry"
        act = self.guard.carry(module) if carried else getattr(module, through)
        self.expect(self.model.call(background=carried), lambda: act(X), elsewhere=carried)
        self.seen.add("ran" if self.lens.runs > before else "kept out")

    @precondition(lambda self: self.model.where()[2])
    @rule()
    def call_in_the_wrong_state(self):
        """It spends nothing."""
        self.lens.wrong = "out of order"
        self.expect(self.model.call(breach=True), lambda: self.guard.module(X))
        self.lens.wrong = None

    @precondition(lambda self: self.model.where()[0] == "training")
    @rule(missing=RARELY)
    def spend_the_budgets(self, missing):
        """What a good trainer does, or nearly."""
        for number, scope in enumerate(self.scopes):
            budget, (_, step, _) = self.model.budgets[scope], self.model.where()
            window = step if budget.per == "micro_step" else self.model.window(budget.per)
            if window is None and budget.per != "micro_step":
                continue
            left = budget.least - (window.spent[scope] if window else 0)
            holder = self.start([("sanctioned", number)], ByHand)
            for _ in range(left - missing):
                self.expect(self.model.call(), lambda: self.guard.module(X))
            self.advance(holder)

    @anything_open
    @rule(behind=RARELY, meanwhile=st.booleans())
    def call_from_a_fresh_thread(self, behind, meanwhile):
        """It has declared nothing and is inside no call, even while the module runs here."""
        module = self.lens if behind else self.guard.module
        outcomes = []

        def modelled():
            fresh = Model(self.model.budgets, self.model.enforce)
            reason = "BypassedGuard" if behind else None
            outcomes.append(fresh.call(reason, background=True))
            self.model.refusals += fresh.refusals
            self.model.unseen += fresh.unseen
            self.model.runs += fresh.runs

        def within():
            self.expect(outcomes[0], lambda: module(X), elsewhere=True)

        if meanwhile:
            self.lens.within = within
            self.expect(self.model.call(forward=modelled), lambda: self.guard.module(X))
            self.lens.within = None
        else:
            modelled()
            within()

    @anything_open
    @rule(make=ERROR)
    def call_a_module_that_raises(self, make):
        """Its call counts all the same, and its end is the end of being inside it."""
        error = make("from forward")

        def within():
            self.seen.add(f"forward raised {make.__name__}")
            raise error

        self.lens.within = within
        self.expect(self.model.call(forward=lambda: error), lambda: self.guard.module(X))
        self.lens.within = None

    @anything_open
    @rule(swallow=st.booleans())
    def call_a_module_that_calls_itself(self, swallow):
        """The inner call is refused, also when the outer one was refused and only observed."""
        inner = []

        def modelled():
            inner.append(self.model.call("ReentrantCall"))
            return None if swallow else inner[0]

        def within():
            self.expect(inner[0], lambda: self.guard.module(X))
            if inner[0] and not swallow:
                raise inner[0].error

        self.lens.within = within
        self.expect(self.model.call(forward=modelled), lambda: self.guard.module(X))
        self.lens.within = None

    @anything_open
    @rule(part=st.booleans())
    def call_behind_its_back(self, part):
        """The raw module or a part of it: refused wherever it is."""
        outcome = self.model.call("BypassedGuard")
        if part and not self.model.enforce:
            self.model.runs -= 1  # the part runs, the module does not
        self.expect(outcome, lambda: (self.lens.linear if part else self.lens)(X))

    # The end -----------------------------------------------------------------------------------

    def teardown(self):
        """End what is left, newest and oldest in turn: nothing stays behind, here or elsewhere."""
        while self.holders:
            self.throw(self.holders[-(len(self.holders) % 2)], RuntimeError("the end"))
        self.the_guard_is_where_the_model_says()
        self.the_books_are_those_of_the_model()
        assert self.guard._admission.open.position().blocks == ()
        assert in_thread(lambda: self.guard.current_context) is None
        self.seen.update(refusal.reason for refusal in self.model.refusals)


SETTINGS = settings(max_examples=150, stateful_step_count=30, deadline=None, derandomize=True)
REASONS = ["NoContext", "UnsanctionedCall", "BudgetExceeded", "BudgetUnmet"]
REASONS += ["ContextSwitchRefused", "ReentrantCall", "BypassedGuard", "ConditionUnmet"]
EVERYTHING = {*REASONS, "ran", "forward raised RuntimeError", "forward raised KeyboardInterrupt"}


CONTRACTS = [
    {"preference_scorer": Budget(1, 1)},
    {"score": Budget(2, 2), "rank": Budget(1, 1)},
    {"kl": Budget(1, 2), "reference": Budget(1, 3, "rollout"), "ema": Budget(1, None, "step")},
]


@pytest.mark.parametrize("budgets", CONTRACTS, ids=["one", "two", "windows"])
@pytest.mark.parametrize("mode", ["enforce", "observe"])
def test_any_sequence(mode, budgets):
    """After any sequence the guard is where the model says, and nothing is left of it."""
    seen = set()
    gc.freeze()  # so that collecting a dropped generator does not search all of torch
    try:
        run(lambda: GuardMachine(mode, budgets, seen), settings=SETTINGS)
    finally:
        gc.unfreeze()
    # The sequences are no good if they do not get anywhere.
    assert seen == (EVERYTHING | {"kept out", "raised again"} if mode == "enforce" else EVERYTHING)
