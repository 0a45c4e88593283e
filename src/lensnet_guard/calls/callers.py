"""Callers by name: who is on the stack, what a name in a policy means, and whether it has run."""

import contextlib
import importlib
import importlib.util
import inspect
import operator
import os
import sys
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from types import (
    BuiltinFunctionType,
    CodeType,
    FrameType,
    FunctionType,
    MethodDescriptorType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any

from lensnet_guard._text import short_path


def find_caller(
    frame: FrameType | None, names: Container[str]
) -> tuple[str | None, FrameType | None]:
    """Return the first of ``names``, as ``"module:qualname"``, that runs at ``frame`` or above.

    With it comes the next frame outwards, from which to look for another one.
    """
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        name = f"{module}:{qualname(frame)}"
        if name in names:
            return name, frame.f_back
        frame = frame.f_back
    return None, None


def names_on(frame: FrameType | None, number: int) -> list[str]:
    """Return the names of so many frames, from ``frame`` outwards, as a policy knows them."""
    names: list[str] = []
    while frame is not None and len(names) < number:
        names.append(f"{frame.f_globals.get('__name__', '')}:{qualname(frame)}")
        frame = frame.f_back
    return names


def qualname(frame: FrameType) -> str:
    """Return the qualified name of the function that a frame runs."""
    if sys.version_info >= (3, 11):
        return frame.f_code.co_qualname
    return derived_qualname(frame)


def derived_qualname(frame: FrameType) -> str:
    """Return what ``co_qualname`` says, worked out for Python 3.10.

    That is from the frame's first argument, or for static methods from the classes of its module.
    Names of functions defined inside functions come out without their ``<locals>`` prefix.
    """
    code = frame.f_code
    first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    for cls in (first if isinstance(first, type) else type(first)).__mro__:
        if _defines(cls, code):
            return f"{cls.__qualname__}.{code.co_name}"
    module = frame.f_globals.get("__name__", "")
    key = module, code.co_filename, code.co_firstlineno, code.co_name
    if key not in _STATIC:
        classes = [value for value in tuple(frame.f_globals.values()) if isinstance(value, type)]
        owners = (cls for cls in classes if cls.__module__ == module and _defines(cls, code))
        owner = next(owners, None)
        _STATIC[key] = code.co_name if owner is None else f"{owner.__qualname__}.{code.co_name}"
    return _STATIC[key]


_STATIC: dict[tuple[str, str, int, str], str] = {}  # for the walk takes longer than a call


def _defines(cls: type, code: CodeType) -> bool:
    """Return whether a class has a method that runs this code."""
    member = cls.__dict__.get(code.co_name)
    function: Any = getattr(member, "__func__", member)
    return callable(function) and getattr(inspect.unwrap(function), "__code__", None) is code


# What a name in a policy means --------------------------------------------------------------------


def check_caller_exists(name: str, *, early: bool = False) -> CodeType | None:
    """Make sure that a function by this name can be on a stack.

    Args:
        name: ``"module:qualname"``, as `find_caller` gives it.
        early: Whether a function may still be to come, in a script or a module that is running.

    Returns:
        Its code, where that can be told.

    Raises:
        ValueError: There is no such module or function, or it runs by another name, which is told.
    """
    module_name, _, path = name.partition(":")
    if (main := _as_main(module_name)) is not None:
        raise ValueError(
            f"the caller {name!r} never runs by this name: {module_name} is the script that runs, "
            f"and on the stack it is '{main}:{path}'. Name that, or start the training from "
            "another file that imports it"
        )
    module = _module(name, module_name)
    outer, _, _ = path.partition(".<locals>")
    try:
        found = operator.attrgetter(outer)(module)
    except AttributeError as error:
        running = module is sys.modules["__main__"] or _is_being_imported(module)
        if early and running:
            return None
        raise ValueError(
            f"the caller {name!r} does not exist: {error}. Name a function as its module defines "
            "it, 'module:Class.method'"
        ) from None
    if outer != path:
        return None  # made anew each time that the outer function runs
    codes = list(_codes_of(found))
    for function in codes:
        if _name_of(function) == name:
            return function.__code__
    real = inspect.unwrap(_function(found))
    if isinstance(real, FunctionType) and "<locals>" not in _name_of(real):
        raise ValueError(
            f"the caller {name!r} never runs by this name: it is defined as {_name_of(real)!r}. "
            "Name that"
        )
    if isinstance(found, type):
        raise ValueError(
            f"the caller {name!r} is a class, and no function: name one of its methods, such as "
            f"'{found.__module__}:{found.__qualname__}.__init__'"
        )
    if isinstance(found, _BUILT_IN):
        raise ValueError(
            f"the caller {name!r} is no function of Python, so it is never on a stack; name the "
            "one that calls it"
        )
    return None  # something else that can be called: what runs then cannot be told from here


_BUILT_IN = (BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType)


def _as_main(module: str) -> str | None:
    """Return the name of the script that runs, where a module is that script."""
    main: Any = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if main is None or module == main.__name__:
        return None
    if spec is not None and spec.name == module:  # python -m module
        return str(main.__name__)
    file = getattr(main, "__file__", None)
    if file is None or module in sys.modules:
        return None
    try:
        found = importlib.util.find_spec(module)
        origin = found.origin if found is not None else None
        same = origin is not None and os.path.samefile(origin, file)
    except (ImportError, ValueError, OSError):  # no file at all, as of what came by a pipe
        return None
    return str(main.__name__) if same else None


def _module(name: str, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"the caller {name!r} cannot be found: importing {module} raised "
            f"{type(error).__name__}: {error}"
        ) from error


def _is_being_imported(module: ModuleType) -> bool:
    return bool(getattr(module.__spec__, "_initializing", False))


def _function(found: Any) -> Any:
    return getattr(found, "__func__", found)


def _codes_of(found: Any) -> Iterator[FunctionType]:
    """Yield the functions that run when something is called: it, and what it wraps."""
    todo, seen = [found], set()
    while todo:
        one = _function(todo.pop())
        one = one.fget if isinstance(one, property) else one
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, FunctionType):
            yield one
            for cell in one.__closure__ or ():
                with contextlib.suppress(ValueError):  # a cell that is empty
                    todo.append(cell.cell_contents)
        if (inner := getattr(one, "__wrapped__", None)) is not None:
            todo.append(inner)


def _name_of(function: FunctionType) -> str:
    """Return the name by which a function's frames go."""
    path = getattr(function.__code__, "co_qualname", function.__qualname__)
    return f"{function.__globals__.get('__name__', '')}:{path}"


# Whether they run ---------------------------------------------------------------------------------


class Runs:
    """Counts the runs of callers, where Python tells of them: from 3.12 on.

    Python calls back as the function itself begins, and as no other does.

    Args:
        names: Callers of a policy. Those whose code is not known are left out.

    Raises:
        ValueError: As `check_caller_exists`.
    """

    def __init__(self, names: Iterable[str]) -> None:
        found = {name: check_caller_exists(name) for name in names}
        self._codes = {name: code for name, code in found.items() if code is not None}
        self._told = bool(self._codes) and _tell_of(self._codes.values())

    def __bool__(self) -> bool:
        return self._told

    def counts(self) -> Mapping[str, int]:
        """Return how often each caller has begun to run so far; empty where nobody tells."""
        return {name: _begun[code] for name, code in self._codes.items()} if self._told else {}

    def place(self, name: str) -> str:
        """Return where a caller is written, such as ``" (train.py:12)"``; empty when unknown."""
        code = self._codes.get(name)
        return f" ({short_path(code.co_filename)}:{code.co_firstlineno})" if code else ""


_begun: Counter[CodeType] = Counter()
_TOOLS = (3, 4)  # of sys.monitoring: the numbers that no kind of tool has a claim to
_tool: list[int] = []


def _tell_of(codes: Iterable[CodeType]) -> bool:
    """Have Python tell of runs; return whether it does."""
    monitoring: Any = getattr(sys, "monitoring", None)
    if monitoring is None:
        return False
    if not _tool:
        free = [number for number in _TOOLS if monitoring.get_tool(number) is None]
        if not free:
            return False
        monitoring.use_tool_id(free[0], "lensnet_guard")
        monitoring.register_callback(free[0], monitoring.events.PY_START, _count)
        _tool.append(free[0])
    for code in codes:
        monitoring.set_local_events(_tool[0], code, monitoring.events.PY_START)
    return True


def _count(code: CodeType, _: int) -> None:
    _begun[code] += 1
