"""CUDA graphs reuse output buffers: who made an output that is still in use, and who overwrites it.

A module compiled with CUDA graphs writes every call's outputs to the same memory. Two calls
without grad in one step, the first one's output still in use, are the pattern: torch raises an
error while it records, and in steady execution the numbers change silently. Its error names the
producer of the overwritten tensor and never the call that overwrote it; the guard knows both.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from lensnet_guard._torch_internals import mark_counter, uses_cuda_graphs
from lensnet_guard.errors import add_note
from lensnet_guard.record import CallRecord

_OVERWRITTEN = "has been overwritten by a subsequent run"  # torch 2.13, cudagraph_trees.py


class LensNetHazard(UserWarning):
    """An output of an earlier call is alive as a call starts that will overwrite it.

    Make it an error with ``warnings.simplefilter("error", LensNetHazard)``.
    """


class Outputs:
    """The outputs of one module's calls, while it is compiled with CUDA graphs."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._calls: list[tuple[CallRecord, list[StorageWeakRef]]] = []
        self._marks = mark_counter()

    def before(self, record: CallRecord) -> CallRecord | None:
        """The newest earlier call whose output this one will overwrite while it is in use.

        Warns:
            LensNetHazard: when there is one.
        """
        if not self._calls:
            return None
        if self._marks != mark_counter():  # the user says that a new step has begun
            self._marks = mark_counter()
            self._calls.clear()
            return None
        self._calls = [(call, s) for call, s in self._calls if any(map(_alive, s))]
        if record.grad_enabled or not self._calls or not uses_cuda_graphs(self._module):
            return None  # outputs that wait for a backward are kept apart by torch
        earlier = self._calls[-1][0]
        warnings.warn(
            f"{record.module}: an output of call {earlier.seq} at {earlier.caller} is still in use "
            f"as call {record.seq} at {record.caller} starts without grad. The module is compiled "
            "with CUDA graphs, so the second call writes over it. Copy what is still needed, or "
            "put both calls into one batch",
            LensNetHazard,
            stacklevel=4,
        )
        return earlier

    def after(self, record: CallRecord, result: Any) -> None:
        """Remember what a call gave out, as weakly as torch does."""
        if uses_cuda_graphs(self._module):
            make: Any = StorageWeakRef  # of a storage, and not of a tensor, which may be a view
            storages = [make(tensor.untyped_storage()) for tensor in _tensors(result)]
            self._calls.append((record, storages))

    def blame(self, error: BaseException) -> None:
        """Say on torch's error about an overwritten output which call made it and which wrote."""
        if len(self._calls) < 2 or _OVERWRITTEN not in str(error):
            return
        (first, _), (last, _) = self._calls[-2:]
        add_note(
            error,
            f"lensnet_guard: the output of call {first.seq} of {first.module} at {first.caller} "
            f"was overwritten by call {last.seq} at {last.caller}",
        )


def _alive(storage: Any) -> bool:
    return not storage.expired()


def _tensors(result: Any, depth: int = 3) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        if result.layout == torch.strided and not result.is_nested:
            yield result
    elif depth and isinstance(result, (tuple, list)):
        for item in result:
            yield from _tensors(item, depth - 1)
    elif depth and isinstance(result, dict):
        yield from _tensors(list(result.values()), depth - 1)
