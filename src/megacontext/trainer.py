"""The trainer: trains language model, GistNet and LensNet on text, under the guard.

Reads from top to bottom: `train` prepares a run folder, `_train_steps` is the loop, and the run
ends with a verdict that is computed from the guard's log file.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from lensnet_guard import lensnet_guard
from lensnet_guard.postmortem import LogVerdict, read_verdict
from megacontext.config import MCConfig, check_choice, check_numbers
from megacontext.controller import MCController
from megacontext.data import Source, load_corpus
from megacontext.micro_step import Variants
from megacontext.optimization import new_optimizer, own_gradients, rate_at, update
from megacontext.pretrained import usable_device
from megacontext.recall import RecallSource
from megacontext.run_folder import RunFolder
from megacontext.step_profile import step_profile

VALIDATION_SEQUENCES = 32
COMPARED_SEQUENCES = 16  # of validation, with all their variants


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        data: ``"text"``, or ``"recall"`` for facts far back that are asked for at the end.
        text: files and folders to read; empty for the standard library's sources.
        lm_steps: optimizer steps of the language model alone, before anything else: LensNet learns
            from what its losses tell, so they must tell something.
        lm_batch_size: sequences of each.
        steps: optimizer steps.
        batch_size: sequences per micro-step.
        accumulation: micro-steps per optimizer step.
        learning_rate, lens_learning_rate: peaks for language model and GistNet, and for LensNet.
        warmup_steps: of linear warm-up; a cosine then falls to a tenth of the peak.
        clip_norm: gradient norm, clipped for LensNet and for the rest separately.
        log_interval, checkpoint_interval: in steps.
        device: torch device.
        compile: run language model, GistNet and LensNet under torch.compile, the latter two with
            CUDA graphs on CUDA.
        bf16: run forward passes under autocast to bfloat16.

    Raises:
        TypeError, ValueError: a value that cannot train.
    """

    data: str = "text"
    text: tuple[str, ...] = ()
    lm_steps: int = 0
    lm_batch_size: int = 32
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
    compile: bool = False
    bf16: bool = False

    def __post_init__(self) -> None:
        check_numbers(self, may_be_zero=("warmup_steps", "lm_steps"))
        check_choice("data", self.data, ("text", "recall"))
        if self.data == "recall" and self.text:
            raise ValueError("recall makes its own sequences; leave out the text")

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "TrainConfig":
        """As ``config.json`` holds it."""
        return cls(**{**saved, "text": tuple(saved["text"])})


@dataclass(frozen=True)
class StepReport:
    """What the progress display gets: which phase, step, of how many, metrics."""

    phase: str
    step: int
    steps: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        verdict: from the guard's log file.
        metrics: of the last logged step.
        validation_loss: of the language model on held-out data at full detail, nats per label.
        unigram_entropy: of the held-out data, nats per label.
        run_dir: the run folder.
        profile: the trace of some of the steps that were made now; None where it was not asked for,
            and where there were no steps left to make.
    """

    verdict: LogVerdict
    metrics: dict[str, float | None]
    validation_loss: float
    unigram_entropy: float
    run_dir: Path
    profile: Path | None


def train(
    run_dir: str | os.PathLike[str],
    model: MCConfig | None = None,
    settings: TrainConfig | None = None,
    *,
    resume: bool = False,
    profile: bool = False,
    report: Callable[[StepReport], None] = lambda _: None,
) -> TrainResult:
    """Train in a new run folder, or continue the run that a folder holds.

    Args:
        model, settings: of a new run; a resumed run takes its own from ``config.json``.
        profile: take a trace of a few of the steps, see `megacontext.step_profile`, in which every
            LensNet call and every phase of a micro-step is a range.
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
        settings = TrainConfig.from_json(saved["train"])
    model, settings = model or MCConfig(), settings or TrainConfig()
    device = usable_device(settings.device)
    source = load_source(settings, model)
    trainer = _Trainer(model, settings, source, folder, device)
    if not resume:
        folder.create(
            {
                "model": dataclasses.asdict(model),
                "train": dataclasses.asdict(settings),
                "source": source.description,
            }
        )
    elif saved["source"].get("sha256") != source.description.get("sha256"):
        raise ValueError(
            f"the text has changed since {folder.path} was begun (its sha256 differs), "
            "so the run cannot be continued; start a new one"
        )
    with folder.locked():
        if resume:
            trainer.restore()
        with lensnet_guard(trainer.mc, log=folder.path):
            variants = trainer.run(report, profile)
    verdict = read_verdict(folder.path)
    result = TrainResult(
        verdict=verdict,
        metrics=folder.read_metrics()[-1],
        validation_loss=trainer.validation_loss(),
        unigram_entropy=source.unigram_entropy(),
        run_dir=folder.path,
        profile=folder.profile if profile and variants is not None else None,
    )
    from megacontext.overview import draw_overview  # matplotlib is slow to import

    draw_overview(folder, verdict, variants, source.unigram_entropy())
    return result


def load_source(settings: TrainConfig, model: MCConfig) -> Source:
    """Where the sequences of a run come from.

    Raises:
        FileNotFoundError: a text that does not exist.
        ValueError: too little text, or a model that does not fit the data.
    """
    if settings.data == "text":
        source: Source = load_corpus([Path(p) for p in settings.text], model.sequence_tokens)
    else:
        source = RecallSource(block_size=model.block_size, label_all=model.judged == "all")
        if model.horizon_tokens != source.horizon_tokens:
            raise ValueError(
                f"the answers of recall take {source.horizon_tokens} tokens, so horizon_tokens "
                f"must be that, not {model.horizon_tokens}"
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


class _Trainer:
    """The state of a run: model, optimizer, random generators, step."""

    def __init__(
        self,
        model: MCConfig,
        settings: TrainConfig,
        source: Source,
        folder: RunFolder,
        device: torch.device,
    ) -> None:
        self.settings = settings
        self.source = source
        self.folder = folder
        self.device = device
        self.lm_step = 0
        self.step = 0
        self.totals: dict[str, Tensor] = {}  # metric -> [sum, count] since the last logged step
        self.mc = MCController(model, bf16=settings.bf16).to(device)
        if settings.compile:
            self.mc.compile_networks()
        lens = set(self.mc.lensnet.parameters())
        rest = [p for p in self.mc.parameters() if p not in lens]
        self.optimizer = new_optimizer(
            [
                (rest, settings.learning_rate),
                (self.mc.lensnet.parameters(), settings.lens_learning_rate),
            ]
        )
        self.data_rng = np.random.default_rng([model.seed, 1])
        # A range in a trace, only on demand: it is not free where no trace is taken.
        self.phase: Callable[[str], AbstractContextManager[object]] = nullcontext

    def run(self, report: Callable[[StepReport], None], profile: bool) -> Variants | None:
        """All remaining steps; returns the last micro-step's variants, to look at."""
        settings, variants = self.settings, None
        if self.step == 0 and self.lm_step == 0:
            self.save()  # so that a run can be resumed from its first moment
        with self.mc.context("training"):
            own_gradients(self.mc.language_model.parameters())
            while self.lm_step < settings.lm_steps:
                loss = self._lm_step()
                self.lm_step += 1
                last = self.lm_step == settings.lm_steps
                if last or self.lm_step % settings.log_interval == 0:
                    report(
                        StepReport(
                            "language model",
                            self.lm_step,
                            settings.lm_steps,
                            {"lm_loss": float(loss)},
                        )
                    )
                if last or self.lm_step % settings.checkpoint_interval == 0:
                    self.save()
        steps = settings.steps - self.step if profile else 0
        self.phase = record_function if profile else nullcontext
        with (
            self.mc.context("training"),
            step_profile(self.folder.profile, steps, cuda=self.device.type == "cuda") as end_step,
        ):
            own_gradients(self.mc.parameters())
            while self.step < settings.steps:
                variants = self._optimizer_step()
                self.step += 1
                last = self.step == settings.steps
                checkpoint = last or self.step % settings.checkpoint_interval == 0
                if checkpoint or self.step % settings.log_interval == 0:
                    self._check_finite()
                if last or self.step % settings.log_interval == 0:
                    row = self._take_metrics() | {
                        "validation_loss": self.validation_loss(),
                        "validation_agreement": self.validation_agreement(),
                    }
                    self.folder.append_metrics({"step": self.step, **row})
                    report(StepReport("training", self.step, settings.steps, row))
                if checkpoint:
                    self.save()
                end_step()
        return variants

    def _lm_step(self) -> Tensor:
        """One step of the language model alone; its loss."""
        settings = self.settings
        batch = self.source.lm_batch(
            self.data_rng, settings.lm_batch_size, self.mc.config.sequence_tokens
        ).to(self.device)
        loss = self.mc.full_detail_loss(batch.tokens, batch.labelled)
        torch.autograd.backward(loss)
        rate = min(1.0, (self.lm_step + 1) / max(settings.warmup_steps, 1))
        update(self.optimizer, rate, settings.clip_norm)
        return loss.detach()

    def _optimizer_step(self) -> Variants:
        """One step of ``accumulation`` micro-steps; the last one's variants."""
        settings = self.settings
        for micro_step in range(settings.accumulation):
            batch = self.source.batch(
                self.data_rng, settings.batch_size, self.mc.config.sequence_tokens
            ).to(self.device)
            with self.phase("process_batch"):
                result = self.mc.process_batch(
                    batch.tokens, step=self.step, micro_step=micro_step, labelled=batch.labelled
                )
            with self.phase("backward"):
                torch.autograd.backward(result.loss / settings.accumulation)
            self._add_metrics({"loss": result.loss.detach(), **result.metrics})
        with self.phase("optimizer"):
            rate = rate_at(self.step, settings.steps, settings.warmup_steps)
            update(self.optimizer, rate, settings.clip_norm)
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

    def validation_loss(self) -> float:
        """Of the language model on the same held-out windows every time, nats per label."""
        batch = self.source.held_out_batch(
            np.random.default_rng(0), VALIDATION_SEQUENCES, self._validation_tokens()
        ).to(self.device)
        with torch.no_grad():
            return float(self.mc.full_detail_loss(batch.tokens, batch.labelled))

    def validation_agreement(self) -> float:
        """Of LensNet with the preference pairs of the same held-out sequences every time."""
        batch = self.source.held_out_batch(
            np.random.default_rng(0), COMPARED_SEQUENCES, self.mc.config.sequence_tokens
        ).to(self.device)
        return float(self.mc.held_out_agreement(batch.tokens, batch.labelled))

    def _validation_tokens(self) -> int:
        """As many as a working context has of text; recall needs room for its facts."""
        config = self.mc.config
        text = self.settings.data == "text"
        return config.train_wc_length if text else config.sequence_tokens

    def save(self) -> None:
        self.folder.save_checkpoint(
            {
                "lm_step": self.lm_step,
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
            self.lm_step = state["lm_step"]
            self.step = state["step"]
            self.totals = state["totals"]
            self.mc.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.mc.allocator.rng_state = state["allocator_rng"]
            self.data_rng.bit_generator.state = state["data_rng"]
        self.folder.drop_metrics_after(self.step)
