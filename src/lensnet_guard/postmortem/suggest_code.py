"""A suggestion as Python: a policy to paste, formatted as black does, with what it rests on.

All of it is Python, so that it can be written to a file; what is no policy stands in comments. Of
what a log says only strings, and conditions of a form that is known, come into the code.
"""

import json
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lensnet_guard.postmortem.plain import plain
from lensnet_guard.postmortem.suggest import Rested, SuggestedScope, Suggestion
from lensnet_guard.postmortem.tallies import MICRO_STEP

_WIDTH = 88  # black's


def suggestion_code(suggestions: Sequence[Suggestion], faults: Sequence[str] = ()) -> str:
    """Return suggestions as a Python file.

    Args:
        suggestions: One for each module.
        faults: What is wrong with the logs that they rest on.

    Returns:
        Code that makes a ``policy``; of several modules ``policies``, by their names.
    """
    made = [one for one in suggestions if one.scopes is not None]
    lines = [*_imports(made)]
    if len(suggestions) == 1:
        lines += _head(suggestions[0])
        lines += _policy(suggestions[0], "policy = ", "") if made else []
    else:
        lines += [line for one in suggestions for line in _head(one)]
        lines += ["policies = {"] if made else []
        for one in made:
            lines += _policy(one, f"    {_string(one.module)}: ", ",")
        lines += ["}"] if made else []
    for one in suggestions:
        of = f" ({one.module})" if len(suggestions) > 1 else ""
        lines += _list(f"Before this holds{of}:", one.to_do)
        lines += _list(f"A stricter contract would have been broken{of}:", one.stricter)
        lines += _list(f"Besides{of}:", one.remarks)
    lines += _list("What it rests on is not whole:", faults)
    return "\n".join(lines) + "\n"


def suggestion_json(
    suggestions: Sequence[Suggestion], faults: Sequence[str], exit_code: int
) -> dict[str, Any]:
    """Return suggestions as a JSON-ready object.

    Args:
        suggestions: One for each module.
        faults: What is wrong with the logs that they rest on.
        exit_code: That of the command.
    """
    return {
        "exit_code": exit_code,
        "code": suggestion_code(suggestions, faults),
        "faults": list(faults),
        "modules": plain(suggestions),
    }


def scope_code(scope: SuggestedScope) -> str:
    """Return a scope in one line."""
    calls = scope.calls if scope.calls is not None else (0, None)
    arguments = [
        *([f"per={_string(scope.per)}"] if scope.per != MICRO_STEP else []),
        *([f"caller={_string(scope.caller)}"] if scope.caller is not None else []),
        *([f"when={scope.when}"] if scope.when is not None else []),
        *(f"{kind}={_tuple(names)}" for kind, names in _conditions(scope)),
    ]
    return f"Scope({', '.join([repr(calls), *arguments])})" if arguments else repr(calls)


def _conditions(scope: SuggestedScope) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield from (
        (kind, names)
        for kind, names in (("requires", scope.requires), ("ensures", scope.ensures))
        if names
    )


def _tuple(items: Sequence[str]) -> str:
    return f"({', '.join(items)}{',' if len(items) == 1 else ''})"


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


# The file -----------------------------------------------------------------------------------------


def _imports(suggestions: Iterable[Suggestion]) -> list[str]:
    """Return the imports that the policies need."""
    names: set[str] = set()
    for one in suggestions:
        names.add("CallPolicy")
        conditions = [rested.name for rested in (*one.requires, *one.ensures)]
        for scope in one.scopes or ():
            names |= {"Scope"} if scope_code(scope).startswith("Scope(") else set()
            conditions += [*scope.requires, *scope.ensures, *filter(None, (scope.when,))]
        names |= {name.partition("(")[0] for name in conditions}
        needs_torch = any("torch." in name for name in conditions)
        if needs_torch:
            names.add("torch")
    torch = ["import torch"] if "torch" in names else []
    # As isort orders them: classes before functions.
    listed = sorted(names - {"torch"}, key=lambda name: (name.islower(), name))
    if not listed:
        return []
    line = f"from lensnet_guard import {', '.join(listed)}"
    if len(line) > _WIDTH:
        line = "\n".join(["from lensnet_guard import (", *(f"    {name}," for name in listed), ")"])
    return [*torch, line, ""]


def _head(suggestion: Suggestion) -> list[str]:
    return _comment(f"{suggestion.module}: {suggestion.seen}", "# ", "# ")


def _policy(suggestion: Suggestion, before: str, after: str) -> list[str]:
    """Return the lines of one policy."""
    indent = " " * (len(before) - len(before.lstrip()))
    scopes = suggestion.scopes or ()
    inner = f"{indent}    "
    lines = [f"{inner}scopes={{}},"] if not scopes else _scopes(scopes, inner)
    for kind in ("requires", "ensures", "methods", "parts", "shared_submodules"):
        rested: tuple[Rested, ...] = getattr(suggestion, kind)
        if rested:
            is_code = kind in ("requires", "ensures")
            lines.append(f"{inner}{kind}=(")
            for one in rested:
                name = one.name if is_code else _string(one.name)
                lines.append(f"{inner}    {name},  # {_flat(one.on)}")
            lines.append(f"{inner}),")
    if lines == [f"{inner}scopes={{}},"]:
        return [f"{before}CallPolicy(scopes={{}}){after}"]
    return [f"{before}CallPolicy(", *lines, f"{indent}){after}"]


def _scopes(scopes: Iterable[SuggestedScope], indent: str) -> list[str]:
    lines = [f"{indent}scopes={{"]
    inner = f"{indent}    "
    for scope in scopes:
        lines += _comment(scope.on, f"{inner}# ", f"{inner}# ")
        line = f"{inner}{_string(scope.name)}: {scope_code(scope)},"
        lines += [line] if len(line) <= _WIDTH else _long_scope(scope, inner)
    return [*lines, f"{indent}}},"]


def _long_scope(scope: SuggestedScope, indent: str) -> list[str]:
    """Return a scope with each argument in a line of its own."""
    code = scope_code(scope)
    head = f"{indent}{_string(scope.name)}: "
    if not code.startswith("Scope("):
        return [f"{head}{code},"]
    lines = [f"{head}Scope(", f"{indent}    {scope.calls!r},"]
    if scope.per != MICRO_STEP:
        lines.append(f"{indent}    per={_string(scope.per)},")
    if scope.caller is not None:
        lines.append(f"{indent}    caller={_string(scope.caller)},")
    if scope.when is not None:
        lines.append(f"{indent}    when={scope.when},")
    for kind, names in _conditions(scope):
        line = f"{indent}    {kind}={_tuple(names)},"
        each = [f"{indent}        {name}," for name in names]
        if len(line) <= _WIDTH:
            lines.append(line)
        else:
            lines += [f"{indent}    {kind}=(", *each, f"{indent}    ),"]
    return [*lines, f"{indent}),"]


# Comments -----------------------------------------------------------------------------------------


def _list(title: str, items: Sequence[str]) -> list[str]:
    """Return a list of sentences as comments."""
    if not items:
        return []
    lines = [line for item in items for line in _comment(item, "# - ", "#   ")]
    return ["", f"# {_flat(title)}", *lines]


def _comment(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        _flat(text),
        _WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _flat(text: str) -> str:
    """Return a text in one line, for what follows a line's end would be code."""
    return " ".join(text.split())
