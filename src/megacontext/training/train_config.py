"""How to train: settings of a run, checked before anything is built."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megacontext.checks import check_choice, check_numbers


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        data: ``"text"``, or ``"recall"`` for facts far back that are asked for at the end.
        text: files and folders to read; empty for the standard library's sources.
        lm_steps: optimizer steps of the language model alone, before anything else: LensNet learns
            from what its losses tell, so they must tell something.
        lm_batch_size: sequences of each; several processes share them.
        steps: optimizer steps.
        batch_size: sequences per micro-step.
        accumulation: micro-steps per optimizer step; several processes share them.
        learning_rate, lens_learning_rate: peaks for language model and GistNet, and for LensNet;
            beside a language model that was given, GistNet learns as LensNet does.
        warmup_steps: of linear warm-up; a cosine then falls to a tenth of the peak.
        clip_norm: gradient norm, clipped for LensNet and for the rest separately.
        log_interval, checkpoint_interval: in steps.
        device: torch device.
        compile: run language model, GistNet and LensNet under torch.compile, the latter two with
            CUDA graphs on CUDA.
        bf16: run forward passes under autocast to bfloat16.
        shard: with several processes, share weights, gradients and optimizer state among them by
            FSDP2; by default each has all of them (DDP).
        recompute: let the language model keep less for backward, and run its blocks twice.
        tensorboard: write TensorBoard's event files too.

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
    recompute: bool = False
    shard: bool = False
    tensorboard: bool = False

    def __post_init__(self) -> None:
        check_numbers(self, may_be_zero=("warmup_steps", "lm_steps"))
        check_choice("data", self.data, ("text", "recall"))
        if self.data == "recall" and self.text:
            raise ValueError("recall makes its own sequences; leave out the text")
        if self.compile and self.shard:
            raise ValueError(
                "compile and shard cannot be combined: FSDP2 gathers weights between the blocks "
                "of one network, where a graph would break; leave one of them out"
            )

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "TrainConfig":
        """As ``config.json`` holds it."""
        return cls(**{**saved, "text": tuple(saved.get("text", ()))})
