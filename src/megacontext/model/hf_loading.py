"""Loads language models of Hugging Face transformers, and refuses those that cannot be read.

The library is imported only when such a model is asked for.
"""

import inspect
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megacontext.config import MCConfig
from megacontext.files import reading
from megacontext.model.frozen import freeze
from megacontext.model.gguf import is_converted, located
from megacontext.model.hf_checks import check_reading
from megacontext.model.hf_language_model import (
    AnyLanguageModel,
    HFLanguageModel,
    cache_name,
    max_tokens,
)
from megacontext.model.language_model import LanguageModel

PRETRAINED_RATE = 3e-5  # peak learning rate; ours, for random weights, is a hundred times that
_ARGUMENTS = ("inputs_embeds", "attention_mask", "position_ids", "use_cache")
# What a run keeps of the folder: all but the weights, which are in its checkpoint.
_KEPT = (
    "config.json",
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("spiece.model", "sentencepiece*.model", "*.tiktoken"),
)


def new_language_model(config: MCConfig) -> AnyLanguageModel:
    """Make the language model that a configuration asks for, ours by default.

    Args:
        config: Sizes.

    Returns:
        The model.

    Raises:
        ImportError: transformers is needed and not installed.
        FileNotFoundError: There is no such model.
        ValueError: It does not fit; see `load_language_model`.
    """
    if not config.language_model:
        return LanguageModel(config.vocab_size, config.d_model, config.lm_layers, config.num_heads)
    check_language_model(config)
    language_model = HFLanguageModel(load_language_model(config.language_model))
    if config.freeze_language_model:
        freeze(language_model)
    return language_model


def language_model_sizes(path: str | Path) -> dict[str, int]:
    """Read the fields of `MCConfig` that a model decides.

    They are for ``MCConfig(language_model=path, **sizes)``. ``num_heads`` are LensNet's too, and
    may be chosen otherwise.

    Args:
        path: Of the model, as ``MCConfig.language_model``.

    Returns:
        The sizes, by the names of the fields.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: There is no such model.
        ValueError: Its configuration is damaged.
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
    """Load a causal language model of transformers, in float32 and without dropout.

    Without, because variants are compared by their losses: noise in them would be preferred.

    Args:
        path: A folder that ``save_pretrained`` made; or the ``config.json`` of one, for a model of
            that kind with random weights; or what `located` converts.

    Returns:
        The library's model.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: There is no such folder.
        ValueError: Its weights cannot be loaded or are not all there, or it is of a kind that
            cannot read working contexts, or reads plain tokens otherwise than in its library;
            named.
    """
    transformers, config = import_transformers(str(path)), _config(path)
    anew, path = _anew(path), located(path)
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
        found = str(error).rstrip(".") + anew
        raise ValueError(f"no causal language model can be made from {path}: {found}") from error
    _check_kind(path, model)
    check_reading(path, HFLanguageModel(model))
    return model


def kept_files(path: str) -> list[Path]:
    """List what a run keeps of a model's folder, so that it needs the folder no more.

    Args:
        path: Of the model, as ``MCConfig.language_model``; "" for none.

    Returns:
        Files that hold its sizes and its tokenizer.
    """
    if not path:
        return []
    folder = folder_of(path)
    return sorted({file for pattern in _KEPT for file in folder.glob(pattern) if file.is_file()})


def folder_of(path: str | Path) -> Path:
    """Return the folder of a model that is given by it or by its ``config.json``, or converted."""
    path = located(path)
    return path.parent if path.is_file() else path


def import_transformers(path: str) -> Any:
    """Import the library.

    Args:
        path: Of the model that it is needed for.

    Returns:
        The module.

    Raises:
        ImportError: It is not installed.
    """
    try:
        return import_module("transformers")
    except ImportError as error:
        raise ImportError(
            f"the language model {path} needs the library transformers, which cannot be "
            f'imported ({error}): pip install "lensnet-guard[hf]"'
        ) from error


def _anew(path: str | Path) -> str:
    """Say what to do about files of a model that are damaged, if they are of our own making."""
    return ": remove that folder, and it is converted anew" if is_converted(path) else ""


def _config(path: str | Path) -> Any:
    """Read the library's configuration of a model.

    Raises:
        FileNotFoundError: There is none.
        DamagedFileError: It cannot be read.
    """
    at = located(path)
    file = folder_of(at) / "config.json"
    if not file.is_file() or (at.is_file() and at.name != file.name):
        found = f"{at} holds no config.json any more{_anew(path)}"
        if not is_converted(path):
            found = (
                f"language_model {str(path)!r} is no folder with a config.json: give one that "
                "model.save_pretrained(folder) made"
            )
        raise FileNotFoundError(found)
    transformers = import_transformers(str(path))
    advice = "give the folder that model.save_pretrained made, or put the original back"
    advice = _anew(path).removeprefix(": ") or advice
    with reading(file, advice):
        config = transformers.AutoConfig.from_pretrained(file.parent, local_files_only=True)
        return config.get_text_config(decoder=True)


def check_language_model(config: MCConfig) -> None:
    """Refuse a configuration that does not fit the language model that it names; loads no weights.

    Args:
        config: Of our model.

    Raises:
        ImportError: transformers is needed and not installed.
        FileNotFoundError: There is no such model.
        ValueError: It does not fit; the message names what would.
    """
    if not config.language_model:
        return
    path, theirs = config.language_model, _config(config.language_model)
    if config.freeze_language_model and not is_converted(path) and Path(path).is_file():
        raise ValueError(
            f"freeze_language_model keeps the weights of the language model, and {path} stands for "
            "random ones: give the folder instead, or leave one of them out"
        )
    for name, size in (("d_model", theirs.hidden_size), ("vocab_size", theirs.vocab_size)):
        if getattr(config, name) != size:
            raise ValueError(
                f"{name} is {getattr(config, name)}, but the language model in {path} has {size}: "
                f"set {name} to that, or leave it out"
            )
    reach = max_tokens(theirs)
    if reach is not None and config.sequence_tokens > reach:
        raise ValueError(
            f"sequence_tokens {config.sequence_tokens} reaches beyond the {reach} positions of the "
            f"language model in {path} (max_position_embeddings); shorten the sequences"
        )


def _check_kind(path: Path, model: Any) -> None:
    """Refuse what cannot read entries at positions of its own with full causal attention.

    Raises:
        ValueError: It is of such a kind; says why.
    """
    kind, config = type(model).__name__, model.config.get_text_config(decoder=True)
    lacks = [name for name in _ARGUMENTS if name not in inspect.signature(model.forward).parameters]
    lacks += [] if cache_name(model) else ["cache"]
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


def _without_dropout(config: Any) -> None:
    values: Mapping[str, object] = config.to_dict()
    for name, value in values.items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop")):
            setattr(config, name, 0.0)
