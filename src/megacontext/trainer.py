"""The trainer: trains language model, GistNet and LensNet on text, under the guard.

Reads from top to bottom: `train` prepares a run folder, `_train_steps` is the loop, and the run
ends with a verdict that is computed from the guard's log file.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lensnet_guard import lensnet_guard
from lensnet_guard.postmortem import LogVerdict, read_verdict
from megacontext.config import MCConfig, check_numbers
from megacontext.controller import MCController, Variants
from megacontext.data import Corpus, load_corpus
from megacontext.run_folder import RunFolder

VALIDATION_SEQUENCES = 32


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        text: files and folders to read; empty for the standard library's sources.
        steps: optimizer steps.
        batch_size: sequences per micro-step.
        accumulation: micro-steps per optimizer step.
        learning_rate, lens_learning_rate: peaks for language model and GistNet, and for LensNet.
        warmup_steps: of linear warm-up; a cosine then falls to a tenth of the peak.
        clip_norm: gradient norm, clipped for LensNet and for the rest separately.
        log_interval, checkpoint_interval: in steps.
        device: torch device.

    Raises:
        TypeError, ValueError: a value that cannot train.
    """

    text: tuple[str, ...] = ()
    steps: int = 240
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 3e-3
    lens_learning_rate: float = 3e-4
    warmup_steps: int = 20
    clip_norm: float = 1.0
    log_interval: int = 10
    checkpoint_interval: int = 50
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_numbers(self, may_be_zero=("warmup_steps",))


@dataclass(frozen=True)
class StepReport:
    """What the progress display gets after a logged step: step, of how many, metrics."""

    step: int
    steps: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        verdict: from the guard's log file.
        metrics: of the last logged step.
        validation_loss: of the language model on held-out text at full detail, nats per byte.
        unigram_entropy: of the held-out text, nats per byte.
        run_dir: the run folder.
    """

    verdict: LogVerdict
    metrics: dict[str, float | None]
    validation_loss: float
    unigram_entropy: float
    run_dir: Path


def train(
    run_dir: str | os.PathLike[str],
    model: MCConfig | None = None,
    settings: TrainConfig | None = None,
    *,
    resume: bool = False,
    report: Callable[[StepReport], None] = lambda _: None,
) -> TrainResult:
    """Train in a new run folder, or continue the run that a folder holds.

    Args:
        model, settings: of a new run; a resumed run takes its own from ``config.json``.
        report: called after every logged step.

    Raises:
        FileExistsError, FileNotFoundError: the folder does not fit ``resume``.
        ValueError: settings, text or checkpoint that do not fit; nothing was written then.
        LensNetViolation: something called LensNet that may not.
    """
    folder = RunFolder(run_dir)
    if resume:
        saved = folder.read_config()
        model = MCConfig(**saved["model"])
        settings = TrainConfig(**{**saved["train"], "text": tuple(saved["train"]["text"])})
    model, settings = model or MCConfig(), settings or TrainConfig()
    device = _device(settings.device)
    corpus = load_corpus([Path(path) for path in settings.text], model.sequence_tokens)
    if model.vocab_size < 256:
        raise ValueError(
            f"text is bytes, so vocab_size must be at least 256, not {model.vocab_size}"
        )
    trainer = _Trainer(model, settings, corpus, folder, device)
    if not resume:
        folder.create(
            {
                "model": dataclasses.asdict(model),
                "train": dataclasses.asdict(settings),
                "corpus": {
                    "sha256": corpus.sha256,
                    "files": corpus.files,
                    "training_bytes": len(corpus.training),
                    "validation_bytes": len(corpus.validation),
                },
            }
        )
    elif saved["corpus"]["sha256"] != corpus.sha256:
        raise ValueError(
            f"the text has changed since {folder.path} was begun (its sha256 differs), "
            "so the run cannot be continued; start a new one"
        )
    with folder.locked():
        if resume:
            trainer.restore()
        with lensnet_guard(trainer.mc, log=folder.path):
            variants = trainer.run(report)
    verdict = read_verdict(folder.path)
    result = TrainResult(
        verdict=verdict,
        metrics=folder.read_metrics()[-1],
        validation_loss=trainer.validation_loss(),
        unigram_entropy=corpus.unigram_entropy(),
        run_dir=folder.path,
    )
    from megacontext.overview import draw_overview  # matplotlib is slow to import

    draw_overview(folder, verdict, variants, corpus.unigram_entropy())
    return result


class _Trainer:
    """The state of a run: model, optimizer, random generators, step."""

    def __init__(
        self,
        model: MCConfig,
        settings: TrainConfig,
        corpus: Corpus,
        folder: RunFolder,
        device: torch.device,
    ) -> None:
        self.settings = settings
        self.corpus = corpus
        self.folder = folder
        self.device = device
        self.step = 0
        self.totals: dict[str, Tensor] = {}  # metric -> [sum, count] since the last logged step
        self.mc = MCController(model).to(device)
        lens = list(self.mc.lensnet.parameters())
        of_lens = set(lens)
        self.parameters = [[p for p in self.mc.parameters() if p not in of_lens], lens]
        rates = (settings.learning_rate, settings.lens_learning_rate)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": group, "lr": rate, "peak": rate}
                for group, rate in zip(self.parameters, rates, strict=True)
            ],
            betas=(0.9, 0.95),
            weight_decay=0.01,
        )
        self.data_rng = np.random.default_rng([model.seed, 1])

    def run(self, report: Callable[[StepReport], None]) -> Variants | None:
        """All remaining steps; returns the last micro-step's variants, to look at."""
        settings, variants = self.settings, None
        if self.step == 0:
            self.save()  # so that a run can be resumed from its first moment
        with self.mc.context("training"):
            while self.step < settings.steps:
                variants = self._optimizer_step()
                self.step += 1
                last = self.step == settings.steps
                checkpoint = last or self.step % settings.checkpoint_interval == 0
                if checkpoint or self.step % settings.log_interval == 0:
                    self._check_finite()
                if last or self.step % settings.log_interval == 0:
                    row = self._take_metrics() | {"validation_loss": self.validation_loss()}
                    self.folder.append_metrics({"step": self.step, **row})
                    report(StepReport(self.step, settings.steps, row))
                if checkpoint:
                    self.save()
        return variants

    def _optimizer_step(self) -> Variants:
        """One step of ``accumulation`` micro-steps; the last one's variants."""
        settings = self.settings
        for micro_step in range(settings.accumulation):
            tokens = self.corpus.batch(
                self.data_rng, settings.batch_size, self.mc.config.sequence_tokens
            ).to(self.device)
            result = self.mc.process_batch(tokens, step=self.step, micro_step=micro_step)
            torch.autograd.backward(result.loss / settings.accumulation)
            self._add_metrics({"loss": result.loss.detach(), **result.metrics})
        for parameters in self.parameters:
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self._rate(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return result.variants

    def _check_finite(self) -> None:
        """Stop before a checkpoint of a model that has diverged replaces a good one."""
        if self.totals and not bool(self.totals["loss"].isfinite().all()):
            raise FloatingPointError(
                f"the loss is no longer finite at step {self.step}; the last checkpoint in "
                f"{self.folder.path} is kept: lower the learning rate"
            )

    def _add_metrics(self, metrics: dict[str, Tensor | int]) -> None:
        """Add up what is defined, on the device."""
        for name, metric in metrics.items():
            value = torch.as_tensor(metric, dtype=torch.float32, device=self.device)
            undefined = value.isnan() & (name not in ("loss", "lm_loss", "lens_loss"))
            summand = torch.stack([value.masked_fill(undefined, 0.0), (~undefined).float()])
            self.totals[name] = self.totals.get(name, 0) + summand

    def _take_metrics(self) -> dict[str, float]:
        """Means over the micro-steps since the last call; nan where never defined."""
        means = {name: float(total / count) for name, (total, count) in self.totals.items()}
        self.totals = {}
        return means

    def _rate(self, step: int) -> float:
        """Share of the peak learning rate at a step: linear warm-up, then cosine to a tenth."""
        warmup = self.settings.warmup_steps
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(self.settings.steps - warmup, 1)
        return 0.55 + 0.45 * math.cos(math.pi * progress)

    def validation_loss(self) -> float:
        """Of the language model on the same held-out windows every time, nats per byte."""
        tokens = self.corpus.validation_batch(VALIDATION_SEQUENCES, self.mc.config.train_wc_length)
        return float(self.mc.full_detail_loss(tokens.to(self.device)))

    def save(self) -> None:
        self.folder.save_checkpoint(
            {
                "step": self.step,
                "totals": self.totals,
                "model": self.mc.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "allocator_rng": self.mc.allocator.rng_state,
                "data_rng": self.data_rng.bit_generator.state,
            }
        )

    def restore(self) -> None:
        state = self.folder.load_checkpoint(self.device)
        if state is not None:
            self.step = state["step"]
            self.totals = state["totals"]
            self.mc.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.mc.allocator.rng_state = state["allocator_rng"]
            self.data_rng.bit_generator.state = state["data_rng"]
        self.folder.drop_metrics_after(self.step)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {error}") from error
    return device
