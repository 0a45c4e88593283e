"""The three networks of a model, with LensNet guarded: what training and sessions are made of."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lensnet_guard import CallPolicy, Guard, MicroStep, guard_module, guard_of
from megacontext.config import MCConfig
from megacontext.model.frozen import FROZEN, VARIANTS
from megacontext.model.gistnet import GistNet, WeightedGistNet
from megacontext.model.hf_language_model import AnyLanguageModel
from megacontext.model.hf_loading import new_language_model
from megacontext.model.late_interaction import LateInteractionLensNet
from megacontext.model.lensnet import LensNet
from megacontext.model.tokens import check_batch
from megacontext.model.working_context import NO_LABEL, WorkingContext

PREFERENCE_SCORER = "preference_scorer"
AnyLensNet: TypeAlias = LensNet | LateInteractionLensNet

_NUMBERS = 2**26  # computed at once: a quarter of a GiB in single precision


class Networks(nn.Module):
    """Language model, GistNet and guarded LensNet, made by a configuration.

    Args:
        config: Sizes; checked when it was made.
        bf16: Run forward passes of training and validation under autocast to bfloat16. Losses are
            computed in the dtype of the weights.

    Attributes:
        config: The same.
        bf16: The same.
        language_model: Reads entries, and predicts what follows each; guarded where it is frozen.
        gistnet: Makes gists.
        lensnet: The guarded proxy; `guard` is its guard.

    Raises:
        ImportError: ``config.language_model`` needs a library that is not installed.
        FileNotFoundError: There is no such language model.
        ValueError: It cannot be used.
    """

    def __init__(self, config: MCConfig, *, bf16: bool = False) -> None:
        super().__init__()
        self.config = config
        self.bf16 = bf16
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)  # not the generators of devices
            # The first, for checkpoints know parameters by their order.
            language_model = new_language_model(config)
            self.language_model = _guarded_if_frozen(language_model, config)
            centre = _mean_embedding(language_model)
            self.gistnet = _new_gistnet(config, centre)
            lensnet = _new_lensnet(config, centre)
        policy = CallPolicy(scopes={PREFERENCE_SCORER: 1})
        self.lensnet: AnyLensNet = guard_module(lensnet, policy=policy, mode="enforce").module

    @property
    def guard(self) -> Guard:
        """LensNet's guard: contexts, records, counts."""
        guard = guard_of(self.lensnet)
        if guard is None:
            raise RuntimeError(
                "mc.lensnet is no longer guarded: something replaced it by a raw module. "
                "Assign a guarded one: mc.lensnet = guard_module(lensnet).module"
            )
        return guard

    @property
    def learned(self) -> nn.Module:
        """What training changes, by the names that it has here: all but what is frozen."""
        if not self.config.freeze_language_model:
            return self
        parts = {n: part for n, part in self.named_children() if n != "language_model"}
        return nn.ModuleDict(parts)

    @contextmanager
    def context(self, context: str) -> Iterator[None]:
        """Declare a context for a block: ``"training"`` or ``"inference"``."""
        with ExitStack() as blocks:
            for guard in self._guards:
                blocks.enter_context(guard.context(context))  # type: ignore[arg-type]  # checked
            yield

    @contextmanager
    def micro_step(
        self, step: int, micro_step: int, *, reads_variants: bool = True
    ) -> Iterator[MicroStep]:
        """Open a training micro-step; yields LensNet's part of the records.

        Args:
            step: Number of the optimizer step.
            micro_step: Number of the micro-batch within it.
            reads_variants: Whether the language model is to be called in it; if not, one that is
                frozen may not be.

        Yields:
            LensNet's part of the records.
        """
        guards = self._guards if reads_variants else [self.guard]
        with ExitStack() as blocks:
            ledgers = [blocks.enter_context(g.micro_step(step, micro_step)) for g in guards]
            yield ledgers[0]

    def language_model_step(self, step: int) -> AbstractContextManager[object]:
        """Open a training micro-step of a frozen language model alone.

        Args:
            step: Number of the optimizer step.

        Returns:
            What to put around it.

        Raises:
            RuntimeError: The language model is not frozen, and so is not guarded.
        """
        guard = guard_of(self.language_model)
        if guard is None:
            raise RuntimeError(
                "only a frozen language model has micro-steps of its own; set "
                "freeze_language_model, or train it with process_batch"
            )
        return guard.micro_step(step, 0)

    def reading_variants(self) -> AbstractContextManager[object]:
        """Return what to put around the language model's one call of a micro-step."""
        guard = guard_of(self.language_model)
        return nullcontext() if guard is None else guard.sanctioned(VARIANTS)

    @property
    def _guards(self) -> list[Guard]:
        """LensNet's guard, and that of a frozen language model."""
        frozen = guard_of(self.language_model)
        return [self.guard] if frozen is None else [self.guard, frozen]

    def autocast(self) -> AbstractContextManager[object]:
        """Return what to put around forward passes of the networks, and nothing else."""
        if not self.bf16:
            return nullcontext()
        return torch.autocast(self.language_model.embedding.weight.device.type, torch.bfloat16)

    def compile_networks(self) -> None:
        """Compile language model, GistNet and LensNet in place, for batches of fixed shapes.

        LensNet and GistNet get CUDA graphs where they run on CUDA. Parameters must have gradient
        buffers of their own then (`optimization.own_gradients`). It is for training: a session's
        shapes change, and torch gives up compiling after eight.
        """
        # A network with CUDA graphs writes every call's outputs to the same memory, and does so
        # from the next call of any of them on that no backward is pending for. What is read after
        # one is therefore the output of an ordinary operation: of a gather, a loss, a metric.
        # And LensNet, with its graphs, is the last to be called before backward: a compiled call
        # after it would let its backward start over with the memory that GistNet's backward needs.
        self.language_model.compile(dynamic=False)
        self.gistnet.compile(mode="reduce-overhead", dynamic=False)
        self.lensnet.compile(mode="reduce-overhead", dynamic=False)

    def token_nll(self, context: WorkingContext, last: int | None = None) -> Tensor:
        """Compute the NLL of each entry's label.

        Where nothing is learned from it, the language model reads so many rows at once as `at_once`
        says.

        Args:
            context: R working contexts.
            last: Of so many entries alone, the newest; of all by default.

        Returns:
            The NLL, nats, ``[R, W or last]``; 0 where there is no label.
        """
        rows = self._rows(context.labels, last)
        parts = [
            self._token_nll(context, slice(i, i + rows), last)
            for i in range(0, len(context.labels), rows)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _token_nll(self, context: WorkingContext, rows: slice, last: int | None) -> Tensor:
        pads = None if context.pad_mask is None else context.pad_mask[rows]
        entries = context.embeddings[rows], context.starts[rows], context.spans[rows]
        labels = context.labels[rows] if last is None else context.labels[rows, -last:]
        flat = F.cross_entropy(
            self.logits(*entries, pads, last).flatten(0, 1),
            labels.flatten(),
            ignore_index=NO_LABEL,
            reduction="none",
        )
        return flat.view_as(labels)

    def at_once(self, entries: int, predicting: int | None = None) -> int:
        """Count the contexts that the language model may read at once.

        Args:
            entries: Of each.
            predicting: Entries of each after which the next token is predicted; all by default.

        Returns:
            How many, at least one.
        """
        logits = (entries if predicting is None else predicting) * self.config.vocab_size
        inside = 8 * entries * self.config.d_model  # of a block, at its widest
        return max(_NUMBERS // max(logits, inside), 1)

    def _rows(self, tokens: Tensor, predicting: int | None = None) -> int:
        """Count the rows ``[B, T]`` to be read at once: all where gradients are wanted."""
        if torch.is_grad_enabled():
            return len(tokens)
        return self.at_once(tokens.shape[1], predicting)

    def full_detail_loss(self, tokens: Tensor, labelled: Tensor | None = None) -> Tensor:
        """Compute the language model's mean NLL on plain LOD0 contexts; it needs no LensNet.

        Args:
            tokens: The sequences, int64 ``[B, T]``.
            labelled: The tokens that count, bool ``[B, T]``; all by default.

        Returns:
            The mean, nats; scalar.

        Raises:
            TypeError: Tokens of another type.
            ValueError: Tokens that cannot be a batch.
        """
        check_batch(tokens, None, self.config)
        labels = tokens if labelled is None else tokens.masked_fill(~labelled, NO_LABEL)
        rows = self._rows(tokens)
        slices = [slice(i, i + rows) for i in range(0, len(tokens), rows)]
        parts = [self._mean_nll(tokens[part], labels[part]) for part in slices]
        if len(parts) == 1:
            return parts[0]
        counts = [(labels[part, 1:] != NO_LABEL).sum() for part in slices]
        share = torch.stack(counts) / torch.stack(counts).sum()
        return (torch.stack(parts) * share).nansum()  # nan where no token counts

    def _mean_nll(self, tokens: Tensor, labels: Tensor) -> Tensor:
        starts = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        logits = self.logits(self.language_model.embed(tokens), starts, torch.ones_like(starts))
        return F.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=NO_LABEL
        )

    def logits(
        self,
        embeddings: Tensor,
        starts: Tensor,
        spans: Tensor,
        pad_mask: Tensor | None = None,
        last: int | None = None,
    ) -> Tensor:
        """Run the language model.

        Args:
            embeddings: Of the entries, ``[B, W, D]``.
            starts: First token of each entry, int64 ``[B, W]``.
            spans: Tokens of each entry, int64 ``[B, W]``.
            pad_mask: Where pads are, bool ``[B, W]``; None where there are none.
            last: Predict what follows so many entries alone, the newest; all by default.

        Returns:
            Next-token logits ``[B, W or last, vocab_size]`` in the dtype of the
            embeddings, also where it ran in bfloat16.
        """
        # A frozen one is guarded: what is asked of it where nobody has said what it is for, is no
        # training.
        frozen = guard_of(self.language_model)
        unset = frozen is not None and frozen.current_context is None
        with self.context("inference") if unset else nullcontext(), self.autocast():
            logits: Tensor = self.language_model(embeddings, starts, spans, pad_mask, None, last)
        return logits.to(embeddings.dtype)


def _new_gistnet(config: MCConfig, centre: Tensor) -> GistNet:
    if config.gists == "weighted":
        return WeightedGistNet(config.d_model, centre)
    return GistNet(config.d_model)


def _new_lensnet(config: MCConfig, centre: Tensor) -> AnyLensNet:
    if config.query_tokens is not None:
        return LateInteractionLensNet(config.d_model, config.query_tokens, centre)
    return LensNet(
        config.d_model,
        config.lens_layers,
        config.num_heads,
        config.max_lod,
        causal=config.recipe.causal_lens,
    )


def _mean_embedding(language_model: AnyLanguageModel) -> Tensor:
    """Compute the mean of all token embeddings, ``[D]``."""
    weight = language_model.embedding.weight
    with torch.no_grad():
        return language_model.embed(torch.arange(len(weight), device=weight.device)).mean(0)


def _guarded_if_frozen(language_model: AnyLanguageModel, config: MCConfig) -> AnyLanguageModel:
    """Put a frozen language model under its contract."""
    if not config.freeze_language_model:
        return language_model
    return guard_module(language_model, policy=FROZEN, mode="enforce").module
