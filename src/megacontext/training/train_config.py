"""How to train: settings of a run, checked before anything is built."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megacontext.checks import check_choice, check_numbers, check_types
from megacontext.config import MCConfig

# Windows of files joined; windows within a file, any ones or those that use again what is far back;
# facts in prose, pairs of a key and a value, facts in noise: some are asked for at the end.
# Or windows of files of both kinds, needles and pairs, mixed.
DATA = ("text", "files", "reuse", "needles", "mqar", "recall", "mixed")
_COUNTS = ("gist_steps", "kept_sequences", "guess_steps")
_STAGES = (*_COUNTS, "gists_of")


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        data: One of `DATA`.
        text: Files and folders to read; empty for the standard library's sources, and for needles
            for Python's reference manual.
        lm_steps: Optimizer steps of the language model alone, before anything else: LensNet learns
            from what its losses tell, so they must tell something.
        lm_batch_size: Sequences of each of them; several processes share them.
        gist_steps: Optimizer steps of GistNet alone, beside a frozen language model.
        gist_batch_size: Sequences of each of them.
        kept_sequences: Where not 0, LensNet learns from so many sequences, the losses of whose
            variants are computed once and kept; GistNet stays as ``gist_steps`` made it then. It
            takes a frozen language model.
        gists_of: Folder of a run whose GistNet is taken, and its kept losses if it has any, so
            that neither is made anew; ``gist_steps`` says nothing then.
        guess_steps: Optimizer steps of LensNet before that, on losses that are guessed without the
            language model: pre-training (see `training.guess`).
        steps: Optimizer steps of all networks; of LensNet alone, where losses are kept.
        batch_size: Sequences of a micro-step.
        accumulation: Micro-steps of an optimizer step; several processes share them.
        learning_rate: Peak for language model and GistNet.
        lens_learning_rate: Peak for LensNet; beside a language model that was given, for GistNet
            too.
        warmup_steps: Of linear warm-up; a cosine then falls to a tenth of the peak.
        clip_norm: The longest gradient, clipped for LensNet and for the rest separately.
        log_interval: Steps from one line of metrics to the next.
        checkpoint_interval: Steps from one checkpoint to the next.
        device: As torch calls it.
        compile: Run language model, GistNet and LensNet under torch.compile, the latter two with
            CUDA graphs on CUDA.
        bf16: Run forward passes under autocast to bfloat16.
        recompute: Let the language model keep less for backward, and run its blocks twice.
        shard: With several processes, share weights, gradients and optimizer state among them by
            FSDP2; by default each has all of them (DDP).
        tensorboard: Write TensorBoard's event files too.

    Raises:
        TypeError: A value of another type; the message names it.
        ValueError: A value that cannot train; the message names it.
    """

    data: str = "text"
    text: tuple[str, ...] = ()
    lm_steps: int = 0
    lm_batch_size: int = 32
    gist_steps: int = 0
    gist_batch_size: int = 4
    kept_sequences: int = 0
    gists_of: str = ""
    guess_steps: int = 0
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
    recompute: bool = False
    shard: bool = False
    tensorboard: bool = False

    def __post_init__(self) -> None:
        check_numbers(self, may_be_zero=("warmup_steps", "lm_steps", *_COUNTS))
        check_types(self, bool, str)
        check_choice("data", self.data, DATA)
        if not isinstance(self.text, tuple) or not all(isinstance(p, str) for p in self.text):
            raise TypeError(f"text must be a tuple of paths, each a str, not {self.text!r}")
        if self.data in ("recall", "mqar") and self.text:
            raise ValueError(f"{self.data} makes its own sequences; leave out the text")
        if self.compile and self.shard:
            raise ValueError(
                "compile and shard cannot be combined: FSDP2 gathers weights between the blocks "
                "of one network, where a graph would break; leave one of them out"
            )

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "TrainConfig":
        """Make the settings that a ``config.json`` holds.

        Args:
            saved: Its part ``train``.

        Returns:
            The settings.

        Raises:
            TypeError: A name or a value that is none of settings.
            ValueError: A value that cannot train.
        """
        return cls(**{**saved, "text": tuple(saved.get("text", ()))})


def check_together(model: MCConfig, settings: TrainConfig) -> None:
    """Refuse settings that a model cannot be trained by.

    Args:
        model: Sizes.
        settings: How it is to be trained.

    Raises:
        ValueError: They do not go together; says what to leave out.
    """
    staged = [name for name in _STAGES if getattr(settings, name)]
    if staged and not (model.freeze_language_model and settings.kept_sequences):
        raise ValueError(
            f"{staged[0]} is {getattr(settings, staged[0])}, and stages are for losses that do not "
            "change: they take freeze_language_model and kept_sequences"
        )
    if settings.kept_sequences:
        _check_blocks(model)
    if not model.freeze_language_model:
        return
    if settings.lm_steps:
        raise ValueError(
            f"lm_steps is {settings.lm_steps}, and freeze_language_model leaves those steps "
            "nothing to train; leave one of them out"
        )
    if settings.shard:
        raise ValueError(
            "shard and freeze_language_model cannot be combined: FSDP2 takes weights of one dtype "
            "only, and those that are trained beside a frozen model are few; leave shard out"
        )


def _check_blocks(model: MCConfig) -> None:
    """Refuse sizes of which no losses can be kept, before GistNet has learned for hours.

    Raises:
        ValueError: Working contexts have no room for a block, or LensNet does not see all of them.
    """
    tokens, length = model.sequence_tokens, model.train_wc_length
    blocks, picks = model.geometry.detail(tokens, length)
    if not picks:
        raise ValueError(
            f"a working context of {length} entries has no room for a block of {tokens} tokens in "
            "detail; make train_wc_length longer"
        )
    seen = int((model.geometry.focus_view(tokens, model.horizon_tokens).lods == 1).sum())
    if seen != blocks:
        raise ValueError(
            f"variants are judged by which of {blocks} blocks they hold, and a focus_window of "
            f"{model.focus_window} entries shows {seen} of them at LOD1; widen it"
        )
