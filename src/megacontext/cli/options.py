"""How the options of a command are written down: in a table above the command."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from megacontext.model.gguf import SMOLLM2

DATA_HELP = (
    "What sequences are: text, windows of files joined; files, windows that each lie within one "
    "file; reuse, of 24 such windows the one that uses most rare tokens again from far back; "
    "needles, facts in prose that are asked for at the end; mqar, pairs, likewise; recall, facts "
    "in noise, likewise; mixed, reuse, files, needles and mqar together."
)

_Command = TypeVar("_Command", bound=Callable[..., Any])
Option = Callable[[Callable[..., Any]], Callable[..., Any]]


class ModelOrPath(click.Path):
    """A language model that is known by its name, or the path of one; a path is made absolute."""

    name = "model"

    def __init__(self) -> None:
        super().__init__(exists=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name, or the path."""
        if value == SMOLLM2:
            return SMOLLM2
        return str(Path(str(super().convert(value, param, ctx))).resolve())


def option(name: str, default: Any, text: str) -> Option:
    """Make an option that has a default and says which.

    Args:
        name: As it stands on the command line.
        default: Its type is the option's.
        text: What it is.

    Returns:
        The option.
    """
    return click.option(name, default=default, show_default=True, help=text)


def is_given(name: str) -> bool:
    """Tell whether an option stands on the command line."""
    source = click.get_current_context().get_parameter_source(name)
    return source is click.core.ParameterSource.COMMANDLINE


def with_options(options: Sequence[Option]) -> Callable[[_Command], _Command]:
    """Give a command options, in the order in which its help is to list them.

    Args:
        options: Of click.

    Returns:
        A decorator.
    """

    def decorate(command: _Command) -> _Command:
        decorated: Any = command
        for each in reversed(options):
            decorated = each(decorated)
        given: _Command = decorated
        return given

    return decorate
