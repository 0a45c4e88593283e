"""The stock conditions on PEFT's adapters, which is read where it is loaded and never imported."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, ClassVar

from torch import nn

from lensnet_guard.calls.call import Call
from lensnet_guard.calls.parts import every_part, first_named

_BASE = "__base__"  # as PEFT calls no adapter, for rows of a batch
_OFF = frozenset({_BASE})

_Works = frozenset[str]
"""The adapters that work in a layer, `_BASE` for rows that have none; empty where the layer has
none of those that are active."""


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
    return _on(call, _layers(call))


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
    layers = _layers(call)
    on = [layer for layer, works in layers if works - _OFF]
    if not on:
        return None
    where = f"the adapter of {first_named(call.module, on)} is on{_of_all(on, layers)}"
    if any(_BASE in works for layer, works in layers if works - _OFF):
        return f"{where}, for some rows of adapter_names; name {_BASE!r} for every row"
    return f"{where}; make the call inside disable_adapter()"


@dataclass(frozen=True, repr=False)
class active_adapter:  # noqa: N801  # it is written where it is asked for, as set_adapter is
    """Every adapter of PEFT's in the module is on, and the one of this name works alone.

    It stops a reference that is the policy itself where the reference is an adapter too: a copy of
    the first one, as TRL's trainers keep it under the name ``"ref"``. Left inactive, it changes
    nothing, and a KL is always 0.

    Args:
        name: The adapter's name, as `set_adapter` of PEFT takes it.

    Raises:
        TypeError: ``name`` is no string.
    """

    name: str
    about: ClassVar[str] = "the active adapter"
    mistake: ClassVar[str] = "reference-with-adapters"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"active_adapter: the name must be a string, not {self.name!r}")

    def __call__(self, call: Call) -> str | None:
        """Return None, or which adapter works instead.

        Args:
            call: The call as it begins.
        """
        layers = _layers(call)
        if (found := _on(call, layers)) is not None:
            return found
        others = [layer for layer, works in layers if works - {self.name}]
        if not others:
            return None
        names = next(works for layer, works in layers if layer is others[0])
        return (
            f"{' and '.join(map(repr, sorted(names)))} works in "
            f"{first_named(call.module, others)}; call set_adapter({self.name!r})"
        )

    def __repr__(self) -> str:
        return f"active_adapter({self.name!r})"


def parameters_of_adapters(call: Call) -> dict[int, bool]:
    """Return of each parameter of an adapter, by its id, whether the adapter works in a call.

    Those of the base model that PEFT itself writes as adapters work (``target_parameters``), and
    puts back, are none that do.
    """
    found: dict[int, bool] = {}
    for part, works in _layers(call):
        parameter_of: Any = getattr(part, "get_param", None)
        if parameter_of is not None:
            found[id(parameter_of())] = False
        for held in part.children():
            if isinstance(held, (nn.ModuleDict, nn.ParameterDict)):  # by the adapters' names
                for name, own in held.items():
                    one = own.parameters() if isinstance(own, nn.Module) else [own]
                    found.update((id(parameter), name in works) for parameter in one)
    return found


def has_adapters(module: nn.Module) -> bool:
    """Return whether a module has adapters of PEFT's, in whatever state."""
    return bool(_states(module, None))


# As two that cannot hold together tell it: see `contradiction`.
vars(adapters_on)["about"] = vars(adapters_off)["about"] = "adapters"
vars(adapters_on)["mistake"] = vars(adapters_off)["mistake"] = "reference-with-adapters"

_Layers = list[tuple[nn.Module, _Works]]


def _on(call: Call, layers: _Layers) -> str | None:
    """Return None where every adapter is on and one works, or what is found instead."""
    off = [layer for layer, works in layers if _BASE in works]
    if off:
        by_row = call.kwargs.get("adapter_names") is not None
        return (
            f"the adapter of {first_named(call.module, off)} is off{_of_all(off, layers)}; leave "
            "disable_adapter(), or "
            + ("name an adapter for each row" if by_row else "enable the adapters")
        )
    if any(works for _, works in layers):
        return None
    if not layers:
        return "the module has no adapter of PEFT's"
    return "the module's adapters are on, and none of them is active; call set_adapter()"


def _of_all(some: list[nn.Module], layers: _Layers) -> str:
    """Return how many layers are so, unless it is the only one there is."""
    number, of = len(some), len(layers)
    return "" if of == 1 else f", as {number} of {of} are"


def _layers(call: Call) -> _Layers:
    return _states(call.module, call.kwargs.get("adapter_names"))


def _states(module: nn.Module, rows: list[str] | None) -> _Layers:
    """Return the adapters' layers in a module, each once, and which adapters work in them.

    Args:
        module: The module.
        rows: The adapter of each row, where the call names them.
    """
    if "peft" not in sys.modules:
        return []
    parts = every_part(module)
    types = set(map(type, parts))  # to ask each part would cost more than the walk
    kinds = {kind: ask for kind in types if (ask := _asks(kind)) is not None}
    if not kinds:
        return []
    if not any(issubclass(kind, _loaded(_BY_ROWS)) for kind in types):
        rows = None  # PEFT takes the argument, and does nothing with it
    asked = [(part, kinds[type(part)]) for part in parts if type(part) in kinds]
    found = {id(part): (part, ask(part, rows)) for part, ask in asked}
    return [(part, works) for part, works in found.values() if works is not None]


def _asks(kind: type) -> Callable[[Any, list[str] | None], _Works | None] | None:
    """Return what tells the state of a class of modules; None where it has no adapters."""
    for classes, ask in (
        (_LAYERS, _works_in_layer),
        (_MODELS, _works_in_model),
        (_ATTENTIONS, _works_in_attention),
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
_BY_ROWS = (("peft.tuners.lora.model", "LoraModel"),)
_XLORA = (("peft.tuners.xlora.layer", "XLoraLayer"),)


def _loaded(names: Iterable[tuple[str, str]]) -> tuple[type, ...]:
    """Return those classes of PEFT's that are loaded."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in names)
    return tuple(cls for cls in found if cls is not None)


def _works_in_layer(layer: Any, rows: list[str] | None) -> _Works:
    if layer.disable_adapters:
        return _OFF
    expert = getattr(layer.__dict__.get("forward"), "__self__", None)
    if isinstance(expert, _loaded(_XLORA)):  # whose layers never are disabled themselves
        rows = None
        # PEFT 0.13 runs it all the same.
        if getattr(expert, "adapters_disabled", False):
            return _OFF
    held = getattr(layer, "adapter_layer_names", ("modules_to_save",))
    names: Any = _rows_of(layer, rows)
    if names is None:
        if merged := getattr(layer, "merged_adapters", None):
            return frozenset(merged)
        names = getattr(layer, "active_adapters", None)
    if names is None:  # a ModulesToSaveWrapper before there were several
        names = [layer.active_adapter]
    where = [attrgetter(name)(layer) for name in held]
    return frozenset(n for n in names if n == _BASE or any(n in adapters for adapters in where))


def _rows_of(layer: nn.Module, rows: list[str] | None) -> list[str] | None:
    """Return the adapter of each row as a layer is given them; None where it is not."""
    for hook in layer._forward_pre_hooks.values():  # noqa: SLF001  # in a call of the PeftModel around
        if isinstance(hook, partial) and "adapter_names" in hook.keywords:
            rows = hook.keywords["adapter_names"]
    return rows


def _works_in_model(model: Any, _: object) -> _Works | None:
    """Return the state of a model's prompts; None where its adapters are layers."""
    if not model.active_peft_config.is_prompt_learning:
        return None
    enabled = getattr(model, "has_active_enabled_adapter", None)
    if enabled is None:  # before 0.18: the block gives the model its base model's forward
        own = model.forward
        own = own if hasattr(own, "__self__") else getattr(own, "__wrapped__", own)
        enabled = getattr(own, "__self__", model) is not model.base_model
    return frozenset({model.active_adapter}) if enabled else _OFF


def _works_in_attention(*_: object) -> _Works:
    """Return that an attention with prompts uses them: they are turned off by taking it out."""
    return frozenset({"adaption prompt"})
