"""Any causal language model of Hugging Face transformers in the place of our own.

The model reads entries as ``inputs_embeds``, each at the position of the last token that it covers:
so an entry and the token after it are one position apart, as in all that a pretrained model has
read, and an entry at position q predicts the token at q + 1. The library is imported only when such
a model is asked for.
"""

import inspect
import math
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from megacontext.config import MCConfig
from megacontext.files import reading
from megacontext.hf_checks import check_reading
from megacontext.language_model import LanguageModel, causal_mask_after
from megacontext.transformer import attention_mask

PRETRAINED_RATE = 3e-5  # peak learning rate; ours, for random weights, is a hundred times that
_ARGUMENTS = ("inputs_embeds", "attention_mask", "position_ids", "use_cache")
_CACHES = ("cache", "past_key_values")  # as transformers calls it now, and until its version 5
# What a run keeps of the folder: all but the weights, which are in its checkpoint.
_KEPT = (
    "config.json",
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("spiece.model", "sentencepiece*.model", "*.tiktoken"),
)


class HFLanguageModel(nn.Module):
    """A causal language model of transformers that reads tokens and gists side by side.

    Embeddings are given out divided by a constant near their standard deviation, and multiplied by
    it before the model reads them: GistNet and LensNet are made for a standard deviation of 1. It
    is a power of two, so tokens come back bit by bit as they were.

    Args:
        model: without dropout, with attention by SDPA; see `load_language_model`.

    Attributes:
        max_tokens: the most tokens that its positions reach.
    """

    scale: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        self._cache_name = _cache_name(model) or _CACHES[0]
        self.max_tokens: int | None = _max_tokens(self.model.config)
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
    def blocks(self) -> list[nn.Module]:
        """Its transformer blocks: what the library itself shards one by one."""
        names = self.model._no_split_modules or ()
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
        """The library's method, by its name now or that of its version 4."""
        now, before = (f"{kind}_checkpointing_{what}" for kind in ("activation", "gradient"))
        return getattr(self.model, now, None) or getattr(self.model, before)

    def new_seen(self, capacity: int) -> "HFSeen":
        """Nothing read yet; grows as it must, so ``capacity`` entries are no limit."""
        return HFSeen(self.model.config)

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 ``[B, N]`` to LOD0 embeddings ``[B, N, D]``."""
        embeddings: Tensor = self.embedding(tokens)
        return embeddings / self.scale

    def forward(
        self,
        inputs_embeds: Tensor,
        starts: Tensor,
        spans: Tensor,
        pad_mask: Tensor | None = None,
        seen: "HFSeen | None" = None,
    ) -> Tensor:
        """Next-token logits ``[B, W, vocab_size]`` of entries ``[B, W, D]``.

        Args:
            starts, spans: first token and number of tokens of each entry, int64 ``[B, W]``.
            pad_mask: bool ``[B, W]``, True at pads.
            seen: the entries before these, without pads; it takes up these.

        Raises:
            ValueError: pads together with ``seen``.
        """
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
        logits: Tensor = self.model(
            inputs_embeds=inputs_embeds * self.scale,
            attention_mask=mask,
            position_ids=starts + spans - 1,
            use_cache=seen is not None,
            **{self._cache_name: None if seen is None else seen.cache},
        ).logits
        return logits


class HFSeen:
    """The entries that a model has read: keys and values in the library's own cache.

    Args:
        config: of the model.
    """

    def __init__(self, config: Any) -> None:
        self.cache: Any = import_module("transformers").DynamicCache(config=config)

    @property
    def length(self) -> int:
        """How many there are."""
        return int(self.cache.get_seq_length())


AnyLanguageModel: TypeAlias = LanguageModel | HFLanguageModel


def new_language_model(config: MCConfig) -> AnyLanguageModel:
    """The language model that a configuration asks for, ours by default.

    Raises:
        ImportError: transformers is needed and not installed.
        FileNotFoundError, ValueError: no model, or one that does not fit; see
            `load_language_model`.
    """
    if not config.language_model:
        return LanguageModel(config.vocab_size, config.d_model, config.lm_layers, config.num_heads)
    check_language_model(config)
    return HFLanguageModel(load_language_model(config.language_model))


def language_model_sizes(path: str | Path) -> dict[str, int]:
    """The fields of `MCConfig` that a model decides: ``MCConfig(language_model=path, **sizes)``.

    ``num_heads`` are LensNet's too, and may be chosen otherwise.

    Raises:
        ImportError, FileNotFoundError, ValueError: see `new_language_model`.
    """
    config = _config(path)
    names = {
        "vocab_size": "vocab_size",
        "d_model": "hidden_size",
        "num_heads": "num_attention_heads",
        "lm_layers": "num_hidden_layers",
    }
    return {ours: getattr(config, name) for ours, name in names.items() if hasattr(config, name)}


def load_language_model(path: str | Path) -> nn.Module:
    """A causal language model of transformers, in float32 and without dropout.

    Without, because variants are compared by their losses: noise in them would be preferred.

    Args:
        path: a folder that ``save_pretrained`` made; or the ``config.json`` of one, for a model of
            that kind with random weights.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: there is no such folder.
        ValueError: its weights cannot be loaded or are not all there, or it is of a kind that
            cannot read working contexts, or reads plain tokens otherwise than in its library;
            named.
    """
    transformers, config, path = import_transformers(str(path)), _config(path), Path(path)
    _without_dropout(config)
    auto = transformers.AutoModelForCausalLM
    how = {"attn_implementation": "sdpa", "dtype": torch.float32}
    try:
        if path.is_file():
            model: nn.Module = auto.from_config(config, **how)
        else:
            model, found = auto.from_pretrained(
                path, config=config, local_files_only=True, output_loading_info=True, **how
            )
            if found["missing_keys"]:
                missing = sorted(found["missing_keys"])
                raise ValueError(f"{len(missing)} weights are not there, such as {missing[0]}")
    except MemoryError:
        raise
    except Exception as error:  # the library lets through whatever goes wrong within it
        raise ValueError(f"no causal language model can be made from {path}: {error}") from error
    _check_kind(path, model)
    check_reading(path, HFLanguageModel(model))
    return model


def kept_files(path: str) -> list[Path]:
    """What a run keeps of a model's folder, so that it needs the folder no more: sizes, tokenizer.

    Args:
        path: of `MCConfig.language_model`; "" for none.
    """
    if not path:
        return []
    folder = folder_of(path)
    return sorted({file for pattern in _KEPT for file in folder.glob(pattern) if file.is_file()})


def folder_of(path: str | Path) -> Path:
    """The folder of a model that is given by it or by its ``config.json``."""
    return Path(path).parent if Path(path).is_file() else Path(path)


def import_transformers(path: str) -> Any:
    """The library.

    Args:
        path: of the model that it is needed for.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return import_module("transformers")
    except ImportError as error:
        raise ImportError(
            f"the language model {path} needs the library transformers, which cannot be "
            f'imported ({error}): pip install "lensnet-guard[hf]"'
        ) from error


def _config(path: str | Path) -> Any:
    """The library's configuration of a model.

    Raises:
        FileNotFoundError, ValueError: there is none, or it cannot be read.
    """
    file = folder_of(path) / "config.json"
    if not file.is_file() or (Path(path).is_file() and Path(path).name != file.name):
        raise FileNotFoundError(
            f"language_model {str(path)!r} is no folder with a config.json: give one that "
            "model.save_pretrained(folder) made"
        )
    transformers = import_transformers(str(path))
    advice = "give the folder that model.save_pretrained made, or put the original back"
    with reading(file, advice):
        config = transformers.AutoConfig.from_pretrained(file.parent, local_files_only=True)
        return config.get_text_config(decoder=True)


def check_language_model(config: MCConfig) -> None:
    """Refuse a configuration that does not fit the language model that it names; loads no weights.

    Raises:
        ImportError, FileNotFoundError: there is no library, or no model.
        ValueError: naming what would fit.
    """
    if not config.language_model:
        return
    path, theirs = config.language_model, _config(config.language_model)
    for name, size in (("d_model", theirs.hidden_size), ("vocab_size", theirs.vocab_size)):
        if getattr(config, name) != size:
            raise ValueError(
                f"{name} is {getattr(config, name)}, but the language model in {path} has {size}: "
                f"set {name} to that, or leave it out"
            )
    reach = _max_tokens(theirs)
    if reach is not None and config.sequence_tokens > reach:
        raise ValueError(
            f"sequence_tokens {config.sequence_tokens} reaches beyond the {reach} positions of the "
            f"language model in {path} (max_position_embeddings); shorten the sequences"
        )


def _check_kind(path: Path, model: Any) -> None:
    """Refuse what cannot read entries at positions of its own with full causal attention.

    Raises:
        ValueError: saying why.
    """
    kind, config = type(model).__name__, model.config.get_text_config(decoder=True)
    lacks = [name for name in _ARGUMENTS if name not in inspect.signature(model.forward).parameters]
    lacks += [] if _cache_name(model) else ["cache"]
    if lacks:
        raise ValueError(
            f"{kind} in {path} cannot read a working context: it takes no {', '.join(lacks)}"
        )
    layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if not layers and getattr(config, "sliding_window", None):
        layers = {"sliding_attention"}
    if layers:
        raise ValueError(
            f"{kind} in {path} has layers of {', '.join(sorted(layers))}: how far back they look "
            "is counted in tokens, and entries stand for more than one; full attention is needed"
        )
    shape = list(model.get_input_embeddings().weight.shape)
    if shape != [config.vocab_size, config.hidden_size]:
        raise ValueError(
            f"{kind} in {path} has embeddings {shape}, and vocab_size and hidden_size "
            f"{[config.vocab_size, config.hidden_size]}: what it reads must be what it embeds"
        )


def _cache_name(model: Any) -> str | None:
    """What the model's forward calls its cache; None where it has none."""
    known = inspect.signature(model.forward).parameters
    return next((name for name in _CACHES if name in known), None)


def _max_tokens(config: Any) -> int | None:
    reach: int | None = getattr(config, "max_position_embeddings", None)
    return reach


def _without_dropout(config: Any) -> None:
    values: Mapping[str, object] = config.to_dict()
    for name, value in values.items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop")):
            setattr(config, name, 0.0)
