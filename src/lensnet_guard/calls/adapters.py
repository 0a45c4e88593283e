"""The stock conditions on PEFT's adapters, which is read where it is loaded and never imported."""

import sys
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any, Literal

from torch import nn

from lensnet_guard.calls.call import Call
from lensnet_guard.calls.parts import every_part, first_named

_State = Literal["on", "off", "idle"]
"""Of a layer: its adapter works, is disabled, or is none of those that are active."""


def adapters_on(call: Call) -> str | None:
    """Every adapter of PEFT's in the module is on, and one of them is active.

    It stops a policy that is scored, or trained, as its own base model, because a block or an
    exception has left the adapters off, or has put only some of them on again. A merged adapter
    that is on is on; one that was merged and unloaded is none any more.

    Args:
        call: The call as it begins.

    Returns:
        None, or the first layer whose adapter is off, or that there is none.
    """
    states = _states(call.module)
    off = [layer for layer, state in states if state == "off"]
    if off:
        return (
            f"the adapter of {first_named(call.module, off)} is off{_of_all(off, states)}; leave "
            "disable_adapter(), or enable the adapters"
        )
    if any(state == "on" for _, state in states):
        return None
    if not states:
        return "the module has no adapter of PEFT's"
    return "the module's adapters are on, and none of them is active; call set_adapter()"


def adapters_off(call: Call) -> str | None:
    """Every adapter of PEFT's in the module is off; one without adapters has none on.

    It stops a reference that is the policy itself: where policy and reference are one model, and
    the adapters are the difference, a KL with them on is always 0. An adapter that was merged is
    taken out again by PEFT itself as it runs disabled; one that was merged and unloaded is part of
    the weights, and is not seen.

    Args:
        call: The call as it begins.

    Returns:
        None, or the first layer whose adapter is on.
    """
    states = _states(call.module)
    on = [layer for layer, state in states if state == "on"]
    if not on:
        return None
    return (
        f"the adapter of {first_named(call.module, on)} is on{_of_all(on, states)}; make the call "
        "inside disable_adapter()"
    )


def has_adapters(module: nn.Module) -> bool:
    """Return whether a module has adapters of PEFT's, in whatever state."""
    return bool(_states(module))


# As two that cannot hold together tell it: see `contradiction`.
vars(adapters_on)["about"] = vars(adapters_off)["about"] = "adapters"
vars(adapters_on)["mistake"] = vars(adapters_off)["mistake"] = "reference-with-adapters"


def _of_all(layers: list[nn.Module], states: list[tuple[nn.Module, _State]]) -> str:
    """Return how many layers are so, unless it is the only one there is."""
    number, of = len(layers), len(states)
    return "" if of == 1 else f", as {number} of {of} are"


def _states(module: nn.Module) -> list[tuple[nn.Module, _State]]:
    """Return the adapters' layers in a module, each once, and what state they are in."""
    if "peft" not in sys.modules:
        return []
    parts = every_part(module)
    types = set(map(type, parts))  # to ask each part would cost more than the walk
    kinds = {kind: ask for kind in types if (ask := _asks(kind)) is not None}
    if not kinds:
        return []
    found = {id(part): (part, kinds[type(part)](part)) for part in parts if type(part) in kinds}
    return [(part, state) for part, state in found.values() if state is not None]


def _asks(kind: type) -> Callable[[Any], _State | None] | None:
    """Return what tells the state of a class of modules; None where it has no adapters."""
    for classes, ask in (
        (_LAYERS, _layer_state),
        (_MODELS, _model_state),
        (_ATTENTIONS, _always_on),
    ):
        if issubclass(kind, _loaded(classes)):
            return ask
    return None


# Where PEFT has them, in 0.13 and since: layers, and whole modules that are trained beside them;
# models, of which prompts are a part; and attentions that adaption prompts were put into.
_LAYERS = (
    ("peft.tuners.tuners_utils", "BaseTunerLayer"),
    ("peft.utils.other", "AuxiliaryTrainingWrapper"),
    ("peft.utils.other", "ModulesToSaveWrapper"),
)
_MODELS = (("peft.peft_model", "PeftModel"),)
_ATTENTIONS = tuple(
    ("peft.tuners.adaption_prompt.layer", name)
    for name in ("AdaptedAttention", "AdaptedAttentionGPT")
)


def _loaded(names: Iterable[tuple[str, str]]) -> tuple[type, ...]:
    """Return those classes of PEFT's that are loaded."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in names)
    return tuple(cls for cls in found if cls is not None)


def _layer_state(layer: Any) -> _State:
    if layer.disable_adapters:
        return "off"
    active = getattr(layer, "active_adapters", None)
    if active is None:  # a ModulesToSaveWrapper before there were several
        active = [layer.active_adapter]
    held = getattr(layer, "adapter_layer_names", ("modules_to_save",))
    works = any(name in attrgetter(where)(layer) for where in held for name in active)
    return "on" if works or getattr(layer, "merged_adapters", None) else "idle"


def _model_state(model: Any) -> _State | None:
    """Return the state of a model's prompts; None where its adapters are layers."""
    if not model.active_peft_config.is_prompt_learning:
        return None
    enabled = getattr(model, "has_active_enabled_adapter", None)
    if enabled is None:  # before 0.18: the block gives the model its base model's forward
        own = model.forward
        own = own if hasattr(own, "__self__") else getattr(own, "__wrapped__", own)
        enabled = getattr(own, "__self__", model) is not model.base_model
    return "on" if enabled else "off"


def _always_on(_: nn.Module) -> _State:
    """Return that an attention with prompts uses them: they are turned off by taking it out."""
    return "on"
