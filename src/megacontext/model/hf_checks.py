"""Whether a model of transformers reads entries as the library itself reads plain tokens.

Families differ in what they make of the positions that they are given: some count from another
number than 0, some count for themselves, some have none. Nothing of that raises, and a run on such
a model would train on wrong numbers. So each is tried, on a few tokens, when it is loaded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megacontext.model.hf_language_model import HFLanguageModel

_TOKENS, _POSITIONS = 8, 64  # that are read; of so many, where there are
_SAME = 1e-3  # of the largest logit: kernels sum in another order
_MOVED = 1e-5  # of it; what moves them less has no effect
_INSTEAD = "take a model of another family, such as Llama, Qwen or GPT-2"


def check_reading(path: Path, language_model: HFLanguageModel) -> None:
    """Refuse a model that reads plain tokens otherwise than in the library, or entries not at all.

    Args:
        path: Of the model, for messages.
        language_model: With its model on the CPU; modes are as they were afterwards.

    Raises:
        ValueError: It does; the message names the model's kind, what differs, and what to do.
    """
    model = language_model.model
    kind = f"{type(model).__name__} in {path}"
    reach = min(language_model.max_tokens or _POSITIONS, _POSITIONS)
    tokens = _plain_tokens(model.config.get_text_config(decoder=True), min(_TOKENS, reach // 2))
    half, gap = tokens.shape[1] // 2, reach - tokens.shape[1]
    with torch.no_grad(), _evaluating(model):
        try:
            library: Tensor = model(input_ids=tokens).logits[0]
        except Exception as error:
            raise ValueError(
                f"{kind} cannot be run by its library ({_line(error)}): put its config.json right"
            ) from error
        try:
            plain, moved, hidden = _read(language_model, tokens, half, gap)
            pieces = _read_in_pieces(language_model, tokens, half)
        except Exception as error:
            raise ValueError(
                f"{kind} cannot read entries at positions that it is given ({_line(error)}): "
                f"{_INSTEAD}"
            ) from error
    scale = float(library.abs().max())
    for ours, theirs, how in (
        (plain, library, "plain tokens"),
        (moved[:half], library[:half], "plain tokens before a gap"),
        (pieces, library, "plain tokens in two pieces, by its cache,"),
    ):
        difference = float((ours - theirs).abs().max())
        if not difference <= _SAME * scale:
            raise ValueError(
                f"{kind} reads {how} otherwise than in its library, with logits that differ by up "
                f"to {difference:.2g} where the largest is {scale:.2g}; it may count positions "
                f"from another number than 0: {_INSTEAD}"
            )
    for ours, what in ((moved, "the positions"), (hidden, "the attention mask")):
        if not float((ours - plain)[half:].abs().max()) > _MOVED * scale:
            raise ValueError(
                f"{kind} takes no notice of {what} that it is given, and a gist stands for more "
                f"than one token: {_INSTEAD}"
            )


def _read(
    language_model: HFLanguageModel, tokens: Tensor, half: int, gap: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Read plain tokens in three ways, in one batch.

    Returns:
        Logits ``[T, vocab_size]`` of plain tokens; with a gap; and with the first half hidden.
    """
    starts = torch.arange(tokens.shape[1]).repeat(3, 1)
    starts[1, half:] += gap
    pad_mask = torch.zeros_like(starts, dtype=torch.bool)
    pad_mask[2, :half] = True
    embeddings = language_model.embed(tokens.expand(3, -1))
    plain, moved, hidden = language_model(embeddings, starts, torch.ones_like(starts), pad_mask)
    return plain, moved, hidden


def _read_in_pieces(language_model: HFLanguageModel, tokens: Tensor, half: int) -> Tensor:
    """Read plain tokens as a session does; their logits ``[T, vocab_size]``."""
    seen = language_model.new_seen(tokens.shape[1])
    embeddings, starts = language_model.embed(tokens), torch.arange(tokens.shape[1])[None]
    logits = []
    for part in (slice(None, half), slice(half, None)):
        piece = starts[:, part]
        spans = torch.ones_like(piece)
        logits.append(language_model(embeddings[:, part], piece, spans, seen=seen)[0])
    return torch.cat(logits)


def _plain_tokens(config: Any, number: int) -> Tensor:
    """Take tokens ``[1, number]`` out of the middle of a vocabulary, but none that mean more."""
    special: set[int | None] = set()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        token = getattr(config, name, None)
        special |= set(token) if isinstance(token, list) else {token}
    plain = (i for i in range(config.vocab_size // 2, config.vocab_size) if i not in special)
    tokens = list(islice(plain, number)) or [0]
    return torch.tensor([(tokens * number)[:number]])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Let nothing be random in the block, as the routers of some mixtures of experts are."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
