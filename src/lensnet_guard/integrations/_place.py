"""Where a guarded module hangs, and whether it still does."""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn

from lensnet_guard import Guard, guard_of
from lensnet_guard._text import explained_by


class GuardLost(RuntimeError):
    """What a training calls is not the guarded module any more, so nothing would be counted.

    Attributes:
        mistake: The name by which ``lensnet-guard explain`` tells more.
    """

    mistake = "bypassed-wrapper"

    def __str__(self) -> str:
        return f"{super().__str__()}\n{explained_by(self.mistake)}"


@dataclass(frozen=True)
class Place:
    """An attribute that holds the module.

    Attributes:
        owner: The object that has the attribute.
        attribute: The attribute's name.
        path: What messages call it, such as ``"LightningModule.model.critic"``.
    """

    owner: Any
    attribute: str
    path: str

    @property
    def module(self) -> Any:
        """What hangs there now; None when there is nothing."""
        return getattr(self.owner, self.attribute, None)

    def put(self, module: nn.Module) -> None:
        """Hang a module there, as what the one before was: assigned, it would be a submodule."""
        owner = self.owner
        if not isinstance(owner, nn.Module):
            setattr(owner, self.attribute, module)
            return
        vars(owner)["_modules"][self.attribute] = module
        if self.attribute == "_orig_mod":
            compiled: Any = owner  # a wrapper of torch.compile's keeps the call of what it held,
            compiled.__setstate__(compiled.__getstate__())  # which unpickling makes anew

    def put_for(self, old: nn.Module, module: nn.Module) -> None:
        """Hang a module there if this very other one does now."""
        if self.module is old:
            self.put(module)

    def check(self, guard: Guard) -> None:
        """Make sure that the guarded module itself hangs there.

        Raises:
            GuardLost: Anything else does.
        """
        found = self.module
        if found is not guard.module:
            raise GuardLost(
                f"the guard of {guard.name} is lost: {self.path} is {_describe(found, guard)}.\n"
                "  what to do   Something replaced it after it was guarded: a strategy that "
                "unwraps or rebuilds modules, configure_model, a copy. Give the integration the "
                "attribute's name instead of a guard, so that it guards what is there when the "
                "training starts; during the training load weights into the module (copy_, "
                "load_state_dict) instead of replacing it."
            )


class Items:
    """The items of a list or a dict, as attributes: ``reward_funcs.0`` is one like any other.

    Those of a tuple can be read.
    """

    def __init__(self, items: Any) -> None:
        vars(self)["_items"] = items

    def __getattr__(self, name: str) -> Any:
        try:
            return vars(self)["_items"][self._key(name)]
        except LookupError:
            raise AttributeError(f"there is no item {name}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        items = vars(self)["_items"]
        if isinstance(items, tuple):
            raise TypeError(
                f"item {name} of a tuple cannot be guarded in its place; make the tuple a list"
            )
        items[self._key(name)] = value

    def _key(self, name: str) -> Any:
        if isinstance(vars(self)["_items"], dict):
            return name
        return int(name) if name.isdecimal() else len(vars(self)["_items"])


def _with_items(owner: Any) -> Any:
    has_items = isinstance(owner, (list, tuple, dict)) and not hasattr(owner, "_fields")
    return Items(owner) if has_items else owner


def locate(root: Any, path: str) -> Place:
    """Return the place of ``root.<path>``, a dotted path of attributes and items of lists.

    Raises:
        AttributeError: There is no such owner.
    """
    owner = root
    *parents, attribute = path.split(".")
    for parent in parents:
        owner = getattr(_with_items(owner), parent)
    return Place(_with_items(owner), attribute, f"{type(root).__name__}.{path}")


def getattr_path(root: Any, path: str) -> Any:
    """Return what hangs at a dotted path now; None when there is nothing."""
    for name in path.split("."):
        root = getattr(_with_items(root), name, None)
    return root


def find(root: Any, guard: Guard) -> Place | None:
    """Return the first place in ``root``, or in a module below it, with the guarded module."""
    return next(_search({type(root).__name__: root}, guard.module), None)


def replace(root: Any, old: nn.Module, new: nn.Module) -> list[Place]:
    """Put a module in every place that holds this very other one.

    A trainer holds its model by several names (``model``, ``model_wrapped``, and those of its
    accelerator and its callback handler), and by wrappers (DDP, ``torch.compile``); what runs is
    whichever it likes.

    Args:
        root: Where to look: in it, in the objects that it holds, and in modules below.
        old: The module that is replaced.
        new: What takes its place.

    Returns:
        The places.
    """
    name = type(root).__name__
    roots = {name: root} | {f"{name}.{key}": one for key, one in vars(root).items() if _plain(one)}
    places = list(_search(roots, old))
    for place in places:
        place.put(new)
    return places


def _plain(value: Any) -> bool:
    """Return whether this is an object of which the attributes may be modules."""
    return hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type, ModuleType))


def _search(roots: Mapping[str, Any], module: nn.Module) -> Iterator[Place]:
    """Find the places that hold a module, in several roots and in the modules below; breadth first.

    But not in the module itself.
    """
    names = deque((root, path) for path, root in roots.items())
    seen = {id(module), *map(id, roots.values())}
    while names:
        owner, path = names.popleft()
        for holder, name, value in _modules_of(owner):
            if value is module:
                yield Place(holder, name.rpartition(".")[2], f"{path}.{name}")
            if id(value) not in seen:
                seen.add(id(value))
                names.append((value, f"{path}.{name}"))


def _modules_of(owner: Any) -> Iterator[tuple[Any, str, nn.Module]]:
    """Submodules, and modules that were put past ``nn.Module.__setattr__`` to be none.

    Each with who holds it, and by which name.
    """
    own = vars(owner)
    for name, value in own.items():
        # accelerate's compile_regions keeps the original there, which its copy does not run
        if isinstance(value, nn.Module) and name != "_orig_mod":
            yield Items(own), name, value
        elif isinstance(value, list):
            for number, item in enumerate(value):
                if isinstance(item, nn.Module):
                    yield Items(value), f"{name}.{number}", item
    for name, value in own.get("_modules", {}).items():
        if value is not None:
            yield owner, name, value


def _describe(found: Any, guard: Guard) -> str:
    if found is None:
        return "gone"
    kind = found.__class__.__name__  # not type(), which knows a proxy for what it is
    other = guard_of(found)
    if other is guard:
        return f"the raw {kind} that was behind it"
    if other is not None:
        return f"a {kind} with another guard, {other.name}"
    return f"a {kind} without a guard"
