"""Who makes a call: the function that its author would name."""

import sys
from collections.abc import Sequence

# What only hands a call on, from whoever makes it to the module.
_WRAPPERS = frozenset(
    (
        *("accelerate", "deepspeed", "lightning", "lightning_fabric", "peft"),
        *("pytorch_lightning", "wrapt"),
    )
)
_NEVER = frozenset((*sys.stdlib_module_names, "lensnet_guard", "torch"))
_ENTRANCE = "lensnet_guard.boundary.entrances"  # where the module's own methods are let in
# Frames whose name no policy can give: their names are no attributes of a module or a class.
_NAMELESS = ("<lambda>", "<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")


def own_caller(callers: Sequence[str], first: int = 0) -> tuple[int, str | None]:
    """Return the innermost function outside torch, the guard, and what wraps modules.

    A function of a framework is named as well: it is DPOTrainer's method that calls a reference,
    and not the script that calls ``trainer.train()``.

    Args:
        callers: ``"module:qualname"`` of each frame, innermost first.
        first: The number of the first frame that may be it.

    Returns:
        The number of its frame, and its name; the number of ``first``, or of the frame at module
        level, and None where there is no function to name.
    """
    first = max(first, _entrance(callers))  # inside it, the module calls itself
    fallback: tuple[int, str | None] | None = None
    for number, name in enumerate(callers[first:], first):
        module, _, function = name.partition(":")
        if function == "<module>":  # beyond it is only what runs or imports the script
            return fallback or (number, None)
        package = module.partition(".")[0]
        if not module or package in _NEVER:
            continue
        if function.endswith(_NAMELESS):  # it is part of the function that it is written in
            outer = f"{module}:{function.rpartition('.<locals>.')[0]}"
            if outer not in callers[number:]:
                continue
            number, name = callers.index(outer, number), outer
        if package not in _WRAPPERS:
            return number, name
        fallback = fallback or (number, name)
    return fallback or (first, None)


def entered_method(callers: Sequence[str]) -> str | None:
    """Return the name of the module's own method in which a call is made; None outside of any.

    Args:
        callers: As of `own_caller`.
    """
    for name in reversed(callers[: _entrance(callers)]):
        module, _, function = name.partition(":")
        if module.partition(".")[0] not in _NEVER:
            return function.rpartition(".")[2]
    return None


def _entrance(callers: Sequence[str]) -> int:
    """Return the number of the frame at which a method of the module was let in; else 0."""
    found = (n for n, name in enumerate(callers) if name.partition(":")[0] == _ENTRANCE)
    return next(found, 0)
