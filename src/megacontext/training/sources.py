"""Where the sequences of a run come from, by its settings."""

from pathlib import Path

import numpy as np

from megacontext.config import MCConfig
from megacontext.data.recall import RecallSource
from megacontext.data.source import Source, load_corpus
from megacontext.data.tokenizer import has_tokenizer, tokenizer_of
from megacontext.training.train_config import TrainConfig


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
    if settings.data == "text":
        source: Source = load_corpus(
            [Path(p) for p in settings.text],
            model.sequence_tokens,
            tokenizer_of(model.language_model),
        )
    else:
        source = RecallSource(block_size=model.block_size, label_all=model.recipe.judged == "all")
        if model.horizon_tokens != source.horizon_tokens:
            raise ValueError(
                f"the answers of recall take {source.horizon_tokens} tokens, so horizon_tokens "
                f"must be that, not {model.horizon_tokens}"
            )
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
    if settings.data == "recall":
        for make in (source.batch, source.lm_batch):  # a length that is too short is refused here
            make(np.random.default_rng(0), 1, model.sequence_tokens)
    return source
