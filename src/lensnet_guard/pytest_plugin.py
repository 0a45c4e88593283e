"""The pytest plugin: call contracts as one line of a test. See docs/testing.md.

Options, markers and fixtures; what happens around every test is in `pytest_session`. Torch is
imported by nothing but a fixture, the ``lensnet_calls`` marker or a log that is asked for.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from lensnet_guard.testing.plugin_session import (
    MODES,
    RAISED,
    PluginSession,
    Raised,
    fail_if_swallowed,
)

if TYPE_CHECKING:
    from lensnet_guard.calls.policy import CallPolicy
    from lensnet_guard.calls.record import Context
    from lensnet_guard.guard import Guard
    from lensnet_guard.testing.capture import CapturedCalls


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add options and ini keys. A marker goes before an option, that before ini and environment."""
    group = parser.getgroup("lensnet-guard", "call contracts")
    group.addoption(
        "--lensnet-guard",
        choices=MODES,
        help="Mode of every guard that is made without one: enforce (default), observe or off.",
    )
    group.addoption(
        "--lensnet-log",
        metavar="DIR",
        help="Write every call of every guard to DIR, one file per process.",
    )
    parser.addini("lensnet_guard", "Default of --lensnet-guard.")
    parser.addini("lensnet_log", "Default of --lensnet-log, relative to the ini file.")


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers and what is kept for the whole session."""
    config.addinivalue_line(
        "markers",
        "lensnet_calls(exact=None, *, min=None, max=None, context=None, scope=None): "
        "how many calls of guarded modules the test makes.",
    )
    config.addinivalue_line(
        "markers",
        "lensnet_guard(mode=None, *, log=None): mode and log folder of guards in this test.",
    )
    config.pluginmanager.register(PluginSession(config), "lensnet_guard_session")


@pytest.fixture
def assert_lensnet_calls(
    pytestconfig: pytest.Config,
) -> Callable[..., AbstractContextManager["CapturedCalls"]]:
    """Expect an exact number of calls of a block, one by default.

    Example:
        ``with assert_lensnet_calls(n=1, context=..., scope=..., guard=..., info=...) as calls:``
    """
    from lensnet_guard.testing.expectation import Asserted

    def expect(
        n: int = 1,
        *,
        context: "Context | None" = None,
        scope: str | None = None,
        guard: Any = None,
        info: str | None = None,
    ) -> AbstractContextManager["CapturedCalls"]:
        __tracebackhide__ = True
        return Asserted(pytestconfig, exact=n, context=context, scope=scope, guard=guard, info=info)

    return expect


@pytest.fixture
def assert_max_lensnet_calls(
    pytestconfig: pytest.Config,
) -> Callable[..., AbstractContextManager["CapturedCalls"]]:
    """Expect no more than a number of calls of a block, with the same filters.

    Example:
        ``with assert_max_lensnet_calls(3) as calls:``
    """
    from lensnet_guard.testing.expectation import Asserted

    def expect(
        n: int,
        *,
        context: "Context | None" = None,
        scope: str | None = None,
        guard: Any = None,
        info: str | None = None,
    ) -> AbstractContextManager["CapturedCalls"]:
        __tracebackhide__ = True
        return Asserted(pytestconfig, max=n, context=context, scope=scope, guard=guard, info=info)

    return expect


@pytest.fixture
def lensnet_calls() -> Iterator["CapturedCalls"]:
    """The calls of every guarded module since the fixture was set up; asserts nothing."""
    from lensnet_guard.testing.capture import capture

    with capture() as captured:
        yield captured


@pytest.fixture
def lensnet_guard(request: pytest.FixtureRequest) -> Iterator[Callable[..., "Guard"]]:
    """Guard a module, or an owner's, for this test.

    ``guard = lensnet_guard(model)`` takes what `lensnet_guard.lensnet_guard` takes, and everything
    is put back after the test. A violation that does not reach the test, because other code
    swallowed it or it was raised in a thread, fails the test all the same.
    """
    from lensnet_guard.install import lensnet_guard as guarded

    raised = request.node.stash.setdefault(RAISED, Raised())
    with ExitStack() as stack:
        stack.enter_context(raised.listening())

        def guard(
            owner_or_module: Any,
            *,
            attribute: str = "lensnet",
            policy: "CallPolicy | None" = None,
            mode: str | None = None,
            log: str | os.PathLike[str] | None = None,
        ) -> "Guard":
            keywords: dict[str, Any] = {"policy": policy, "mode": mode, "log": log}
            installed = guarded(owner_or_module, attribute=attribute, **keywords)
            made = stack.enter_context(_without_verdict(installed))
            if made.mode == "enforce":
                made.add_sink(raised)
                stack.callback(made.remove_sink, raised)
            return made

        try:
            yield guard
            fail_if_swallowed(request.node)
        finally:  # an exception keeps the frames of the test, and they its tensors
            raised.errors.clear()


@contextmanager
def _without_verdict(installed: AbstractContextManager["Guard"]) -> Iterator["Guard"]:
    """The fixture says itself what is wrong: without the warning at the end."""
    with ExitStack() as stack:
        yield stack.enter_context(installed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*none left this block", RuntimeWarning)
            stack.close()
