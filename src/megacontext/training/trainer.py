"""The trainer of a run in two phases: the language model alone, then all networks."""

from collections.abc import Sequence

import numpy as np
import torch

from megacontext.micro_step import LensResult
from megacontext.training.loop import (
    COMPARED_SEQUENCES,
    DATA,
    LM_DATA,
    Phase,
    TrainingLoop,
    random_numbers,
)
from megacontext.training.metric_sinks import MetricSink
from megacontext.training.optimization import update
from megacontext.training.train_result import Report


class Trainer(TrainingLoop):
    """The state of a run of all networks.

    Attributes:
        lm_step: Steps of the language model alone so far.
        step: Steps of all networks so far.
    """

    counters = ("lm_step", "step")
    lm_step = 0

    def phases(self, report: Report, sinks: Sequence[MetricSink]) -> list[Phase]:
        """Return the phases of the run, in their order, as they stand now."""
        settings, alone = self.settings, self.mc.language_model
        return [
            Phase(
                "language model",
                alone,
                self.lm_step,
                settings.lm_steps,
                self.make_lm_step,
                self.log_alone,
            ),
            Phase(
                "training",
                self.mc.learned,
                self.step,
                settings.steps,
                self.make_step,
                self.log,
                sinks,
            ),
        ]

    def make_lm_step(self) -> int:
        """Make a step of the language model alone, on this process's share of a batch."""
        settings = self.settings
        rng = random_numbers(self.mc.config.seed, LM_DATA, self.lm_step)
        size, length = settings.lm_batch_size, self.mc.config.sequence_tokens
        whole = self.source.lm_batch(rng, size, length)
        batch = whole.share(self.world.rank, self.world.size).to(self.device)
        loss = self.call(self.mc.full_detail_loss, batch.tokens, batch.labelled)
        torch.autograd.backward(loss)
        rate = min(1.0, (self.lm_step + 1) / max(settings.warmup_steps, 1))
        update(self.optimizer, rate, settings.clip_norm)
        self.loss_alone = loss.detach()
        self.lm_step += 1
        return self.lm_step

    def make_step(self) -> int:
        """Make a step of all networks: this process's micro-steps of it."""
        self.make_micro_steps(self.step, self.settings.steps, self._micro_step)
        self.step += 1
        return self.step

    def _micro_step(self, number: int, step: int, micro_step: int) -> LensResult:
        """Make a micro-step of all networks, up to its losses."""
        settings, config = self.settings, self.mc.config
        rng = random_numbers(config.seed, DATA, number)
        batch = self.source.batch(rng, settings.batch_size, config.sequence_tokens).to(self.device)
        self.mc.allocator.drawn = number * settings.batch_size * config.num_variants
        result = self.call(
            self.mc.process_batch,
            batch.tokens,
            step=step,
            micro_step=micro_step,
            labelled=batch.labelled,
        )
        self.cuts = result.variants.cuts
        return LensResult(result.loss, result.metrics)

    def validation_agreement(self) -> float:
        """Compare LensNet with the preferences of the same held-out sequences every time."""
        length, rng = self.mc.config.sequence_tokens, np.random.default_rng(0)
        batch = self.source.held_out_batch(rng, COMPARED_SEQUENCES, length).to(self.device)
        with torch.no_grad():  # also around the call, or DDP would wait for a backward
            return float(self.call(self.mc.held_out_agreement, batch.tokens, batch.labelled))
