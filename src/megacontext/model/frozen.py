"""A language model that is read and not trained: its dtype, its contract, its identity.

Its weights have no gradients and no optimizer state, and no checkpoint holds them: they can be had
again from where they came, and a run knows them by their SHA-256.
"""

import hashlib
from pathlib import Path

import torch
from torch import nn

from lensnet_guard import Call, CallPolicy, Scope, frozen
from megacontext.model.hf_language_model import HFLanguageModel

VARIANTS = "variants"  # the scope of the one call of a micro-step

_CPU_INFO = Path("/proc/cpuinfo")
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of x86 and of ARM


def freeze(language_model: HFLanguageModel) -> None:
    """Take a model's weights out of training, and hold them in bfloat16 where that is faster.

    Args:
        language_model: It goes on giving out embeddings in the dtype that they had.
    """
    language_model.model.requires_grad_(False)
    if has_fast_bfloat16():
        # Weights alone: the library keeps the frequencies of positions in buffers, in float32
        # whatever its weights are in, and rounded they would turn far positions by whole radians.
        for weight in language_model.model.parameters():
            weight.data = weight.data.to(torch.bfloat16)


def has_fast_bfloat16() -> bool:
    """Tell whether this machine multiplies in bfloat16, on its GPU or else on its CPU."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        words = set(_CPU_INFO.read_text().split())
    except OSError:
        return False
    return not words.isdisjoint(_BFLOAT16_FLAGS)


def no_trainable_weights(call: Call) -> str | None:
    """No weight of the module is to be trained.

    It stops whoever turns gradients on again before a weight has moved.

    Args:
        call: As it begins.

    Returns:
        None, or the first weight that requires grad.
    """
    found = (name for name, weight in call.module.named_parameters() if weight.requires_grad)
    name = next(found, None)
    return None if name is None else f"the parameter {name} requires grad"


vars(no_trainable_weights)["mistake"] = "moved-weights"


FROZEN = CallPolicy(
    scopes={VARIANTS: Scope(1)},
    requires=(frozen, no_trainable_weights),
    # Of the library's model no part is looked at as it runs: trees run its embedding alone, and it
    # would take 0.6 ms of each token of a session.
    shared_submodules=("model",),
)
"""The contract of a frozen model: one call in each micro-step, of weights that stay."""


def weights_sha256(language_model: nn.Module) -> str:
    """Compute the SHA-256 of a model's weights, rounded to bfloat16: the same in either dtype."""
    digest = hashlib.sha256()
    for name, weight in language_model.named_parameters():
        digest.update(f"{name} {list(weight.shape)}".encode())
        bits = weight.detach().to(torch.bfloat16).contiguous().view(torch.int16)
        digest.update(bits.numpy(force=True).tobytes())
    return digest.hexdigest()
