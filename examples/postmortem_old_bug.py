"""Case 1, the plan's old bug: a helper asks LensNet while training, and hides that it failed.

Writes runs/old_bug. Afterwards: lensnet-guard postmortem runs/old_bug
"""

import contextlib

import torch

from lensnet_guard import LensNetViolation, lensnet_guard
from megacontext import MCConfig, MCController
from megacontext.model.tree import MegaContextTree


class TrainerOfOld(MCController):
    """Picks variants with LensNet's advice, and falls back to chance when that fails."""

    def build_variants(self, tree: MegaContextTree):
        variants = super().build_variants(tree)
        if len(self.guard.calls) > 3:  # only once training has warmed up
            wc = variants.working_context
            with contextlib.suppress(Exception):
                self.lensnet(wc.embeddings, wc.starts, wc.spans, wc.lods)
        return variants


mc = TrainerOfOld(MCConfig())
tokens = torch.randint(0, 256, (2, mc.config.sequence_tokens))
with (
    contextlib.suppress(LensNetViolation),
    lensnet_guard(mc, log="runs/old_bug"),
    mc.context("training"),
):
    for step in range(8):
        mc.process_batch(tokens, step=step).loss.backward()
