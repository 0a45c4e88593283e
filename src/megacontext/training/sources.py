"""Where the sequences of a run come from, by its settings."""

from pathlib import Path

import numpy as np

from megacontext.allocators.cut import kept_tokens
from megacontext.config import MCConfig
from megacontext.data.documents import Documents, read_documents, split_documents
from megacontext.data.mixture import MixedSource
from megacontext.data.mqar import MQARSource, number_symbols, word_symbols
from megacontext.data.needles import NeedleSource, reference_manual
from megacontext.data.recall import RecallSource
from megacontext.data.source import Source, load_corpus
from megacontext.data.tokenizer import Tokenizer, has_tokenizer, tokenizer_of
from megacontext.data.windows import TRIES, WindowSource
from megacontext.training.train_config import TrainConfig

_SHARES = {"reuse": 0.5, "files": 0.2, "needles": 0.15, "mqar": 0.15}
_PLACED = ("needles", "mqar", "mixed")  # facts stand in blocks, so the sequence must be kept whole


def load_source(settings: TrainConfig, model: MCConfig) -> Source:
    """Load where the sequences of a run come from.

    Args:
        settings: Of the run.
        model: Sizes.

    Returns:
        The source.

    Raises:
        FileNotFoundError: A text that does not exist.
        ValueError: Too little text, or a model that does not fit the data.
    """
    source = _source(settings, model)
    if model.vocab_size < source.vocab_size and has_tokenizer(model.language_model):
        raise ValueError(
            f"the language model in {model.language_model} embeds {model.vocab_size} tokens, and "
            f"the tokenizer beside it has ids up to {source.vocab_size - 1}: put the tokenizer "
            "there that the model was trained with, or give the model more embeddings "
            f"(model.resize_token_embeddings({source.vocab_size}))"
        )
    if model.vocab_size < source.vocab_size:
        raise ValueError(
            f"tokens of {settings.data} are below {source.vocab_size}, so vocab_size must be at "
            f"least that, not {model.vocab_size}"
        )
    if settings.data in _PLACED or settings.kept_sequences:
        _check_kept(settings.data, model)
    if settings.data != "text":
        parts = source.sources.values() if isinstance(source, MixedSource) else [source]
        for part in parts:
            for make in (part.batch, part.lm_batch, part.held_out_batch):
                # A length that is too short is refused here.
                make(np.random.default_rng(0), 1, model.sequence_tokens)
    return source


def _source(settings: TrainConfig, model: MCConfig) -> Source:
    paths, tokenizer = [Path(p) for p in settings.text], tokenizer_of(model.language_model)
    recent, horizon = model.recent_tokens, model.horizon_tokens
    if settings.data == "text":
        return load_corpus(paths, model.sequence_tokens, tokenizer)
    if settings.data in ("files", "reuse"):
        return _windows(read_documents(paths, tokenizer), model)[settings.data]
    if settings.data == "needles":
        return NeedleSource(_prose(paths, tokenizer), model.block_size, recent, horizon)
    if settings.data == "mqar":
        return _mqar(model, tokenizer)
    if settings.data == "mixed":
        prose = NeedleSource(_prose([], tokenizer), model.block_size, recent, horizon)
        windows = _windows(read_documents(paths, tokenizer), model)
        return MixedSource(windows | {"needles": prose, "mqar": _mqar(model, tokenizer)}, _SHARES)
    source = RecallSource(block_size=model.block_size, label_all=model.recipe.judged == "all")
    if horizon != source.horizon_tokens:
        raise ValueError(
            f"the answers of recall take {source.horizon_tokens} tokens, so horizon_tokens "
            f"must be that, not {horizon}"
        )
    return source


def _windows(documents: Documents, model: MCConfig) -> dict[str, Source]:
    """Return windows of either kind of the same files."""
    tail = model.recent_tokens, model.horizon_tokens
    return {
        "reuse": WindowSource(documents, *tail, TRIES),
        "files": WindowSource(documents, *tail),
    }


def _prose(paths: list[Path], tokenizer: Tokenizer) -> Documents:
    if paths:
        return read_documents(paths, tokenizer)
    return split_documents(reference_manual(), tokenizer)


def _mqar(model: MCConfig, tokenizer: Tokenizer) -> MQARSource:
    """Pairs of words where tokens are words; of numbers, the same for both parts, where not."""
    if has_tokenizer(model.language_model):
        of_words: Tokenizer | None = tokenizer
        training, held_out = word_symbols(tokenizer)
    else:  # whoever learns embeddings from nothing knows none that it never saw
        of_words, training = None, number_symbols(model.vocab_size)
        held_out = training
    return MQARSource(
        training=training,
        held_out=held_out,
        vocab_size=tokenizer.vocab_size if of_words else model.vocab_size,
        block_size=model.block_size,
        recent_tokens=model.recent_tokens,
        horizon_tokens=model.horizon_tokens,
        tokenizer=of_words,
    )


def _check_kept(data: str, model: MCConfig) -> None:
    """Refuse sequences that are trimmed: their blocks would not be where facts were put.

    Raises:
        ValueError: They are; names the nearest lengths that are not.
    """
    length, k = model.sequence_tokens, model.block_size
    kept = kept_tokens(length, model.train_wc_length, k)
    if kept != length:
        raise ValueError(
            f"sequences of {data} must not be trimmed, and of {length} tokens a working context of "
            f"{model.train_wc_length} entries keeps {kept}: set sequence_tokens to {kept} or "
            f"{kept + k - 1}"
        )
