"""A run beside a frozen language model, in stages: what does not depend on LensNet comes first.

GistNet learns what its gists cost the language model; then what variants lose is computed and kept;
then LensNet learns: from losses that are guessed, and then from those that were kept.
"""

import math
import shutil
from collections.abc import Sequence
from functools import cached_property, partial

import numpy as np
import torch

from megacontext.data.mixture import token_counts
from megacontext.data.source import Ints
from megacontext.files import reading
from megacontext.judged import Judged, gist_loss, joined, judged_agreement, process_judged
from megacontext.micro_step import LensResult
from megacontext.training.guess import guessed
from megacontext.training.kept import IN_A_FILE, KeptLosses, judge
from megacontext.training.loop import (
    COMPARED_SEQUENCES,
    Phase,
    TrainingLoop,
    random_numbers,
)
from megacontext.training.metric_sinks import MetricSink
from megacontext.training.optimization import rate_at, update
from megacontext.training.run_folder import RunFolder
from megacontext.training.train_result import Report, StepReport

GISTS, GUESSED, KEPT, HELD_OUT, ORDER, BESIDE_KEPT = range(2, 8)  # what random numbers are for
_KEPT_RATE = 0.2  # of the peak learning rate, once LensNet is trained on guesses
_GUESSED_VARIANTS = 24


class StagedTrainer(TrainingLoop):
    """The state of a run whose language model is frozen, and whose losses are kept.

    Attributes:
        gist_step: Steps of GistNet so far.
        guess_step: Steps of LensNet on guessed losses so far.
        step: Steps of LensNet on kept losses so far.
    """

    counters = ("gist_step", "guess_step", "step")
    gist_step = 0
    guess_step = 0

    def run(self, report: Report, sinks: Sequence[MetricSink], *, profile: bool = False) -> None:
        """Make all remaining steps, from another run's gists and losses where that was asked for.

        Args:
            report: As for `TrainingLoop.run`.
            sinks: As for `TrainingLoop.run`.
            profile: As for `TrainingLoop.run`.

        Raises:
            FileNotFoundError: The other run is gone, or has no checkpoint or no losses.
            DamagedFileError: Its checkpoint cannot be read, or is of another model.
        """
        if self.settings.gists_of and not self.done:
            self._take_over(RunFolder(self.settings.gists_of))
        super().run(report, sinks, profile=profile)

    def _take_over(self, other: RunFolder) -> None:
        """Load the GistNet of another run, and copy its losses."""
        state = other.load_checkpoint(torch.device("cpu"))
        if state is None:
            raise FileNotFoundError(f"{other.path} has no checkpoint yet; train it first")
        with reading(other.path, "give the folder of a run with such gists"):
            prefix = "gistnet."
            own = {n: w for n, w in state["model"].items() if n.startswith(prefix)}
            self.mc.gistnet.load_state_dict({n.removeprefix(prefix): w for n, w in own.items()})
        if self.world.first:
            for losses in (self.folder.kept, self.folder.held_out):
                if (others := other.path / losses.name).exists():
                    shutil.copytree(others, losses, dirs_exist_ok=True)
        self.world.wait()

    def phases(self, report: Report, sinks: Sequence[MetricSink]) -> list[Phase]:
        """Return the phases of the run, in their order, as they stand now."""
        settings, mc = self.settings, self.mc
        gist_steps = 0 if settings.gists_of else settings.gist_steps
        gists = (self.gist_step, gist_steps, self.make_gist_step)
        guess = (self.guess_step, settings.guess_steps, self.make_guess_step)
        kept = (self.step, settings.steps, self.make_step)
        return [
            Phase("gists", mc.gistnet, *gists, self.log_alone),
            Phase("pre-training", mc.lensnet, *guess, self._log_guesses),
            Phase(
                "training", mc.lensnet, *kept, self.log, sinks, prepare=partial(self._keep, report)
            ),
        ]

    def _log_guesses(self) -> dict[str, float]:
        """Return means since the last logged step, which are kept nowhere."""
        return self.means.take(self.world.sum)

    def make_gist_step(self) -> int:
        """Make a step of GistNet, on this process's share of a batch."""
        settings, config = self.settings, self.mc.config
        rng = random_numbers(config.seed, GISTS, self.gist_step)
        whole = self.source.batch(rng, settings.gist_batch_size, config.sequence_tokens)
        batch = whole.share(self.world.rank, self.world.size).to(self.device)
        # Cuts go by the sequence's number within the run, whoever draws them.
        before = self.gist_step * settings.gist_batch_size + self.world.rank * len(batch.tokens)
        self.mc.allocator.drawn = before * config.num_variants
        loss = self.call(
            gist_loss, self.mc, batch.tokens, labelled=batch.labelled, step=self.gist_step
        )
        torch.autograd.backward(loss)
        rate = rate_at(self.gist_step, settings.gist_steps, settings.warmup_steps)
        update(self.optimizer, rate, settings.clip_norm)
        self.loss_alone = loss.detach()
        self.gist_step += 1
        return self.gist_step

    def make_guess_step(self) -> int:
        """Make a step of LensNet on losses that are guessed without the language model."""
        self.make_micro_steps(self.guess_step, self.settings.guess_steps, self._guess_micro_step)
        self.guess_step += 1
        return self.guess_step

    def make_step(self) -> int:
        """Make a step of LensNet on losses that were kept."""
        steps = self.settings.steps
        self.make_micro_steps(self.step, steps, self._kept_micro_step, _KEPT_RATE)
        self.step += 1
        return self.step

    def validation_agreement(self) -> float:
        """Compare LensNet with kept preferences of the same held-out sequences every time."""
        with torch.no_grad():  # also around the call, or DDP would wait for a backward
            return float(self.call(judged_agreement, self.mc, self._held_out))

    def _guess_micro_step(self, number: int, step: int, micro_step: int) -> LensResult:
        rng = random_numbers(self.mc.config.seed, GUESSED, number)
        judged = self._guesses(rng, self.settings.batch_size, _GUESSED_VARIANTS)
        return self._of_lensnet(judged, step, micro_step)

    def _guesses(self, rng: np.random.Generator, sequences: int, variants: int) -> Judged:
        """Draw new sequences, and guess what variants of them lose."""
        config = self.mc.config
        _, picks = config.geometry.detail(config.sequence_tokens, config.train_wc_length)
        return guessed(
            self.source.batch(rng, sequences, config.sequence_tokens),
            self._counts,
            rng,
            block_size=config.block_size,
            recent_tokens=config.recent_tokens,
            horizon_tokens=config.horizon_tokens,
            picks=picks,
            variants=variants,
        )

    def _kept_micro_step(self, number: int, step: int, micro_step: int) -> LensResult:
        # Half of the sequences are new ones, with guesses: the kept ones are few, and alone they
        # would be learned by heart.
        kept, size = self._kept, -(-self.settings.batch_size // 2)
        # Every sequence once, in random order, before any comes again.
        numbers = np.arange(number * size, (number + 1) * size)
        rounds, places = np.divmod(numbers, len(kept.tokens))
        order = {r: self._order(int(r)) for r in np.unique(rounds)}
        rows = torch.tensor([order[r][p] for r, p in zip(rounds, places, strict=True)])
        some = Judged(kept.tokens[rows], kept.nll[rows], kept.held[rows])
        if new := self.settings.batch_size - size:
            rng = random_numbers(self.mc.config.seed, BESIDE_KEPT, number)
            some = joined([some, self._guesses(rng, new, kept.nll.shape[1])])
        return self._of_lensnet(some, step, micro_step)

    def _order(self, number: int) -> Ints:
        rng = random_numbers(self.mc.config.seed, ORDER, number)
        return rng.permutation(len(self._kept.tokens))

    def _of_lensnet(self, judged: Judged, step: int, micro_step: int) -> LensResult:
        judged = judged.to(self.device)
        return self.call(process_judged, self.mc, judged, step=step, micro_step=micro_step)

    @cached_property
    def _counts(self) -> Ints | None:
        return token_counts(self.source)

    @cached_property
    def _kept(self) -> Judged:
        return KeptLosses.beside(self.folder.kept, self.mc).read()

    @cached_property
    def _held_out(self) -> Judged:
        return KeptLosses.beside(self.folder.held_out, self.mc).read().to(self.device)

    def _keep(self, report: Report) -> None:
        """Compute the losses that are not there yet: this process its share of the files."""
        if self.settings.gists_of and RunFolder(self.settings.gists_of).kept.exists():
            return  # they came with the gists
        held_out, kept = (
            KeptLosses.beside(path, self.mc) for path in (self.folder.held_out, self.folder.kept)
        )
        work = [(held_out, n) for n in range(_files(COMPARED_SEQUENCES))]
        work += [(kept, n) for n in range(_files(self.settings.kept_sequences))]
        missing = [(losses, n) for losses, n in work if not losses.path(n).exists()]
        self.world.wait()  # for all to see the same
        done = len(work) - len(missing)
        for first in range(0, len(missing), self.world.size):
            if self._hear():
                return
            for losses, number in missing[first + self.world.rank :][:1]:
                self._judge(losses, number, held_out=losses is held_out)
            done += self.world.size
            steps = IN_A_FILE * min(done, len(work)), IN_A_FILE * len(work)
            report(StepReport("losses of variants", *steps, {}))
        self.world.wait()

    def _judge(self, losses: KeptLosses, number: int, *, held_out: bool) -> None:
        config = self.mc.config
        rng = random_numbers(config.seed, HELD_OUT if held_out else KEPT, number)
        draw = self.source.held_out_batch if held_out else self.source.batch
        batch = draw(rng, IN_A_FILE, config.sequence_tokens).to(self.device)
        losses.write(number, judge(self.mc, batch, rng), config.vocab_size)


def _files(sequences: int) -> int:
    return math.ceil(sequences / IN_A_FILE)
