"""The catalogue: what an entry has, that each message leads to one, and what names it.

That its programs run, and print what it shows, is looked at by ``tests/test_docs.py``.
"""

import functools
import pickle
import re
import warnings
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from tests.doc_blocks import blocks_of, check_printed
from tests.lensnet_guard.calls.asked import call, guarded
from torch import nn

from lensnet_guard import (
    BudgetExceeded,
    BudgetUnmet,
    CallPolicy,
    ConditionUnmet,
    LensNetHazard,
    Scope,
    UnsanctionedCall,
    active_adapter,
    adapters_off,
    adapters_on,
    autocast,
    detached,
    eval_mode,
    finite,
    frozen,
    frozen_base,
    guard_module,
    inference_too,
    no_grad,
    same_inputs,
)
from lensnet_guard.boundary.claims import CALLED_TWICE
from lensnet_guard.calls.errors import MISTAKES, VIOLATIONS, mistake_for
from lensnet_guard.calls.scope import mistake_of
from lensnet_guard.integrations import GuardLost
from lensnet_guard.mistakes import near, read_mistakes

DOCS = Path(__file__).parents[2] / "docs"
ENTRIES = read_mistakes()
# As issues have them: project and number.
REPORT = r"[\w.-]+/[\w.-]+ \d+"
CONDITIONS = {
    "no_grad": (no_grad, "reference-with-gradients"),
    "detached": (detached, "reference-with-gradients"),
    "eval_mode": (eval_mode, "reference-in-train-mode"),
    "adapters_off": (adapters_off, "reference-with-adapters"),
    "adapters_on": (adapters_on, "reference-with-adapters"),
    "active_adapter": (active_adapter("ref"), "reference-with-adapters"),
    "autocast": (autocast(None), "reference-out-of-autocast"),
    "finite": (finite, "reference-out-of-autocast"),
    "frozen": (frozen, "moved-weights"),
    "frozen_base": (frozen_base, "moved-weights"),
    "same_inputs": (same_inputs(nn.Linear(1, 1), "input"), "another-batch"),
}
UNTOLD = {"moving-batch-norm", "teacher-is-student", "recompute-counted"}  # each says why


def told_by():
    """For each entry what leads to it, by the code: classes, and conditions of ours."""
    told = defaultdict(set)
    for (reason, _), name in MISTAKES.items():
        told[name].add(reason)
    for condition, (_, name) in CONDITIONS.items():
        told[name] |= {"ConditionUnmet", condition}
    told[CALLED_TWICE].add("UnsanctionedCall")
    told[GuardLost.mistake].add("GuardLost")
    told["overwritten-graph-outputs"].add("LensNetHazard")
    return told


class TestEntries:
    def test_every_class_of_mistakes_has_one(self):
        """In the order of the page."""
        assert list(ENTRIES) == [
            *("reference-with-gradients", "reference-in-train-mode", "reference-with-adapters"),
            *("reference-out-of-autocast", "moved-weights", "moving-batch-norm"),
            *("teacher-is-student", "ema-never", "ema-every-micro-step", "another-batch"),
            *("bypassed-wrapper", "unequal-ranks", "called-twice", "called-conditionally"),
            *("called-from-elsewhere", "recompute-counted", "overwritten-graph-outputs"),
        ]

    @pytest.mark.parametrize("name", ENTRIES)
    def test_its_parts(self, name):
        """A sentence, a symptom, a line of policy, three public reports, before and after."""
        about, text = ENTRIES[name].about, ENTRIES[name].text
        assert re.fullmatch(r"[A-Z][^.]+\.", about)
        labels = re.findall(r"^\*\*(.+?)\*\*|^(Before|After):$", text, flags=re.MULTILINE)
        parts = ["Symptom.", "Policy.", "Told by", "Seen in", "Before", "After"]
        assert [one or other for one, other in labels] == parts
        (reports,) = re.findall(r"^\*\*Seen in\*\* (.+)\.$", text, flags=re.MULTILINE)
        assert re.fullmatch(rf"{REPORT}, {REPORT}, {REPORT}", reports)
        before, after = text.partition("\nAfter:\n")[0::2]
        assert re.findall(r"^```(\w+)", before, flags=re.MULTILINE)[0] == "python"
        assert re.findall(r"^```(\w+)", after, flags=re.MULTILINE)[0] == "python"

    @pytest.mark.parametrize("name", ENTRIES)
    def test_the_guard_names_it(self, name):
        """What `after` prints ends with the entry that it leads to, where there is a message."""
        last = ENTRIES[name].text.rstrip("`…\n").rpartition("\n")[2]
        named = re.findall(r"^  explained by lensnet-guard explain (\S+)$", last)
        others = {"recompute-counted": []} | {
            name: ["moved-weights"] for name in ("moving-batch-norm", "teacher-is-student")
        }
        assert named == others.get(name, [name])

    def test_nothing_of_the_page_is_left_in_them(self):
        """Such as the reason why a block is not run."""
        assert not any("<!--" in entry.text for entry in ENTRIES.values())

    @pytest.mark.parametrize(
        ("word", "names"),
        [
            ("called-twise", ["called-twice"]),
            ("Moved-Weights", ["moved-weights"]),
            ("ReentrantCall", ["called-twice"]),
            ("reentrantcall", ["called-twice"]),
            ("zzz", []),
        ],
    )
    def test_near(self, word, names):
        """Names that are alike; else entries in which the word is, as the class of an error."""
        assert near(word, ENTRIES) == names


class TestMapping:
    def test_every_violation_has_an_entry(self):
        """Which exists; but for breached conditions, which say themselves what explains them."""
        reasons = {reason for reason, _ in MISTAKES}
        assert reasons == {*VIOLATIONS} - {"ConditionUnmet"}
        assert {*MISTAKES.values()} <= {*ENTRIES}
        assert all(mistake_for(reason) is not None for reason in reasons)
        assert mistake_for("ConditionUnmet") is None

    @pytest.mark.parametrize("name", CONDITIONS)
    def test_every_condition_of_ours_has_an_entry(self, name):
        """Also as it is asked in inference."""
        condition, mistake = CONDITIONS[name]
        assert mistake in ENTRIES
        assert mistake_of(condition) == mistake
        assert [mistake_of(one) for one in inference_too(condition)] == [mistake]

    def test_those_are_all_conditions_of_ours(self):
        """As the page of conditions lists them, and a fingerprint is no other mistake."""
        page = (DOCS / "conditions.md").read_text()
        listed = re.findall(
            r"^\| `(\w+)(?:\(.*?\))?`", page.partition("## Frozen")[0], re.MULTILINE
        )
        assert {*listed} == {*CONDITIONS}
        assert mistake_of(frozen(fingerprint=True)) == "moved-weights"

    @pytest.mark.parametrize("name", ENTRIES)
    def test_the_page_says_what_leads_to_an_entry(self, name):
        """Classes and conditions as in the code, no more and no less; or why none does."""
        said = ENTRIES[name].text.partition("**Told by** ")[2].partition("\n\n")[0]
        if name in UNTOLD:
            assert said.startswith("no message")
            assert name not in told_by()
            return
        known = {*VIOLATIONS, *CONDITIONS, "GuardLost", "LensNetHazard"}
        assert {*re.findall(r"`(\w+)", said)} & known == told_by()[name]


class TestMessages:
    @pytest.mark.parametrize(
        ("per", "made", "error", "mistake"),
        [
            ("step", 0, BudgetUnmet, "ema-never"),
            ("step", 2, BudgetExceeded, "ema-every-micro-step"),
            ("rollout", 0, BudgetUnmet, "called-conditionally"),
            ("rollout", 2, BudgetExceeded, "called-twice"),
            ("micro_step", 0, BudgetUnmet, "called-conditionally"),
            ("micro_step", 2, BudgetExceeded, "called-twice"),
        ],
    )
    def test_of_budgets(self, scorer, x, per, made, error, mistake):
        """What is due once in an optimizer step is mostly an average of weights."""
        guard = guard_module(scorer, policy=CallPolicy({"ema": Scope(1, per=per)}))
        with guard.context("training"), pytest.raises(error) as caught:
            window = guard.micro_step() if per == "micro_step" else guard.window(per)
            with window, guard.sanctioned("ema"):
                for _ in range(made):
                    guard.module(x)
        last = str(caught.value).splitlines()[-1]
        assert last == f"  explained by lensnet-guard explain {mistake}"
        assert caught.value.mistake == mistake

    def test_of_a_result(self, scorer, x):
        """What a call returned is a condition's to explain, too."""
        with pytest.raises(ConditionUnmet) as caught:
            call(guarded(scorer, ensures=(detached,)), x)
        assert str(caught.value).endswith("lensnet-guard explain reference-with-gradients")

    @pytest.mark.parametrize("named", ["another-batch", None, 7])
    @pytest.mark.parametrize("wrap", [lambda fn: fn, functools.partial], ids=["plain", "wrapped"])
    def test_of_a_users_own_condition(self, scorer, x, named, wrap):
        """They end with an entry where it names one."""

        def whole_batches(call):
            return f"a batch of {len(call.argument('x'))} rows is no multiple of 8"

        whole_batches.mistake = named
        condition = functools.update_wrapper(wrap(whole_batches), whole_batches)
        with pytest.raises(ConditionUnmet) as caught:
            call(guarded(scorer, condition), x)
        explained = named if isinstance(named, str) else None
        assert caught.value.mistake == explained
        assert ("explained by" in str(caught.value)) == (explained is not None)

    def test_a_condition_of_the_name_of_ours_is_not_ours(self, scorer, x):
        """It explains itself, or nothing does."""

        def frozen(call):
            return "cold"

        with pytest.raises(ConditionUnmet) as caught:
            call(guarded(scorer, frozen), x)
        assert caught.value.mistake is None
        assert str(caught.value).splitlines()[-1].startswith("  what to do   ")

    def test_pickles_and_those_of_before(self, guard, x):
        """The name comes along; an error of before there were entries has none."""
        with guard.context("training"), pytest.raises(UnsanctionedCall) as caught:
            guard.module(x)
        assert pickle.loads(pickle.dumps(caught.value)).mistake == "called-from-elsewhere"
        before = pickle.loads((Path(__file__).parent / "before" / "values.pkl").read_bytes())
        assert before["violation"].mistake is None


class TestGraphs:
    """The one entry whose programs the page does not run, for they need a GPU."""

    def blocks(self):
        blocks = [b for b in blocks_of(DOCS / "mistakes.md") if b.not_run]
        assert [block.language for block in blocks] == ["python", "text"] * 2
        return blocks

    def test_after(self, graphed_guard, capsys):
        """With a backend that writes to one buffer: warned of, by both lines, before it happens."""
        *_, after, printed = self.blocks()
        graphed_guard.uninstall()
        module = graphed_guard.module.__wrapped__
        with warnings.catch_warnings():
            exec(after.text, {"module": module, "x": torch.ones(2, 3), "torch": torch})
        check_printed(printed.text, capsys.readouterr().out)

    @pytest.mark.gpu
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler, on import
    def test_on_cuda(self, capsys):
        """Torch says nothing while it replays a graph, and the first result is the second."""
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        before, silent, after, named = self.blocks()
        namespace = {}
        for block, printed in ((before, silent), (after, named)):
            with warnings.catch_warnings():
                exec(block.text, namespace)
            check_printed(printed.text, capsys.readouterr().out)
        assert issubclass(LensNetHazard, UserWarning)
