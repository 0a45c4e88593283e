"""A pytest plugin that guards what TRL's trainers train against; `trl_suite.py` puts it in.

Example: PYTHONPATH=benchmarks pytest -p trl_guard_plugin --trl-guard enforce --trl-results FILE ...

Every ``train`` of a trainer runs inside `guarded_trainer`, in the mode that is asked for. The file
gets a JSON line a test: its outcome, the first line of its error and whether that is the guard's,
and of every ``train`` what was guarded, the verdict and the losses that were logged.
"""

import functools
import inspect
import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from lensnet_guard.integrations.transformers import guarded_trainer

TIMES = re.compile(r"time|per_second|flos|tps")  # logged, and never the same twice


@dataclass
class Training:
    """One ``train`` of a trainer.

    Attributes:
        trainer: Its class.
        guarded: What was guarded: the attributes of the trainer that hold the modules.
        verdict: Of those modules, line by line; empty where nothing was.
        violations: How many, in observe mode.
        logged: Losses and metrics as the trainer logged them, without times.
    """

    trainer: str
    guarded: list[str] = field(default_factory=list)
    verdict: list[str] = field(default_factory=list)
    violations: int = 0
    logged: str = ""


@dataclass
class Test:
    """One test; its outcome is that of its set-up, its call and what follows, the worst of them."""

    name: str
    outcome: str = "passed"
    error: str = ""
    ours: bool = False
    seconds: float = 0.0
    trainings: list[Training] = field(default_factory=list)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("TRL under a guard")
    group.addoption("--trl-guard", choices=("none", "enforce", "observe"), default="none")
    group.addoption("--trl-results", type=Path, required=True)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(
        Session(config.getoption("--trl-guard"), config.getoption("--trl-results"))
    )


class Session:
    """Guards the trainers and writes what comes of it."""

    def __init__(self, mode: str, results: Path) -> None:
        self.mode = mode
        self.results = results
        self.tests: dict[str, Test] = {}
        self.running = Test("")
        self.depth = 0

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Leave what trains, and has not been run yet when the file holds results already."""
        done = set()
        if self.results.exists():
            done = {json.loads(line)["name"] for line in self.results.read_text().splitlines()}
        chosen = [item for item in items if item.nodeid not in done and trains(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen

    def pytest_collection_finish(self) -> None:
        """Wrap ``train`` of every trainer that the tests have imported, and train on the CPU."""
        from trl.trainer import base_config

        asked = base_config._BaseConfig.__post_init__

        def on_cpu(arguments: Any) -> None:
            arguments.use_cpu = True  # as TRL's own conftest does since 1.10
            asked(arguments)

        base_config._BaseConfig.__post_init__ = on_cpu
        for owner in every(Trainer):
            if "train" in vars(owner):
                owner.train = self.wrapped(owner.train)

    def wrapped(self, train: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(train)
        def guarded(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
            if self.depth:  # a trainer's own train calls that of its base
                return train(trainer, *args, **kwargs)
            training = Training(type(trainer).__name__)
            self.running.trainings.append(training)
            self.depth += 1
            try:
                with ExitStack() as stack:
                    callback = self.guard(trainer, stack) if self.mode != "none" else None
                    try:
                        return train(trainer, *args, **kwargs)
                    finally:
                        if callback is not None:
                            training.guarded = list(callback.guards)
                            training.verdict = str(callback.verdict).splitlines()
                            training.violations = sum(
                                guard.violation_count for guard in callback.guards.values()
                            )
            finally:
                self.depth -= 1
                training.logged = losses(trainer)

        return guarded

    def guard(self, trainer: Trainer, stack: ExitStack) -> Any:
        raise NotImplementedError

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Iterator[None]:
        report = yield
        test = self.tests.setdefault(item.nodeid, Test(item.nodeid))
        test.seconds += call.duration
        if report.failed or (report.skipped and test.outcome == "passed"):
            test.outcome = report.outcome
        if report.failed and call.excinfo is not None and not test.error:
            test.error = call.excinfo.exconly().partition("\n")[0]
            test.ours = is_ours(call.excinfo.value)
        return report

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.running = self.tests.setdefault(item.nodeid, Test(item.nodeid))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        with self.results.open("a") as file:
            file.write(json.dumps(asdict(self.tests[nodeid])) + "\n")


def trains(item: pytest.Item) -> bool:
    return ".train(" in inspect.getsource(item.function)


def every(owner: type) -> list[type]:
    """A class and all that derive from it."""
    found = {owner: None}
    for child in owner.__subclasses__():
        found.update(dict.fromkeys(every(child)))
    return list(found)


def is_ours(error: BaseException | None) -> bool:
    """Whether it was the guard that raised, or what the error came from."""
    while error is not None:
        if type(error).__module__.startswith("lensnet_guard"):
            return True
        error = error.__cause__ or error.__context__
    return False


def losses(trainer: Trainer) -> str:
    history = [
        {key: value for key, value in entry.items() if not TIMES.search(key)}
        for entry in trainer.state.log_history
    ]
    return json.dumps(history, default=str, sort_keys=True)
