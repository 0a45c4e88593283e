"""A pytest plugin that runs TRL's tests with and without a guard; `trl_suite.py` puts it in.

Example: PYTHONPATH=benchmarks pytest -p trl_guard_plugin --trl-results FILE tests/...

Each test that trains is run three times in a row: as it is, and with each trainer's ``train``
inside ``guarded_trainer(trainer)``, in enforce and in observe mode. The guarded ones are left out
where nothing was trained that has a contract, or the test fails as it is. The file gets a JSON line
for each run: its outcome, the first line of its error and whether that is the guard's, and of each
``train`` what was guarded, the verdict and what was logged. Runs that it has already are not made
again. How many tests each file of tests has is written beside it, in ``selected.json``.
"""

import functools
import inspect
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, set_seed

from lensnet_guard.integrations import NoContract
from lensnet_guard.integrations.transformers import guarded_trainer

MODES = ("none", "enforce", "observe")
TIMES = re.compile(r"time|per_second|flos|^eps$")  # logged, and never the same twice


@dataclass
class Training:
    """One ``train`` of a trainer.

    Attributes:
        trainer: Its class.
        nothing: Why nothing was guarded; empty where something was, or would have been.
        guarded: What was, by the trainer's attributes that hold the modules.
        verdict: Of those modules, line by line.
        violations: How many there were.
        logged: Losses and metrics, as the trainer logged them, without times.
    """

    trainer: str
    nothing: str = ""
    guarded: list[str] = field(default_factory=list)
    verdict: list[str] = field(default_factory=list)
    violations: int = 0
    logged: str = ""


@dataclass
class Run:
    """A test in one mode; its outcome is the worst of set-up, call and what follows."""

    name: str
    mode: str
    outcome: str = "passed"
    error: str = ""
    ours: bool = False
    seconds: float = 0.0
    trainings: list[Training] = field(default_factory=list)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--trl-results", type=Path, required=True)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Session(config.getoption("--trl-results")))


@pytest.fixture(autouse=True)
def trl_guard(request: pytest.FixtureRequest) -> Any:
    """The mode, as a parameter of each test."""
    return request.param


@pytest.hookimpl(tryfirst=True)  # the mode is the first of a test's parameters
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("trl_guard", MODES, indirect=True)


class Session:
    """Chooses the tests, guards the trainers, and writes what comes of it."""

    def __init__(self, results: Path) -> None:
        self.results = results
        self.running = Run("", "none")
        self.written: set[tuple[str, str]] = set()
        self.alone: set[str] = set()  # tests with nothing to compare: no contract, or failing
        if results.exists():
            for line in results.read_text().splitlines():
                self.note(json.loads(line))

    def note(self, row: dict[str, Any]) -> None:
        self.written.add((row["name"], row["mode"]))
        nothing = all(one["nothing"] for one in row["trainings"])
        if row["mode"] == "none" and (nothing or row["outcome"] != "passed"):
            self.alone.add(row["name"])

    @pytest.hookimpl(trylast=True)  # after TRL's own markers have left out what is slow
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        training = [item for item in items if trains(item)]
        tests = {name_of(item)[0] for item in training}
        counts = Counter(name.partition("::")[0] for name in tests)
        self.results.with_name("selected.json").write_text(json.dumps(counts))
        chosen = [item for item in training if name_of(item) not in self.written]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = in_turns(chosen)

    def pytest_collection_finish(self) -> None:
        """Wrap ``train`` of every trainer that the tests have imported, and train on the CPU."""
        from trl.trainer.base_config import _BaseConfig

        asked = _BaseConfig.__post_init__

        def on_cpu(arguments: Any) -> None:
            arguments.use_cpu = True  # as TRL's own conftest does, after 1.9
            asked(arguments)

        _BaseConfig.__post_init__ = on_cpu
        for owner in every(Trainer):
            if "train" in vars(owner):
                owner.train = self.wrapped(owner.train)

    def wrapped(self, train: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(train)
        def recorded(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
            if getattr(trainer, "_trl_suite", False):  # some call train of the class below
                return train(trainer, *args, **kwargs)
            trainer._trl_suite = True
            training = Training(type(trainer).__name__)
            self.running.trainings.append(training)
            try:
                if self.running.mode != "none":
                    return guarded(trainer, training, self.running.mode, train, *args, **kwargs)
                try:
                    return train(trainer, *args, **kwargs)
                finally:
                    training.nothing = nothing_in(trainer)
            finally:
                trainer._trl_suite = False
                training.logged = logged_by(trainer)

        return recorded

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Begin each run from the same random numbers: some tests make a head anew, or draw."""
        set_seed(0)
        self.running = Run(*name_of(item))
        if self.running.mode != "none" and self.running.name in self.alone:
            pytest.skip("nothing to compare")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Iterator[None]:
        report = yield
        run = self.running
        run.seconds += call.duration
        if report.failed or (report.skipped and run.outcome == "passed"):
            run.outcome = report.outcome
        if report.failed and call.excinfo is not None and not run.error:
            run.error = call.excinfo.exconly().partition("\n")[0]
            run.ours = is_ours(call.excinfo.value)
        return report

    def pytest_runtest_logfinish(self) -> None:
        if self.running.mode == "none" or self.running.name not in self.alone:
            row = asdict(self.running)
            self.note(row)
            with self.results.open("a") as file:
                file.write(json.dumps(row) + "\n")


def guarded(
    trainer: Trainer,
    training: Training,
    mode: Any,
    train: Callable[..., Any],
    *args: Any,
    **kw: Any,
) -> Any:
    """Train under a guard, where there is a contract."""
    with ExitStack() as stack:
        try:
            callback = stack.enter_context(guarded_trainer(trainer, mode=mode))
        except NoContract as why:
            training.nothing = str(why).partition("\n")[0]
            return train(trainer, *args, **kw)
        training.guarded = list(callback.guards)
        try:
            return train(trainer, *args, **kw)
        finally:
            training.verdict = str(callback.verdict).splitlines()
            training.violations = sum(one.violation_count for one in callback.guards.values())


def nothing_in(trainer: Trainer) -> str:
    """Why there is nothing to guard; empty where there is, or where the guard itself fails."""
    try:
        with guarded_trainer(trainer, mode="off"):
            return ""
    except NoContract as why:
        return str(why).partition("\n")[0]
    except Exception:
        return ""


def trains(item: pytest.Item) -> bool:
    return ".train(" in inspect.getsource(item.function)


def name_of(item: pytest.Item) -> tuple[str, str]:
    """A test's name as TRL has it, and its mode."""
    mode = item.callspec.params["trl_guard"]
    function, _, parameters = item.nodeid.partition("[")
    own = parameters.removeprefix(mode).removeprefix("-")
    return function if own == "]" else f"{function}[{own}", mode


def in_turns(items: list[pytest.Item]) -> list[pytest.Item]:
    """All files take turns, each function's first parameters before its others.

    So a run that is stopped has seen every trainer, and as many of its settings as it could. The
    modes of a test stay together.
    """
    of_function: Counter[str] = Counter()
    of_file: Counter[tuple[int, str]] = Counter()
    turns: dict[str, tuple[int, int]] = {}
    for item in items:
        name, _ = name_of(item)
        if name not in turns:
            function = name.partition("[")[0]
            nth = of_function[function]
            of_function[function] += 1
            file = (nth, name.partition("::")[0])
            turns[name] = (nth, of_file[file])
            of_file[file] += 1
    return sorted(items, key=lambda item: turns[name_of(item)[0]])


def every(owner: type) -> list[type]:
    """A class and all that derive from it."""
    found = {owner: None}
    for child in owner.__subclasses__():
        found.update(dict.fromkeys(every(child)))
    return list(found)


def is_ours(error: BaseException | None) -> bool:
    """Whether it was the guard that raised, or raised what the error came from."""
    while error is not None:
        if type(error).__module__.startswith("lensnet_guard"):
            return True
        error = error.__cause__ or error.__context__
    return False


def logged_by(trainer: Trainer) -> str:
    history = [
        {key: value for key, value in entry.items() if not TIMES.search(key)}
        for entry in trainer.state.log_history
    ]
    return json.dumps(history, default=str, sort_keys=True)
