"""What PEFT's models do that others do not; PEFT is read where it is loaded, and never imported."""

import sys
from collections.abc import Iterator

from torch import nn


def whole_methods(module: nn.Module) -> frozenset[str]:
    """Return the methods of a module of which each run is one call, though no policy names them.

    ``generate`` of a `PeftModel` runs the base model inside it, its embedding and its prompts, each
    alone; it never runs the `PeftModel` itself.
    """
    return frozenset({"generate"} if isinstance(module, _models()) else ())


def prompts_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the parts that make a `PeftModel`'s prompts, which saving it runs alone."""
    for part in module.modules():
        encoders = getattr(part, "prompt_encoder", None) if isinstance(part, _models()) else None
        if isinstance(encoders, nn.Module):
            yield from encoders.modules()


def unloading_methods(cls: type) -> frozenset[str]:
    """Return the methods of a class that take the adapters out, and give back the base model."""
    tuner = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTuner", None)
    if tuner is None or not issubclass(cls, tuner):
        return frozenset()
    return frozenset(name for name in ("merge_and_unload", "unload") if hasattr(cls, name))


def _models() -> tuple[type, ...]:
    """Return the classes of models that have a base model of transformers inside."""
    places = ("peft.peft_model", "PeftModel"), ("peft.mixed_model", "PeftMixedModel")
    found = (getattr(sys.modules.get(module), name, None) for module, name in places)
    return tuple(cls for cls in found if cls is not None)
