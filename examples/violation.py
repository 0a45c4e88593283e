"""The plan's old bug: an allocator that asks LensNet while training. Run it to see the violation.

The helper below looks harmless: it scores a working context to decide what to collapse. Called
from a training step it is a second LensNet forward that nobody sees. The guard refuses it.
"""

import torch

from lensnet_guard import LensNetViolation
from megacontext import MCConfig, MCController, WorkingContext


class OldFocusAllocator:
    """Asks LensNet which entries to collapse, whoever calls it and whenever."""

    def __init__(self, mc: MCController) -> None:
        self.mc = mc

    def update_focus(self, wc: WorkingContext) -> torch.Tensor:
        scores = self.mc.lensnet(wc.embeddings, wc.starts, wc.spans, wc.lods)
        return scores.argsort(dim=-1)


mc = MCController(MCConfig())
allocator = OldFocusAllocator(mc)
tokens = torch.randint(0, 256, (2, mc.config.sequence_tokens))
try:
    with mc.context("training"):
        mc.process_batch(tokens, step=0).loss.backward()  # legal: the one batched call
        variants = mc.build_variants(mc.build_tree(tokens))
        allocator.update_focus(variants.working_context)  # the bug
except LensNetViolation as violation:
    print(f"{type(violation).__name__}: {violation}")
