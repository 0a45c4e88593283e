"""A call record: one run of the guarded module, who made it, and in which context.

Recording happens on the hot path, so a record keeps what is cheap to take (code objects and
instruction offsets, shapes and dtypes) and turns it into file names and text when somebody asks.
No record ever holds a tensor, a tensor's values, or a frame: nothing is kept alive by the guard.
"""

import contextlib
import operator
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from itertools import repeat
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
import wrapt

from lensnet_guard import _schema
from lensnet_guard._text import short_path
from lensnet_guard.calls.tensors import tensor_text

if TYPE_CHECKING:
    from lensnet_guard.calls.compiled import CompileState

Context = Literal["training", "inference"]
Kind = Literal["call", "recompute", "bypass", "result", "micro_step", "window", "context"]
Verdict = Literal["allow", "refuse"]

_RawFrame = tuple[CodeType, int]
Stack = tuple[_RawFrame, ...]


class Frame(NamedTuple):
    """One line of a stack.

    Attributes:
        file: The absolute path of the source file.
        line: The line in it, from 1.
        function: The qualified name of the function.
    """

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{short_path(self.file)}:{self.line} in {self.function}"


@dataclass(slots=True, eq=False)
class CallRecord:
    """One run of a guarded module, or one broken promise about such runs.

    Attributes:
        seq: Number of the record within its guard, from 1, in order of admission.
        guard: Number of the guard within its process; guards may share a name and a log.
        module: The guard's name for the module.
        kind: ``"call"``; ``"recompute"`` of a call by activation checkpointing; ``"bypass"``, a
            run that did not come through the proxy; ``"result"``, what a call returned and ought
            not to; ``"micro_step"`` or ``"window"``, an unmet budget; ``"context"``, a refused
            switch of context or micro-step.
        verdict: ``"allow"`` or ``"refuse"``.
        reason: For a refusal, the name of the violation's class, else None.
        context: ``"training"``, ``"inference"`` or None (unset).
        scope: The scope or sanctioned caller that applies, else None.
        step: The number of the optimizer step, as given to ``guard.micro_step``; None outside one.
        micro_step: The number of the micro-batch in it, likewise.
        thread: Name of the calling thread.
        grad_enabled: Whether autograd was recording.
        duration_ms: Wall time of the module's run, in milliseconds; None when it did not run or
            still runs.
        outcome: ``"returned"``, ``"raised <type>"``, ``"refused"``, ``"stopped early"`` (a
            recompute that had all that backward needs), or None while it runs.
        recompute_of: ``seq`` of the call that a recompute runs again, else None.
        compiled: What torch tells of compilation and CUDA graphs around the call; None for a module
            that is not compiled (``module.compile()``), and for what never ran.
        method: The method or part that was called, where the policy names it; None for the module.
    """

    seq: int
    guard: int
    module: str
    kind: Kind
    verdict: Verdict
    reason: str | None
    context: Context | None
    scope: str | None
    step: int | None
    micro_step: int | None
    thread: str
    grad_enabled: bool
    duration_ms: float | None = None
    outcome: str | None = None
    recompute_of: int | None = None
    compiled: "CompileState | None" = None
    method: str | None = None
    _stack: tuple[_RawFrame | Frame, ...] = field(default=(), repr=False)
    _inputs: tuple[object, ...] = field(default=(), repr=False)
    _notes: Mapping[str, Any] | None = field(default=None, repr=False)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The arguments as text, such as ``"float32[2, 31, 64] cpu"`` or ``"mask=NoneType"``."""
        return tuple(map(_input_text, self._inputs))

    @property
    def notes(self) -> Mapping[str, Any]:
        """What the next line of a log says of the call besides; no pickle keeps it."""
        return self._notes or {}

    @notes.setter
    def notes(self, notes: Mapping[str, Any]) -> None:
        self._notes = notes or None

    @property
    def depth(self) -> int:
        """How many frames the stack has."""
        return len(self._stack)

    def stack(self) -> list[Frame]:
        """Return the frames that led to the call, innermost first, symbolised now."""
        return [_symbol(*f).frame if len(f) == 2 else f for f in self._stack]

    @property
    def caller(self) -> Frame:
        """The innermost frame outside the guard and torch."""
        stack = self.stack()
        outside = (frame for frame in stack if not frame.file.startswith(_INTERNAL_PATHS))
        return next(outside, stack[0] if stack else Frame("<unknown>", 0, "<unknown>"))

    def to_log(self) -> dict[str, Any]:
        """Return the record as JSON-ready fields, with frames by their OpenTelemetry names.

        ``caller`` is the index of the caller's frame in it.
        """
        fields = dict(zip(_schema.RECORD, _get_logged(self), strict=True))
        fields[_schema.INPUTS] = list(self.inputs)
        if self.compiled is not None:
            fields[_schema.COMPILED] = self.compiled.to_log()
        symbols = [_symbol(*f) if len(f) == 2 else _Symbol.of(f) for f in self._stack]
        fields[_schema.CALLER] = next((i for i, s in enumerate(symbols) if not s.internal), 0)
        fields[_schema.STACK] = [symbol.fields for symbol in symbols]
        if self._notes is not None:
            fields |= self._notes
        return fields

    def __getstate__(self) -> dict[str, Any]:
        """Pickle text instead of code objects, so that a record survives the trip to a process."""
        state = {name: getattr(self, name) for name in _schema.RECORD}
        return state | {"_stack": tuple(self.stack()), "_inputs": self.inputs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.method = self._notes = None  # records of before have no method
        for name, value in state.items():
            setattr(self, name, value)


_get_logged = operator.attrgetter(*_schema.RECORD)


def _folders_of(package: str) -> Iterator[str]:
    """Yield where a package is installed, if it is; it is not imported for that."""
    found = PathFinder.find_spec(package)  # whatever else stands for it among the modules
    for folder in (found and found.submodule_search_locations) or ():
        yield os.path.abspath(folder) + os.sep


# Frames of these files are never "the caller": the guard itself, torch, wrapt, and the standard
# library's context managers that stand between a `with` statement and the guard; and PEFT and
# DeepSpeed, whose models and engines only hand a call on to the model inside.
_INTERNAL_PATHS = (
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep,
    os.path.dirname(os.path.abspath(torch.__file__)) + os.sep,
    os.path.dirname(os.path.abspath(wrapt.__file__)) + os.sep,
    os.path.abspath(contextlib.__file__),
    *_folders_of("peft"),
    *_folders_of("deepspeed"),
)


# The running frame, or one so many calls further out. `inspect.currentframe` would cost a call.
frame_up: Callable[..., FrameType] = sys._getframe  # noqa: SLF001  # documented by this name


def check_context(context: object) -> None:
    """Refuse any word that is no context.

    Raises:
        ValueError: Always then.
    """
    if context not in get_args(Context):
        raise ValueError(f'context must be "training" or "inference", not {context!r}')


def capture_stack(frame: FrameType | None, limit: int) -> Stack:
    """Take up to ``limit`` frames from ``frame`` outwards, without touching any source file."""
    raw: list[_RawFrame] = []
    for _ in repeat(None, limit):
        if frame is None:
            break
        raw.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    if raw and raw[0][0].co_filename.startswith(_INTERNAL_PATHS):
        # Called by torch code, such as a deep container: go on to the caller outside it.
        while frame is not None and raw[-1][0].co_filename.startswith(_INTERNAL_PATHS):
            raw.append((frame.f_code, frame.f_lasti))
            frame = frame.f_back
    return tuple(raw)


def outside_frame(frame: FrameType | None) -> FrameType | None:
    """Return the innermost frame from ``frame`` outwards that is a caller's."""
    while frame is not None and frame.f_code.co_filename.startswith(_INTERNAL_PATHS):
        frame = frame.f_back
    return frame


def describe_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[object, ...]:
    """Note shapes, dtypes, devices and types of a call's arguments, keeping none of them."""
    described: tuple[object, ...] = tuple(map(_describe, args))
    if kwargs:
        described += tuple(_Named(name, _describe(value)) for name, value in kwargs.items())
    return described


class _Symbol(NamedTuple):
    """A raw frame made readable; it keeps the code alive whose ``id`` it is filed under.

    Attributes:
        code: The code that the frame ran; None of a frame that was pickled.
        frame: The frame in words.
        fields: The frame as it stands in a log.
        internal: Whether it is of the guard, of torch, or of another file that is no caller's.
    """

    code: CodeType | None
    frame: Frame
    fields: dict[str, Any]
    internal: bool

    @classmethod
    def of(cls, frame: Frame, code: CodeType | None = None) -> "_Symbol":
        fields = {
            _schema.FILE: frame.file,
            _schema.LINE: frame.line,
            _schema.FUNCTION: frame.function,
        }
        return cls(code, frame, fields, frame.file.startswith(_INTERNAL_PATHS))


# By the code's id (its hash would go through all its constants), then by instruction.
_symbols: dict[int, dict[int, _Symbol]] = {}
_MAX_CODES = 4_096


def _symbol(code: CodeType, instruction: int) -> _Symbol:
    try:
        return _symbols[id(code)][instruction]
    except KeyError:
        if len(_symbols) >= _MAX_CODES:
            _symbols.clear()
        symbol = _Symbol.of(_symbolise(code, instruction), code)
        _symbols.setdefault(id(code), {})[instruction] = symbol
        return symbol


def _symbolise(code: CodeType, instruction: int) -> Frame:
    line = code.co_firstlineno
    for start, end, number in code.co_lines():
        if number is not None and start <= instruction < end:
            line = number
            break
    return Frame(
        os.path.abspath(code.co_filename) if os.path.exists(code.co_filename) else code.co_filename,
        line,
        getattr(code, "co_qualname", code.co_name),
    )


class _Named(NamedTuple):
    """An argument given by name, or an item of a dict; a bare tuple describes a tensor.

    Attributes:
        name: The name, or the key.
        described: What `_describe` says of the value.
    """

    name: str
    described: object


def _describe(value: Any, depth: int = 2) -> object:
    if isinstance(value, torch.Tensor):
        try:
            return value.shape, value.dtype, value.device
        except Exception:  # a strided nested tensor has no shape, nor has many a subclass
            return type(value).__name__
    if depth and isinstance(value, (tuple, list)):
        return [_describe(item, depth - 1) for item in value[:8]]
    if depth and isinstance(value, dict):
        items = list(value.items())[:8]
        return [_Named(_describe_key(key), _describe(item, depth - 1)) for key, item in items]
    return type(value).__name__


def _describe_key(key: object) -> str:
    """Return a key as text; a tensor used as one would show its values."""
    return str(key) if isinstance(key, (str, int)) else type(key).__name__


def _input_text(described: object) -> str:
    if isinstance(described, _Named):
        return f"{described.name}={_input_text(described.described)}"
    if isinstance(described, tuple):
        try:
            return tensor_text(*described)
        except TypeError:  # a symbolic shape, while torch traces
            return tensor_text.__wrapped__(*described)
    if isinstance(described, list):
        return f"({', '.join(map(_input_text, described))})"
    return str(described)
