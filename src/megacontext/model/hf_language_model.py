"""A causal language model of Hugging Face transformers in the place of our own.

The model reads entries as ``inputs_embeds``, each at the position of the last token that it covers:
so an entry and the token after it are one position apart, as in all that a pretrained model has
read, and an entry at position q predicts the token at q + 1.
"""

import inspect
import math
from importlib import import_module
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from megacontext.model.language_model import LanguageModel, causal_mask_after
from megacontext.model.transformer import attention_mask

_CACHES = ("cache", "past_key_values")  # as transformers calls it now, and until its version 5


class HFLanguageModel(nn.Module):
    """A causal language model of transformers that reads tokens and gists side by side.

    Embeddings are given out divided by a constant near their standard deviation, and multiplied by
    it before the model reads them: GistNet and LensNet are made for a standard deviation of 1. It
    is a power of two, so tokens come back bit by bit as they were.

    Args:
        model: Without dropout, with attention by SDPA; see `hf_loading.load_language_model`.

    Attributes:
        model: The same.
        max_tokens: The most tokens that its positions reach; None where they have no end.
        scale: The constant.
    """

    scale: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        self._cache_name = cache_name(model) or _CACHES[0]
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.max_tokens: int | None = max_tokens(self.model.config)
        deviation = float(self.embedding.weight.detach().float().square().mean().sqrt())
        scale = 2.0 ** round(math.log2(deviation)) if deviation > 0 else 1.0
        self.register_buffer("scale", torch.tensor(scale))
        self._recompute = False

    @property
    def embedding(self) -> nn.Embedding:
        """The token embeddings, ``[vocab_size, D]``."""
        embedding: nn.Embedding = self.model.get_input_embeddings()
        return embedding

    @property
    def dtype(self) -> torch.dtype:
        """Of the embeddings that it gives out and reads, whatever its weights are held in."""
        return self.scale.dtype

    @property
    def blocks(self) -> list[nn.Module]:
        """Its transformer blocks: what the library itself shards one by one."""
        names = getattr(self.model, "_no_split_modules", None) or ()
        return [module for module in self.model.modules() if type(module).__name__ in names]

    @property
    def recompute(self) -> bool:
        """Whether blocks run twice, to keep less for backward. Sessions are not affected."""
        return self._recompute

    @recompute.setter
    def recompute(self, recompute: bool) -> None:
        if recompute:
            # Nothing in a block is random, so there is no random state to keep.
            how = {"use_reentrant": False, "preserve_rng_state": False}
            self._checkpointing("enable")(how)
        elif self._recompute:
            self._checkpointing("disable")()
        self._recompute = recompute

    def _checkpointing(self, what: str) -> Any:
        """Return the library's method, by its name now or that of its version 4."""
        now, before = (f"{kind}_checkpointing_{what}" for kind in ("activation", "gradient"))
        return getattr(self.model, now, None) or getattr(self.model, before)

    def new_seen(self, capacity: int) -> "HFSeen":
        """Return what has read nothing yet; it grows as it must, so ``capacity`` is no limit."""
        return HFSeen(self.model.config)

    def embed(self, tokens: Tensor) -> Tensor:
        """Turn tokens, int64 ``[B, N]``, into LOD0 embeddings ``[B, N, D]``."""
        embeddings: Tensor = self.embedding(tokens)
        return embeddings.to(self.dtype) / self.scale

    def forward(
        self,
        inputs_embeds: Tensor,
        starts: Tensor,
        spans: Tensor,
        pad_mask: Tensor | None = None,
        seen: "HFSeen | None" = None,
        last: int | None = None,
    ) -> Tensor:
        """Predict what follows each entry, as `LanguageModel.forward` does, with any room."""
        if seen is not None and pad_mask is not None:
            raise ValueError("entries that are read one after another must not be padded")
        if self._recompute and torch.is_grad_enabled():
            self.model.train()  # the library recomputes in this mode alone; there is no dropout
        elif self._recompute:
            self.model.eval()  # and takes no cache in the other
        # A mask of four dimensions is taken as it is. Without one the library takes positions that
        # are not consecutive for several sequences packed into one, which do not see each other;
        # and for one of two dimensions the host waits for the device.
        mask = attention_mask(pad_mask, causal=True)
        if mask is None:
            mask = causal_mask_after(0 if seen is None else seen.length, inputs_embeds)
        keep = {} if last is None or not self._keeps_logits else {"logits_to_keep": last}
        logits: Tensor = self.model(
            inputs_embeds=(inputs_embeds * self.scale).to(self.embedding.weight.dtype),
            attention_mask=mask,
            position_ids=starts + spans - 1,
            use_cache=seen is not None,
            **{self._cache_name: None if seen is None else seen.cache},
            **keep,
        ).logits
        logits = logits if last is None else logits[:, -last:]
        return logits.to(inputs_embeds.dtype)


class HFSeen:
    """The entries that a model has read: keys and values in the library's own cache.

    Args:
        config: Of the model.

    Attributes:
        cache: The library's.
    """

    def __init__(self, config: Any) -> None:
        self.cache: Any = import_module("transformers").DynamicCache(config=config)

    @property
    def length(self) -> int:
        """How many there are."""
        return int(self.cache.get_seq_length())


AnyLanguageModel: TypeAlias = LanguageModel | HFLanguageModel


def cache_name(model: Any) -> str | None:
    """Return what the model's forward calls its cache; None where it has none."""
    known = inspect.signature(model.forward).parameters
    return next((name for name in _CACHES if name in known), None)


def max_tokens(config: Any) -> int | None:
    """Return the most tokens that the positions of a model reach; None for no end."""
    reach: int | None = getattr(config, "max_position_embeddings", None)
    return reach
