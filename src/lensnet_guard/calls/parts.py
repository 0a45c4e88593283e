"""A module's parts, by a walk that every call can afford."""

from torch import nn

from lensnet_guard._torch_internals import submodules


def every_part(module: nn.Module) -> list[nn.Module]:
    """Return a module and all of its submodules; one that is in two places comes twice.

    Names are asked for only where something is wrong, by `first_named`.
    """
    found = [module]
    for part in found:
        if children := submodules(part):
            found += [child for child in children.values() if child is not None]
    return found


def first_named(module: nn.Module, wrong: list[nn.Module]) -> str:
    """Return the first of some parts of a module in words, in the order of `named_modules`.

    Args:
        module: The module.
        wrong: Parts of it, at least one.

    Returns:
        Words such as ``"encoder.dropout (Dropout)"`` or ``"the module itself (Encoder)"``.
    """
    ids = set(map(id, wrong))
    path, part = next((p, m) for p, m in module.named_modules() if id(m) in ids)
    return f"{path or 'the module itself'} ({type(part).__name__})"
