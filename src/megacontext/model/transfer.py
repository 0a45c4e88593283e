"""From the host to the device without making the host wait."""

import torch
from torch import Tensor


def new_host(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Make an int64 tensor on the host, to be filled and given to `to_device`.

    It is pinned from the start for a CUDA device, which saves a copy of its own.

    Args:
        shape: Of the tensor.
        device: That it is going to.

    Returns:
        The tensor; what it holds is undefined.
    """
    return torch.empty(shape, dtype=torch.int64, pin_memory=device.type == "cuda")


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, whose copy is queued there when it comes from the host.

    A copy out of ordinary memory makes the host wait for the device; one out of pinned memory does
    not, and torch keeps that memory until the copy is done.

    Args:
        host: The tensor.
        device: Where it is to go.

    Returns:
        The tensor there.
    """
    if device.type == "cuda" and host.device.type == "cpu":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)
