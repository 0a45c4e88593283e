"""From a trainer to its contracts: what it holds, the preset of its kind, and the policies."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn

from lensnet_guard import CallPolicy, Scope, frozen, guard_of
from lensnet_guard.integrations._place import getattr_path
from lensnet_guard.integrations.presets import PRESETS, Held, Pass, Preset


class NoContract(TypeError):
    """Nobody has said what a trainer may call, and no preset says it either."""


def preset_of(trainer: Any) -> Preset | None:
    """Return the preset of a trainer's kind; None when there is none.

    A class of one's own that is derived from a trainer of the library's is of its kind; one that
    the library derives is none, for it calls otherwise.
    """
    for cls in type(trainer).__mro__:
        preset = PRESETS.get(f"{cls.__module__}:{cls.__qualname__}")
        if preset is not None or cls.__module__.partition(".")[0] in _LIBRARIES:
            return preset
    return None


_LIBRARIES = {name.partition(".")[0] for name in PRESETS}


def contracts_of(trainer: Any) -> dict[str, CallPolicy]:
    """Return the policy of each module that a trainer holds, by the attribute that holds it.

    Args:
        trainer: A trainer that `PRESETS` has a contract for.

    Returns:
        The policies, such as ``{"ref_model": ..., "reward_funcs.0": ...}``.

    Raises:
        NoContract: There is no preset of its kind, or not of this version, and it says what the
            trainer holds; or the contracts would be of one module, or beside one that it has.
    """
    preset = preset_of(trainer)
    if preset is None:
        raise _unknown(trainer)
    found = _held(trainer, preset.held)
    if not found and preset.otherwise is not None:
        found = _held(trainer, (preset.otherwise,))
    if not found:
        raise _nothing(trainer, preset)
    _check_each_is_another(trainer, {place: module for place, module, _ in found})
    for place, module, held in found:
        if frozen in held.requires:
            _check_shares_nothing(trainer, place, module)
    return {place: _policy(trainer, preset, held, module) for place, module, held in found}


def _held(trainer: Any, of: Iterable[Held]) -> list[tuple[str, nn.Module, Held]]:
    """Return the modules that are held and can be guarded, each with its place."""
    return [
        (place, module, held)
        for held in of
        if held.given(trainer) and held.beyond(trainer) is None
        for place, module in _modules_at(trainer, held.place)
    ]


def _nothing(trainer: Any, preset: Preset) -> NoContract:
    """Return what says why there is nothing to guard."""
    held = [*preset.held, *filter(None, [preset.otherwise])]
    places = " and ".join(sorted({one.place for one in preset.held}))
    whys = (one.beyond(trainer) for one in held if getattr_path(trainer, one.place) is not None)
    why = next(filter(None, whys), f"its {places} is no module here")
    return NoContract(
        f"{type(trainer).__name__} holds nothing to guard: {why}.\n"
        "  what to do   Train it without guarded_trainer, or name what it calls."
    )


def _check_each_is_another(trainer: Any, modules: Mapping[str, nn.Module]) -> None:
    """Refuse one module in two places, and one that has a contract of its own.

    Raises:
        NoContract: Nobody could say whose call one is.
    """
    places = {id(trainer.model): "model, which it trains,"}
    for place, module in modules.items():
        if (guard := guard_of(module)) is not None:
            raise NoContract(
                f"{place} of {type(trainer).__name__} is guarded already, as {guard.name}, with a "
                "contract of its own.\n"
                "  what to do   Give that guard, guarded_trainer(trainer, guard_of(...)); or take "
                "it off first, guard.uninstall()."
            )
        if place != "model" and (other := places.get(id(module))) is not None:
            what_to_do = _GUARD_IT_ONCE.format(place=place)
            if module is trainer.model:
                what_to_do = _TEACHES_NOTHING
            raise NoContract(
                f"{other} and {place} of {type(trainer).__name__} are one module, so nobody could "
                f"say which of them is called.\n  what to do   {what_to_do}"
            )
        places[id(module)] = place


def _check_shares_nothing(trainer: Any, place: str, module: nn.Module) -> None:
    """Refuse a reference that has weights in the memory of the model that is trained.

    Torch counts writes by tensor, so `frozen` would not see that they are written by another.

    Raises:
        NoContract: It would be trained with the model.
    """
    named = trainer.model.named_parameters()
    trained = {_memory(it): name for name, it in named if it.requires_grad and _memory(it)}
    for name, parameter in module.named_parameters():
        if (other := trained.get(_memory(parameter))) is not None:
            raise NoContract(
                f"{name} of {place} of {type(trainer).__name__} is in the memory of {other} of "
                "model, which it trains, so the one would move with the other.\n"
                "  what to do   Load it twice; or freeze in model what they share, "
                "requires_grad_(False)."
            )


def _memory(parameter: nn.Parameter) -> int:
    """Return where a parameter has its values; 0 where it has none, or nobody can tell."""
    try:
        return parameter.untyped_storage().data_ptr()
    except RuntimeError:  # of a kind without, of which there are many
        return 0


_TEACHES_NOTHING = (
    "Load it twice: a reference or a teacher that is the trained model itself teaches nothing."
)
_GUARD_IT_ONCE = (
    "Load it twice; or guard it once, with a policy that counts the calls of both: "
    'guarded_trainer(trainer, "{place}", policy=CallPolicy(...)).'
)


def _modules_at(trainer: Any, place: str) -> Iterator[tuple[str, nn.Module]]:
    found = getattr_path(trainer, place)
    if isinstance(found, nn.Module):
        yield place, found
    elif isinstance(found, (list, tuple)):
        items = ((f"{place}.{number}", item) for number, item in enumerate(found))
        yield from ((name, item) for name, item in items if isinstance(item, nn.Module))
    elif isinstance(found, dict):
        for name, item in found.items():
            if isinstance(name, str) and isinstance(item, nn.Module):
                yield f"{place}.{name}", item


def _policy(trainer: Any, preset: Preset, held: Held, module: nn.Module) -> CallPolicy:
    due = {one: one.calls(trainer) if callable(one.calls) else one.calls for one in held.passes}
    scopes = {
        one.scope: Scope(calls, one.per, _caller(trainer, preset, one), one.when, one.requires)
        for one, calls in due.items()
        if calls is not None
    }
    requires = held.requires
    if held.syncs(trainer):
        requires = tuple(condition for condition in requires if condition is not frozen)
    backbone = getattr(module, "base_model_prefix", "")
    parts = tuple(backbone if part == "*" else part for part in held.parts)
    return CallPolicy(scopes, requires=requires, methods=held.methods, parts=parts)


def _caller(trainer: Any, preset: Preset, one: Pass) -> str:
    """Return the function that makes the calls, as it is on the stack; one's own where overridden.

    Raises:
        NoContract: The trainer has no such method.
    """
    if ":" in one.by:
        return one.by
    method = getattr(type(trainer), one.by, None)
    if method is None:
        raise NoContract(
            f"{type(trainer).__name__} has no method {one.by!r}, which calls the module in "
            f"{preset.read_from}; {_installed(type(trainer))} is another.\n  what to do   {_WRITE}"
        )
    function = inspect.unwrap(method)
    return f"{function.__module__}:{function.__qualname__}"


# What is found of a trainer that nobody knows -----------------------------------------------------

_WRITE = (
    'Write the contract: guarded_trainer(trainer, "ref_model", policy=CallPolicy(...)), with the '
    "attribute that holds the module. To see what it calls, guard it once with "
    'policy=CallPolicy(scopes={}), mode="observe", log="runs/observed"; '
    "`lensnet-guard suggest runs/observed` writes the policy that this run has kept."
)


def _unknown(trainer: Any) -> NoContract:
    kinds = ", ".join(name.rpartition(":")[2].removesuffix("Trainer") for name in PRESETS)
    found = [
        f"{place} ({module.__class__.__name__})"
        for name in getattr(trainer, "__dict__", ())
        if name not in _TRAINED
        for place, module in _modules_at(trainer, name)
    ]
    return NoContract(
        f"no contract is known of {type(trainer).__name__} ({_installed(type(trainer))}); "
        f"TRL's trainers that have one are {kinds}.\n"
        f"  it holds     {', '.join(found) or 'no module but the one that it trains'}\n"
        f"  what to do   {_WRITE}"
    )


_TRAINED = ("model", "model_wrapped")


def _installed(kind: type) -> str:
    """Return the library that a class is of, with its version."""
    library = kind.__module__.partition(".")[0]
    try:
        return f"{library} {version(library)}"
    except PackageNotFoundError:
        return kind.__module__


# What is done around methods ----------------------------------------------------------------------


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


@contextmanager
def around(trainer: Any, decorators: Mapping[str, Decorator]) -> Iterator[None]:
    """Decorate a trainer's methods, while this block is open.

    Args:
        trainer: The trainer; its methods are its own again afterwards.
        decorators: A method's name -> what makes of the method what runs in its place.
    """
    own = vars(trainer)
    before = {name: own[name] for name in decorators if name in own}
    put = {name: decorator(getattr(trainer, name)) for name, decorator in decorators.items()}
    own.update(put)
    try:
        yield
    finally:
        for name, decorated in put.items():
            if own.get(name) is decorated:  # and not what somebody has put there since
                del own[name]
                if name in before:
                    own[name] = before[name]
