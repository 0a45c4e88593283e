"""MCController: one micro-step from tokens to losses, with LensNet called once.

Data flows one way: tokens -> tree -> cuts -> one gather -> losses. The controller's LensNet is
always guarded; the one training call stands in `learn_preferences`, inside the sanctioned scope.
"""

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from megacontext import preference
from megacontext.allocators.cut import Cut, kept_tokens, lod0_tail
from megacontext.allocators.training import TrainingWCVariationAllocator
from megacontext.comparison import comparison_of
from megacontext.config import MCConfig
from megacontext.inference.host import SessionHost
from megacontext.micro_step import (
    MCBatchResult,
    Variants,
    lod_losses,
    scores_by_sequence,
    without_graph,
)
from megacontext.model.focus_view import FocusView
from megacontext.model.networks import PREFERENCE_SCORER
from megacontext.model.tokens import check_batch
from megacontext.model.transfer import to_device
from megacontext.model.tree import MegaContextTree
from megacontext.model.working_context import NO_LABEL
from megacontext.preference import PreferencePairs


class MCController(SessionHost):
    """Networks and training allocator in one, with a session at a time.

    Args:
        config: Sizes; checked when it was made.
        bf16: Run the networks' forward passes of training and validation under autocast to
            bfloat16. Losses and preference pairs are computed in the dtype of the weights.

    Attributes:
        allocator: Samples the variants of training.
        comparison: Makes preference pairs of what the variants' losses say.

    Raises:
        ImportError: ``config.language_model`` needs a library that is not installed.
        FileNotFoundError: There is no such language model.
        ValueError: It cannot be used.
    """

    def __init__(self, config: MCConfig, *, bf16: bool = False) -> None:
        super().__init__(config, bf16=bf16)
        self.allocator = config.new_allocator()
        self.comparison = comparison_of(config)

    # One micro-step ----------------------------------------------------------------------------

    def process_batch(
        self,
        tokens: Tensor,
        step: int = 0,
        micro_step: int = 0,
        *,
        pad_mask: Tensor | None = None,
        labelled: Tensor | None = None,
    ) -> MCBatchResult:
        """Run one training micro-step up to its losses.

        Opens the micro-step and LensNet's sanctioned scope, and the training context when none is
        set. LensNet is called once, for the focus views of the whole batch.

        Args:
            tokens: The sequences, int64 ``[B, T]``.
            step: Number of the optimizer step, for the records.
            micro_step: Number of the micro-batch within it, for the records.
            pad_mask: Where the pads on the left of shorter sequences are, bool ``[B, T]``. Give it
                on the host: what it says decides shapes, and the host waits for a device's.
            labelled: The tokens that count in losses, bool ``[B, T]``; all by default.

        Returns:
            Losses, variants and metrics.

        Raises:
            RuntimeError: It was called in inference context.
            TypeError: Tokens of another type.
            ValueError: Tokens that cannot be a batch.
            LensNetViolation: Something else called LensNet.
        """
        with self.training_context(), self.micro_step(step, micro_step) as ledger:
            tree = self.build_tree(tokens, pad_mask, labelled)
            variants = self.build_variants(tree)
            with self.reading_variants():
                nll = self.token_nll(variants.working_context)
            view, pairs = self.comparison(tree, variants, nll)
            lens_loss, metrics = self.learn_preferences(view, pairs)
            lm_loss = nll.sum() / (variants.working_context.labels != NO_LABEL).sum()
            calls = sum(ledger.calls.values())
        metrics |= {
            "lm_loss": lm_loss.detach(),
            "lensnet_calls": calls,
            **lod_losses(nll, variants.working_context),
        }
        return MCBatchResult(
            lm_loss + lens_loss, lm_loss, lens_loss, without_graph(variants), metrics
        )

    def learn_preferences(
        self, view: FocusView, pairs: PreferencePairs
    ) -> tuple[Tensor, dict[str, Tensor | int]]:
        """Call LensNet, and compare its scores with what pairs of variants say.

        Args:
            view: What it scores.
            pairs: Of the variants.

        Returns:
            The preference loss, scalar, and metrics by name.
        """
        with self.guard.sanctioned(PREFERENCE_SCORER), self.autocast():
            scores = self.lensnet(*view.lensnet_inputs())
        scores, gists = scores_by_sequence(scores, view.entries, len(pairs.advantages))
        lens_loss = preference.preference_loss(
            scores,
            pairs,
            temperature=self.config.temperature,
            advantage_scale=self.config.advantage_scale,
        )
        metrics = preference.preference_metrics(scores, pairs, gists)
        return lens_loss, {"lens_loss": lens_loss.detach(), **metrics}

    def build_tree(
        self, tokens: Tensor, pad_mask: Tensor | None = None, labelled: Tensor | None = None
    ) -> MegaContextTree:
        """Trim each sequence so that the target length is reachable, and build its tree.

        The (N - W) mod (K - 1) oldest tokens go; what is kept counts from position 0.

        Args:
            tokens: The sequences, int64 ``[B, T]``.
            pad_mask: Where the pads on the left of shorter sequences are, bool ``[B, T]``.
            labelled: The tokens that count in losses, bool ``[B, T]``; all by default.

        Returns:
            The tree.

        Raises:
            TypeError: Tokens of another type.
            ValueError: Tokens that cannot be a batch.
        """
        lengths = check_batch(tokens, pad_mask, self.config)
        kept = [
            kept_tokens(n, self.config.train_wc_length, self.config.block_size) for n in lengths
        ]
        width = max(kept)
        if pad_mask is None:  # all are as long: what is kept is a slice
            tokens = tokens[:, tokens.shape[1] - width :]
            labelled = labelled[:, labelled.shape[1] - width :] if labelled is not None else None
        else:
            # Every row starts at its oldest kept token; shorter ones repeat their last one.
            offsets = np.minimum(np.arange(width), np.array(kept)[:, None] - 1)
            host = torch.from_numpy(tokens.shape[1] - np.array(kept)[:, None] + offsets)
            index = to_device(host, tokens.device)
            tokens = tokens.gather(1, index)
            if labelled is not None:
                labelled = to_device(labelled, tokens.device).gather(1, index)
        labels = None
        if labelled is not None:
            labels = tokens.masked_fill(~to_device(labelled, tokens.device), NO_LABEL)
        with self.autocast():
            return MegaContextTree.build(
                tokens,
                self.language_model.embed(tokens),
                self.gistnet,
                block_size=self.config.block_size,
                max_lod=self.config.max_lod,
                lengths=kept,
                labels=labels,
            )

    def build_variants(
        self, tree: MegaContextTree, allocator: TrainingWCVariationAllocator | None = None
    ) -> Variants:
        """Gather one LOD0 baseline and ``num_variants`` random cuts of each history, all at once.

        Args:
            tree: Of the histories.
            allocator: Samples the cuts; the controller's own by default.

        Returns:
            The working contexts that are compared.
        """
        cuts = tuple(
            (
                lod0_tail(length, self.config.train_wc_length, self.config.block_size),
                *(
                    self._collapse_wc_randomly(length, allocator)
                    for _ in range(self.config.num_variants)
                ),
            )
            for length in tree.lengths
        )
        return Variants(cuts, tree.working_context(cuts))

    def _collapse_wc_randomly(
        self, num_tokens: int, allocator: TrainingWCVariationAllocator | None = None
    ) -> Cut:
        """Sample a cut of exactly the training length (all tokens, if there are fewer)."""
        allocator = allocator or self.allocator
        return allocator.sample(num_tokens, min(num_tokens, self.config.train_wc_length))

    # Validation --------------------------------------------------------------------------------

    def held_out_agreement(self, tokens: Tensor, labelled: Tensor | None = None) -> Tensor:
        """Compute ``preference_agreement`` on sequences that are not trained on.

        It runs in inference context, with one call of LensNet. The variants are the same every
        time, and the training allocator's random sequence is left alone.

        Args:
            tokens: The sequences, int64 ``[B, T]``.
            labelled: The tokens that count in losses, bool ``[B, T]``; all by default.

        Returns:
            The agreement, scalar on the device; nan where no pair tells anything.

        Raises:
            TypeError: Tokens of another type.
            ValueError: Tokens that cannot be a batch.
            ContextSwitchRefused: A micro-step is open.
        """
        with self.context("inference"), torch.no_grad():
            tree = self.build_tree(tokens, labelled=labelled)
            variants = self.build_variants(tree, self.config.new_allocator())
            view, pairs = self.comparison(tree, variants, self.token_nll(variants.working_context))
            return self.agreement(view, pairs)

    def agreement(self, view: FocusView, pairs: PreferencePairs) -> Tensor:
        """Call LensNet, and compute ``preference_agreement``.

        Args:
            view: What it scores.
            pairs: Of the variants.

        Returns:
            The agreement, scalar on the device; nan where no pair tells anything.
        """
        with self.context("inference"), self.autocast():
            scores = self.lensnet(*view.lensnet_inputs())
        scores, gists = scores_by_sequence(scores, view.entries, len(pairs.advantages))
        return preference.preference_metrics(scores, pairs, gists)["preference_agreement"]

    def training_context(self) -> AbstractContextManager[None]:
        """Declare training for a block where no context is set.

        Raises:
            RuntimeError: It is inference.
        """
        context = self.guard.current_context
        if context == "inference":
            raise RuntimeError(
                "process_batch trains and cannot run in inference context; "
                'leave `with mc.context("inference"):` first'
            )
        return self.context("training") if context is None else nullcontext()
