"""Which weights networks have, as a few characters."""

import hashlib

import numpy as np
from torch import nn


def fingerprint(*modules: nn.Module) -> str:
    """Compute the SHA-256 of the weights of some modules, the same in whatever dtype they are."""
    digest = hashlib.sha256()
    for module in modules:
        for name, weight in module.state_dict().items():
            values = weight.float()
            digest.update(f"{name} {values.dtype} {list(values.shape)}".encode())
            digest.update(np.ascontiguousarray(values.numpy(force=True)).tobytes())
    return digest.hexdigest()
