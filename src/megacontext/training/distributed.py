"""One run on several processes, as torchrun starts them.

The settings of a run say what is computed, the processes only share the work: each does its part
of an optimizer step's micro-steps, and the gradients are averaged, by DDP or by FSDP2.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from megacontext.controller import MCController
from megacontext.training.train_config import TrainConfig

_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Attributes:
        rank: Which of them this is; the first one, 0, writes the files.
        size: How many there are.
        hosts: The group in which their hosts talk, which no device waits for; None for torch's own.
    """

    rank: int = 0
    size: int = 1
    hosts: "dist.ProcessGroup | None" = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes; they must call it together."""
        if self.size == 1:
            return tensor
        total = torch.empty_like(tensor).copy_(tensor)
        dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Tell whether it is true on any of the processes; they must call it together."""
        if self.size == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.hosts)
        return bool(flags)

    def check(self, settings: TrainConfig) -> None:
        """Refuse work that cannot be shared.

        Args:
            settings: Of the run.

        Raises:
            ValueError: It cannot; says what to change.
        """
        shared = ["accumulation"]
        shared += ["lm_batch_size"] if settings.lm_steps else []
        shared += ["gist_batch_size"] if settings.gist_steps else []
        for name in shared:
            if (value := getattr(settings, name)) % self.size:
                raise ValueError(
                    f"{name} is {value}, which {self.size} processes cannot share equally; make it "
                    f"a multiple of {self.size}"
                )
        if self.size > 1 and settings.device.startswith("cuda:"):
            raise ValueError(
                f"{self.size} processes cannot share {settings.device}: give the device as cuda, "
                "and each takes one of its own"
            )
        if settings.shard and self.size == 1:
            raise ValueError(
                "shard needs more than one process: start them with "
                "torchrun --nproc-per-node N -m megacontext train ..."
            )


@contextmanager
def joined_world(device: torch.device) -> Iterator[World]:
    """Join the processes that torchrun has started; a world of one where it has not.

    Args:
        device: Of this process; CUDA devices communicate by NCCL, anything else by gloo.

    Yields:
        The processes.

    Raises:
        RuntimeError: The processes do not find each other.
    """
    joined = dist.is_initialized()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not joined:
        yield World()
        return
    if not joined and device.type == "cuda":
        torch.cuda.set_device(device)  # or every process would keep memory on the first one too
        dist.init_process_group("nccl", device_id=device)
    elif not joined:
        dist.init_process_group("gloo")
    # torch.distributed by itself may have hosts talk through their devices, by NCCL.
    hosts = None if "gloo" in dist.get_backend() else dist.new_group(backend="gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), hosts)
    finally:
        if not joined:
            dist.destroy_process_group()
        elif hosts is not None:
            dist.destroy_process_group(hosts)


def device_name(device: str) -> str:
    """Return this process's device: of several for CUDA, the one that torchrun means for it."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device == "cuda" and local is not None else device


class _Calls(nn.Module):
    """Any method of a controller as a forward, which is where DDP and FSDP2 come in.

    Args:
        trained: Whose gradients there are.
    """

    def __init__(self, trained: nn.Module) -> None:
        super().__init__()
        self.trained = trained  # of the controller no more, lest its other parameters are awaited

    def forward(self, method: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call the method."""
        return method(*args, **kwargs)


class DataParallel:
    """Calls methods of a controller so that the gradients of all processes are averaged.

    Args:
        mc: The controller; its weights are sharded in place where that is wanted.
        world: The processes.
        shard: By FSDP2 instead of DDP: every process keeps only its part of weights, gradients and
            optimizer state.
    """

    def __init__(self, mc: MCController, world: World, *, shard: bool) -> None:
        self._alone = world.size == 1
        self._module: Any = _Calls(mc)
        self._shard = shard
        if shard:
            from torch.distributed.fsdp import fully_shard  # half a second that others do not need

            for block in mc.language_model.blocks:
                fully_shard(block)
            fully_shard(self._module)

    def train(self, trained: nn.Module) -> None:
        """From now on, make gradients of ``trained``, each in every backward."""
        if not (self._alone or self._shard):
            self._module = DistributedDataParallel(_Calls(trained))

    def __call__(self, method: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call a method of the controller.

        Args:
            method: Bound to the controller.
            *args: Its arguments.
            **kwargs: Its keyword arguments.

        Returns:
            What it returns.
        """
        result: _T = self._module(method, *args, **kwargs)
        return result

    @contextmanager
    def adding_up(self, *, last: bool) -> Iterator[None]:
        """Open a micro-step's forward and backward: gradients travel after the last one.

        Args:
            last: Whether this is the last micro-step of its optimizer step.
        """
        module = self._module
        if self._shard:
            module.set_requires_gradient_sync(last)
        by_ddp = isinstance(module, DistributedDataParallel)
        with module.no_sync() if by_ddp and not last else nullcontext():
            yield


# Whole states of what is sharded -----------------------------------------------------------------


def gathered(state: dict[str, Any], *, keep: bool) -> dict[str, Any]:
    """Make every sharded tensor of a state dict whole; all processes must call it together.

    One tensor after another, each on the host as soon as it is whole: no device holds them all.

    Args:
        state: Of a model or an optimizer.
        keep: Whether this process wants them.

    Returns:
        The state; without its sharded tensors where they are not wanted.
    """

    def gather(leaf: Any) -> Any:
        if not _is_sharded(leaf):
            return leaf
        whole = leaf.full_tensor()
        return whole.cpu() if keep else None

    whole: dict[str, Any] = tree_map(gather, state)
    return whole


def load_weights(learned: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load whole weights into networks, sharded or not."""
    own = learned.state_dict()
    learned.load_state_dict({name: _as(tensor, own[name]) for name, tensor in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a whole state into an optimizer, whose parameters are sharded or not."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, values in state["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            values[name] = _as(values[name], parameters[number])
    optimizer.load_state_dict(state)


def _as(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard a whole tensor as another one is."""
    if not _is_sharded(like) or _is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    return distribute_tensor(tensor.to(like.device), sharded.device_mesh, sharded.placements)


def local_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor: all of it, unless it is sharded."""
    sharded: Any = tensor
    part: Tensor = sharded.to_local() if _is_sharded(tensor) else tensor
    return part


def _is_sharded(value: object) -> bool:
    """Tell a DTensor by what those alone have, lest the class is imported."""
    return hasattr(value, "full_tensor")
