"""Callers by name: who is on the stack, what a name means, and whether it has run."""

import contextlib
import functools
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from lensnet_guard import BudgetUnmet, CallPolicy, Scope, guard_module
from lensnet_guard.calls.callers import (
    Runs,
    check_caller_exists,
    derived_qualname,
    find_caller,
    qualname,
)

needs_co_qualname = pytest.mark.skipif(sys.version_info < (3, 11), reason="co_qualname is 3.11+")
needs_monitoring = pytest.mark.skipif(sys.version_info < (3, 12), reason="sys.monitoring is 3.12+")


def first_caller(frame, names):
    return find_caller(frame, names)[0]


def this_frame():
    return sys._getframe(1)


def plain():
    return this_frame()


def with_arguments(first, *rest, key=None, **more):
    return this_frame()


def decorated_by(wraps):
    def decorate(fn):
        @wraps(fn)
        def wrapper(*args, **kwargs):
            return fn(*args, **kwargs)

        return wrapper

    return decorate


class Owner:
    @staticmethod
    def static(first=None):
        return this_frame()

    def method(self):
        return this_frame()

    @classmethod
    def of_class(cls):
        return this_frame()

    @decorated_by(functools.wraps)
    def decorated(self):
        return this_frame()

    @decorated_by(functools.wraps)
    @decorated_by(functools.wraps)
    def twice_decorated(self):
        return this_frame()

    @torch.no_grad()
    def no_grad(self):
        return this_frame()

    @classmethod
    @decorated_by(functools.wraps)
    def decorated_class_method(cls):
        return this_frame()

    def with_captured_self(self):
        return this_frame(), lambda: self

    def overridden(self):
        return this_frame()

    class Inner:
        def method(self):
            return this_frame()


class Heir(Owner):
    def overridden(self):
        return super().overridden()


@needs_co_qualname
class TestDerivedQualname:
    @pytest.mark.parametrize(
        "frame",
        [
            plain(),
            with_arguments(1),
            with_arguments(Owner()),
            with_arguments(Owner),
            Owner().method(),
            Owner.of_class(),
            Owner().of_class(),
            Owner().decorated(),
            Owner().twice_decorated(),
            Owner().no_grad(),
            Owner.decorated_class_method(),
            Owner().with_captured_self()[0],
            Owner.Inner().method(),
            Heir().method(),
            Heir.of_class(),
            Heir().overridden(),
            Owner.static(),
            Owner().static(Owner()),
            Heir.static(),
        ],
        ids=lambda frame: frame.f_code.co_name,
    )
    def test_equals_co_qualname(self, frame):
        """For functions and methods of every sort Python 3.10 gets the name that 3.11 gives."""
        assert derived_qualname(frame) == frame.f_code.co_qualname == qualname(frame)

    def test_static_method_and_deleted_self(self):
        """Where nothing says whose they are, the plain name is given, and nothing fails."""

        class Local:
            @staticmethod
            def static(first=None):
                return this_frame()

            def forgetful(self):
                del self
                return this_frame()

        assert derived_qualname(Local.static()) == "static"
        assert derived_qualname(Local().forgetful()) == "forgetful"


class TestFindCaller:
    def test_first_match_from_the_inside(self):
        """Of two functions on the stack that are named, the inner one counts."""
        name = f"{__name__}:{qualname(sys._getframe())}"
        if sys.version_info < (3, 11):
            name = f"{__name__}:TestFindCaller.test_first_match_from_the_inside"

        def inside(*names):
            return first_caller(sys._getframe(), names)

        assert inside(name) == name
        assert inside("other:name") is None
        own = f"{__name__}:{inside.__qualname__}"
        if sys.version_info >= (3, 11):
            assert inside(name, own) == own

    def test_needs_the_module_too(self):
        """A function of the same name in another module does not match."""
        assert first_caller(plain(), {"elsewhere:plain"}) is None
        assert first_caller(plain(), {f"{__name__}:plain"}) == f"{__name__}:plain"

    def test_no_frame(self):
        """Without a frame there is no caller."""
        assert first_caller(None, {"m:f"}) is None

    def test_frame_without_a_module_name(self):
        """Code run by exec in bare globals belongs to no module, and matches nothing."""
        namespace = {"get": this_frame}
        exec("def f(): return get()\nframe = f()", namespace)
        assert first_caller(namespace["frame"], {"m:f", "builtins:f"}) is None


def undecorated_wrapper(fn):
    """A decorator that does not say what it wraps."""

    def wrapper(*args):
        return fn(*args)

    return wrapper


@undecorated_wrapper
def hidden():
    return this_frame()


@functools.lru_cache
def cached():
    return this_frame()


@contextlib.contextmanager
def managed():
    yield this_frame()


class Called:
    def __call__(self):
        return this_frame()


called = Called()


class TestCheckCallerExists:
    @pytest.mark.parametrize(
        "path",
        [
            *(
                "plain",
                "Owner.method",
                "Owner.of_class",
                "Owner.decorated",
                "Owner.twice_decorated",
            ),
            *("Owner.no_grad", "Owner.Inner.method", "Heir.overridden", "hidden", "cached"),
            *("managed", "called", "plain.<locals>.any"),
        ],
    )
    def test_what_can_be_on_a_stack(self, path):
        """Functions and methods, decorated in any way, and what nobody can tell, are let pass."""
        check_caller_exists(f"{__name__}:{path}")

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            (
                "plaim",
                "the caller '{m}:plaim' does not exist: module '{m}' has no attribute 'plaim'",
            ),
            (
                "Owner.methid",
                "the caller '{m}:Owner.methid' does not exist: type object 'Owner' has",
            ),
            (
                "Heir.method",
                "the caller '{m}:Heir.method' never runs by this name: it is defined as "
                "'{m}:Owner.method'. Name that",
            ),
            (
                "Owner",
                "the caller '{m}:Owner' is a class, and no function: name one of its methods, such "
                "as '{m}:Owner.__init__'",
            ),
            (
                "guard_module",
                "the caller '{m}:guard_module' never runs by this name: it is defined as "
                "'lensnet_guard.install:guard_module'. Name that",
            ),
        ],
    )
    @needs_co_qualname
    def test_what_never_is(self, path, message):
        """A misspelt, inherited or only re-exported name gives the right one, before any call."""
        expected = "^" + re.escape(message.format(m=__name__))
        with pytest.raises(ValueError, match=expected):
            check_caller_exists(f"{__name__}:{path}")
        policy = CallPolicy(sanctioned_callers={f"{__name__}:{path}": 1})
        with pytest.raises(ValueError, match=expected):
            guard_module(nn.Linear(1, 1), policy=policy)

    @pytest.mark.parametrize("name", ["builtins:print", "torch:add", "builtins:list.append"])
    def test_what_is_not_written_in_python(self, name):
        """It is on no stack, so nothing could ever reach the scope."""
        message = (
            f"the caller {name!r} is no function of Python, so it is never on a stack; name the "
            "one that calls it"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            check_caller_exists(name)

    def test_a_module_that_cannot_be_imported(self):
        """The message has what the import said."""
        with pytest.raises(ValueError, match=r"importing no_such_package\.x raised ModuleNot"):
            check_caller_exists("no_such_package.x:f")

    def test_a_lazy_face(self):
        """A name that a package gives out when asked is only re-exported too."""
        with pytest.raises(ValueError, match=r"is defined as 'lensnet_guard\.guard:Guard.count'"):
            check_caller_exists("lensnet_guard:Guard.count")

    @pytest.mark.parametrize("how", [["train.py"], ["-m", "train"]], ids=["script", "module"])
    def test_the_script_that_runs(self, tmp_path, how):
        """Its functions are on the stack as __main__'s, and the file would be imported anew."""
        (tmp_path / "train.py").write_text(
            "from lensnet_guard.calls.callers import check_caller_exists\n"
            "def step():\n"
            "    pass\n"
            "check_caller_exists('__main__:step')\n"
            "check_caller_exists('train:step')\n"
        )
        done = subprocess.run(
            [sys.executable, *how], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.stderr.splitlines()[-1] == (
            "ValueError: the caller 'train:step' never runs by this name: train is the script that "
            "runs, and on the stack it is '__main__:step'. Name that, or start the training from "
            "another file that imports it"
        )

    def test_a_script_that_has_no_file(self, tmp_path):
        """Code that comes by a pipe runs as a file that there is not."""
        (tmp_path / "scoring.py").write_text("def score():\n    pass\n")
        code = (
            "from lensnet_guard.calls.callers import check_caller_exists as check\n"
            "print(check('scoring:score').co_name)\n"
        )
        done = subprocess.run(
            [sys.executable, "-"],
            input=code,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout == "score\n", done.stderr

    def test_a_function_that_is_still_to_come(self, run_python):
        """A guard made at the top of a script may name a function that is defined further down."""
        done = run_python(
            """
            from torch import nn
            from lensnet_guard import CallPolicy, guard_module
            policy = CallPolicy(sanctioned_callers={"__main__:score": 1})
            guard = guard_module(nn.Identity(), policy=policy)
            def score():
                return guard.module(1)
            with guard.context("training"), guard.micro_step():
                score()
            print(guard.calls[0].scope)
            policy = CallPolicy(sanctioned_callers={"__main__:scroe": 1})
            guard = guard_module(nn.Identity(), policy=policy)
            with guard.context("training"), guard.micro_step():
                score()
            """
        )
        assert done.stdout == "__main__:score\n", done.stderr
        assert done.stderr.splitlines()[-1] == (
            "ValueError: the caller '__main__:scroe' does not exist: module '__main__' has no "
            "attribute 'scroe'. Name a function as its module defines it, 'module:Class.method'"
        )

    def test_a_module_that_is_being_imported(self, tmp_path, monkeypatch):
        """The same in a module."""
        (tmp_path / "early_guard.py").write_text(
            "from lensnet_guard.calls.callers import check_caller_exists\n"
            "found = check_caller_exists('early_guard:step', early=True)\n"
            "def step():\n"
            "    pass\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        import early_guard

        assert early_guard.found is None
        assert check_caller_exists("early_guard:step") is early_guard.step.__code__

    def test_off_asks_nothing(self):
        """A guard that is off checks no names either."""
        policy = CallPolicy(sanctioned_callers={"no_such:f": 1})
        assert guard_module(nn.Linear(1, 1), policy=policy, mode="off").mode == "off"


def score(module, x):
    return module(x)


def idle():
    """A caller that makes no call."""


class TestRuns:
    @needs_monitoring
    def test_counts(self):
        """Each run counts, in every thread, and runs of other functions do not."""
        runs = Runs([f"{__name__}:idle", f"{__name__}:score"])
        before = runs.counts()
        idle()
        thread = threading.Thread(target=idle)
        thread.start()
        thread.join()
        after = runs.counts()
        assert after[f"{__name__}:idle"] - before[f"{__name__}:idle"] == 2
        assert after[f"{__name__}:score"] == before[f"{__name__}:score"]

    @pytest.mark.parametrize("python", ["3.11", "no tool is free"])
    def test_where_nobody_tells(self, monkeypatch, python):
        """Then nothing is said of runs."""
        if python == "3.11":
            monkeypatch.delattr(sys, "monitoring", raising=False)
        else:
            busy = type("Monitoring", (), {"get_tool": staticmethod(lambda _: "another")})
            monkeypatch.setattr(sys, "monitoring", busy, raising=False)
            monkeypatch.setattr("lensnet_guard.calls.callers._tool", [])
        assert Runs([f"{__name__}:idle"]).counts() == {}

    def test_what_cannot_be_told_is_left_out(self):
        """A function that is made anew each time has no place."""
        runs = Runs([f"{__name__}:idle.<locals>.inner"])
        assert runs.counts() == {}
        assert runs.place(f"{__name__}:idle.<locals>.inner") == ""


class TestBudgetUnmetNamesTheCaller:
    @pytest.mark.parametrize("ran", [False, True])
    def test_and_whether_it_ran(self, monkeypatch, ran):
        """Not the line at which too few calls were noticed, but who should have made them."""
        monkeypatch.chdir(Path(__file__).parents[3])
        caller = f"{__name__}:idle"
        guard = guard_module(nn.Linear(2, 1), policy=CallPolicy({"kl": Scope(1, caller=caller)}))
        with guard.context("training"), pytest.raises(BudgetUnmet) as caught, guard.micro_step(3):
            for _ in range(2 * ran):
                idle()
        line = idle.__code__.co_firstlineno
        told = {True: ", which ran 2 times", False: ", which did not run"}
        assert str(caught.value).splitlines()[1] == (
            f"  due from     {caller} (tests/lensnet_guard/calls/test_callers.py:{line})"
            + (told[ran] if sys.version_info >= (3, 12) else "")
        )

    def test_with_a_state(self):
        """A scope of calls in a state says which."""

        def still(call):
            return None

        scope = Scope((1, 2), when=still)
        guard = guard_module(nn.Linear(2, 1), policy=CallPolicy({"kl": scope}))
        with guard.context("training"), pytest.raises(BudgetUnmet) as caught, guard.micro_step(3):
            pass
        assert str(caught.value).splitlines()[:2] == [
            "A micro-step ended before the call budget of Linear was met: kl made 0 of 1 to 2 "
            "calls.",
            "  due from     calls with TestBudgetUnmetNamesTheCaller.test_with_a_state.<locals>."
            "still",
        ]
