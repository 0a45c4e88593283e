"""What the pytest plugin does around every test: settings, counts, logs, and the summary line."""

import inspect
import os
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any, get_args

import pytest

from lensnet_guard import _schema
from lensnet_guard._text import count
from lensnet_guard.calls.policy import Mode
from lensnet_guard.logs.sinks import Sink, add_to_all, remove_from_all

if TYPE_CHECKING:
    from lensnet_guard.calls.errors import LensNetViolation
    from lensnet_guard.calls.record import CallRecord
    from lensnet_guard.logs.run_log import RunLog
    from lensnet_guard.testing.expectation import Expectation

MODES = get_args(Mode)
LISTED_CALLS = 4_096  # the newest calls of a test that its report section can show


class _Tally(Sink):
    """What one test did: counts per phase for the summary, the newest calls for its report.

    It holds records and no exception, whose frames would keep the test's tensors alive.
    """

    def __init__(self) -> None:
        self.calls: deque[CallRecord] = deque(maxlen=LISTED_CALLS)
        self.count = 0
        self.violations = 0

    def begin(self, record: "CallRecord") -> None:
        if record.kind == "call" and record.verdict == "allow":
            self.count += 1
            self.calls.append(record)

    def violation(self, error: "LensNetViolation") -> None:
        self.violations += 1
        if error.record is not None and error.record.kind in ("call", "bypass"):
            self.calls.append(error.record)


TALLY = pytest.StashKey[_Tally]()


class PluginSession:
    """Settings for every test, logs of this process, and the sums for the terminal."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._logs: dict[Path, RunLog] = {}
        self._tests: set[str] = set()
        self._sums = {"calls": 0, "violations": 0, "provoked": 0}
        self._environment = ExitStack()
        self._environment.enter_context(_mode_set(self._default_mode()))

    def _default_mode(self) -> str | None:
        mode = self._config.getoption("--lensnet-guard") or self._config.getini("lensnet_guard")
        return _checked_mode(mode, "the ini key lensnet_guard") if mode else None

    def _log_folder(self, marked: Any) -> Path | None:
        base: Path = self._config.invocation_params.dir
        folder = marked if marked is not None else self._config.getoption("--lensnet-log")
        if not folder and (folder := self._config.getini("lensnet_log")):
            base = self._config.inipath.parent if self._config.inipath else base
        folder = folder or os.environ.get("LENSNET_LOG")
        return base / folder if folder else None

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Refuse wrong markers before anything runs.

        A worker of xdist cannot tell its controller of a usage error: there the test fails.
        """
        for item in items:
            wrong = _wrong_marker(item)
            if wrong is not None and not hasattr(self._config, "workerinput"):
                raise wrong
            if wrong is not None:
                item.stash[_WRONG] = str(wrong)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Fail where a worker has found a wrong marker."""
        if _WRONG in item.stash:
            pytest.fail(item.stash[_WRONG], pytrace=False)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Hold settings, tally and log of one test, from its setup to its teardown."""
        mode, log = (None, None) if _WRONG in item.stash else _marked_settings(item)
        folder = self._log_folder(log)
        tally = item.stash[TALLY] = _Tally()
        with ExitStack() as stack:
            stack.enter_context(_mode_set(mode))
            add_to_all(tally)
            stack.callback(remove_from_all, tally)
            if folder is not None:
                stack.enter_context(self._logged(folder, item.nodeid))
            result = yield
        del item.stash[TALLY]  # its records are of no use to the rest of the session
        return result

    @contextmanager
    def _logged(self, folder: Path, test: str) -> Iterator[None]:
        from lensnet_guard.logs.run_log import RunLog

        if folder not in self._logs:
            worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
            header = {_schema.MODULE: "guarded", _schema.PYTEST_WORKER: worker}
            self._logs[folder] = RunLog(folder, header)
        log = self._logs[folder]
        log.write(_schema.TEST_BEGIN, **{_schema.TEST: test})
        add_to_all(log)
        try:
            yield
        finally:
            remove_from_all(log)
            log.write(_schema.TEST_END, **{_schema.TEST: test})

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Count for the marker what the test itself does, without its fixtures."""
        marker = item.get_closest_marker("lensnet_calls")
        if marker is None:
            result = yield
        else:
            expectation = _expected_by(item, marker)
            with expectation.watch() as calls:
                result = yield
            failure = expectation.failure(calls, full_stacks=item.config.get_verbosity() > 0)
            if failure is not None:
                pytest.fail(f"@pytest.mark.lensnet_calls: {failure}", pytrace=False)
        fail_if_swallowed(item)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Send counts for the summary with the report, so that they come home from workers."""
        report = yield
        tally = item.stash.get(TALLY, None)
        if tally is not None and (tally.count or tally.violations or tally.calls):
            kind = "provoked" if report.passed else "violations"
            counts = {"calls": tally.count, kind: tally.violations}
            report.lensnet_guard = counts  # type: ignore[attr-defined]
            tally.count = tally.violations = 0
            if report.failed and tally.calls:
                from lensnet_guard.testing.capture import list_calls

                full = item.config.get_verbosity() > 0
                text = list_calls(list(tally.calls), full_stacks=full)
                report.sections.append(("LensNet calls", text))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add up, in the process that prints."""
        counts = getattr(report, "lensnet_guard", None)
        if counts is not None:
            for name, number in counts.items():
                self._sums[name] += number
            self._tests.add(report.nodeid)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Write one line, such as ``LensNet: 214 calls in 37 tests, 0 violations``."""
        if self._tests:
            text = ", ".join(
                (
                    f"{count(self._sums['calls'], 'call')} in {count(len(self._tests), 'test')}",
                    count(self._sums["violations"], "violation"),
                )
            )
            provoked = self._sums["provoked"]
            extra = f" ({provoked} more in tests that passed)" if provoked else ""
            terminalreporter.write_line(f"LensNet: {text}{extra}")

    def pytest_sessionfinish(self) -> None:
        """Close the logs, while a worker of xdist is still waited for: afterwards it is killed."""
        for log in self._logs.values():
            log.close()

    def pytest_unconfigure(self) -> None:
        """Give the environment back."""
        self._environment.close()


# Violations that did not reach the test ----------------------------------------------------------


class Raised(Sink):
    """The violations of a guard that the fixture has made, until the test has been judged.

    Whatever ``pytest.raises`` catches meanwhile is expected, wherever it is written: no traceback
    tells what has caught an exception, so `pytest.RaisesExc` is listened to.
    """

    def __init__(self) -> None:
        self.errors: list[LensNetViolation] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Forget what ``pytest.raises`` catches, in every thread."""
        leave = pytest.RaisesExc.__exit__

        def noted(raises: Any, kind: Any, error: Any, traceback: Any) -> Any:
            __tracebackhide__ = True
            caught = leave(raises, kind, error, traceback)
            if caught and error in self.errors:
                self.errors.remove(error)
            return caught

        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(pytest.RaisesExc, "__exit__", noted)
            yield

    def violation(self, error: "LensNetViolation") -> None:
        """Keep it: its traceback will tell where it went."""
        self.errors.append(error)


RAISED: pytest.StashKey[Raised] = pytest.StashKey()


def fail_if_swallowed(item: pytest.Item) -> None:
    """Fail for violations of guards made by the fixture that the test has not seen."""
    raised = item.stash.get(RAISED, None)
    errors = raised.errors.copy() if raised is not None else []
    swallowed = [error for error in errors if not _reached(item, error)]
    if swallowed and raised is not None:
        raised.errors.clear()  # told once
        told = "\n\n".join(f"{type(error).__name__}: {error}" for error in swallowed)
        pytest.fail(
            f"{count(len(swallowed), 'violation')} did not reach the test: swallowed on the way, "
            f"or raised in another thread. Where it is meant to happen, let the test itself catch "
            f'it (pytest.raises), or guard with mode="observe".\n\n{told}',
            pytrace=False,
        )


def _reached(item: pytest.Item, error: "LensNetViolation") -> bool:
    """Return whether the test has seen an exception, as far as its traceback tells.

    It was raised through the test or a fixture; or somebody took the traceback off, as unittest
    does with what its assertRaises has caught.
    """
    traceback = error.__traceback__
    if traceback is None:
        return True
    codes = _codes(item)
    while traceback is not None:
        if traceback.tb_frame.f_code in codes:
            return True
        traceback = traceback.tb_next
    return False


def _codes(item: pytest.Item) -> set[CodeType]:
    """Return the code of the test and its fixtures, and of the functions written inside them."""
    test = getattr(item, "obj", None)
    functions = [test, getattr(getattr(test, "hypothesis", None), "inner_test", None)]
    fixtures = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
    functions += [definition.func for defs in fixtures.values() for definition in defs]
    found = (getattr(inspect.unwrap(f), "__code__", None) for f in functions if callable(f))
    todo = [code for code in found if code is not None]
    codes: set[CodeType] = set()
    while todo:
        code = todo.pop()
        codes.add(code)
        todo += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    return codes


# Settings ----------------------------------------------------------------------------------------


_WRONG: pytest.StashKey[str] = pytest.StashKey()


def _wrong_marker(item: pytest.Item) -> pytest.UsageError | None:
    try:
        _marked_settings(item)
        if (marker := item.get_closest_marker("lensnet_calls")) is not None:
            _expected_by(item, marker)
    except pytest.UsageError as error:
        return error
    return None


def _marked_settings(item: pytest.Item) -> tuple[str | None, Any]:
    """Return mode and log folder that ``@pytest.mark.lensnet_guard`` asks for."""

    def settings(mode: str | None = None, *, log: Any = None) -> tuple[str | None, Any]:
        return mode, log

    marker = item.get_closest_marker("lensnet_guard")
    if marker is None:
        return None, None
    try:
        mode, log = settings(*marker.args, **marker.kwargs)
    except TypeError as error:
        raise pytest.UsageError(f"{item.nodeid}: @pytest.mark.lensnet_guard: {error}") from None
    if mode is not None:
        _checked_mode(mode, f"{item.nodeid}: @pytest.mark.lensnet_guard")
    if log is not None and (not isinstance(log, (str, os.PathLike)) or "\0" in str(log)):
        raise pytest.UsageError(
            f"{item.nodeid}: @pytest.mark.lensnet_guard: log must be a folder's path, not {log!r}"
        )
    return mode, log


def _expected_by(item: pytest.Item, marker: pytest.Mark) -> "Expectation":
    """Return what ``@pytest.mark.lensnet_calls`` expects."""
    from lensnet_guard.testing.expectation import Expectation

    def expected(exact: Any = None, **others: Any) -> Expectation:
        return Expectation(exact=exact, **others)

    try:
        return expected(*marker.args, **marker.kwargs)
    except (TypeError, ValueError) as error:
        raise pytest.UsageError(f"{item.nodeid}: @pytest.mark.lensnet_calls: {error}") from None


def _checked_mode(mode: Any, source: str) -> str:
    if mode not in MODES:
        raise pytest.UsageError(f"{source} must be one of {', '.join(MODES)}, not {mode!r}")
    return str(mode)


@contextmanager
def _mode_set(mode: str | None) -> Iterator[None]:
    """Set LENSNET_GUARD, for guards that are made without a mode, in subprocesses too."""
    before = os.environ.get("LENSNET_GUARD")
    if mode is not None:
        os.environ["LENSNET_GUARD"] = mode
    try:
        yield
    finally:
        if mode is not None:
            os.environ.pop("LENSNET_GUARD", None)
            if before is not None:
                os.environ["LENSNET_GUARD"] = before
