"""Checksums of tensors' bits, taken where the tensors are, and read with one wait."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import islice

import torch

from lensnet_guard.calls.tensors import plain, read

_LANES = 2**20  # that are multiplied at once: 8 MiB of products
# Bits are read as integers of 32 bits at most, so that no sign is lost in a product's overflow.
_LANE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32, 16: torch.int32}


@torch.no_grad()
def checksums(tensors: Sequence[torch.Tensor]) -> list[tuple[int, ...]]:
    """Return a checksum of each tensor's bits: equal for the same bits in the same order.

    Others are equal with a chance of about 2⁻³². It tells accidents, not forgeries. It reads the
    values, and so waits for each device once.

    Args:
        tensors: Of any dtype, layout in memory and device, empty ones too.

    Raises:
        RuntimeError, NotImplementedError: There is one whose values cannot be read.
    """
    sums = [[total for part in plain(tensor) for total in _sums(part)] for tensor in tensors]
    values = iter(read([total for own in sums for total in own]))
    return [tuple(islice(values, len(own))) for own in sums]


def _sums(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the sums of a tensor's bits, each times a random number, a scalar for a stretch."""
    if tensor.is_quantized:  # torch crashes where it looks at the bits itself
        tensor = tensor.int_repr()
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    lanes = flat.view(_LANE[flat.dtype.itemsize])
    factors = _factors(lanes.device)
    parts = (lanes[start : start + _LANES] for start in range(0, len(lanes), _LANES))
    return [(part * factors[: len(part)]).sum() for part in parts]


@lru_cache(maxsize=16)
def _factors(device: torch.device) -> torch.Tensor:
    """Return `_LANES` random numbers, the same in every process; nobody's generator is moved."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    numbers = torch.randint(low, high, (_LANES,), generator=generator, device="cpu")
    return numbers.to(device)
