"""What tests of megacontext share: one small model, one builder of short trainings, the command."""

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lensnet_guard
from megacontext import MCConfig, MCController, TrainConfig
from megacontext.cli import main
from megacontext.training.run_folder import RunFolder

SMALL = {
    "vocab_size": 64,
    "d_model": 32,
    "num_heads": 2,
    "lm_layers": 1,
    "lens_layers": 1,
    "block_size": 4,
    "sequence_tokens": 96,
    "train_wc_length": 48,
    "recent_tokens": 16,
    "horizon_tokens": 8,
}
TEXT_MODEL = MCConfig(**SMALL | {"vocab_size": 256})  # the same for bytes
TEXT = (str(Path(lensnet_guard.__file__).parent),)  # real text that is always there


def small_settings(**changes: Any) -> TrainConfig:
    """How to train `TEXT_MODEL` for a moment, with lines of metrics and checkpoints on the way."""
    short = {"steps": 6, "batch_size": 2, "warmup_steps": 2}
    often = {"log_interval": 2, "checkpoint_interval": 3}
    return TrainConfig(**{"text": TEXT, **short, **often, **changes})


def arguments(**options: object) -> list[str]:
    """Options of a command: ``lm_steps=2`` is ``--lm-steps 2``."""
    return [word for k, v in options.items() for word in (f"--{k.replace('_', '-')}", str(v))]


def invoke(*arguments: object, stdin: bytes | None = None) -> tuple[int, str, str]:
    """The command in this process: its exit code, stdout and stderr."""
    result = CliRunner().invoke(main, [str(a) for a in arguments], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def checkpoint(run_dir: Path) -> dict[str, Any]:
    """The newest of a run."""
    state = RunFolder(run_dir).load_checkpoint(torch.device("cpu"))
    assert state is not None
    return state


def weights(run_dir: Path) -> dict[str, Tensor]:
    """Those of the newest checkpoint."""
    state: dict[str, Tensor] = checkpoint(run_dir)["model"]
    return state


@pytest.fixture
def config() -> MCConfig:
    return MCConfig(**SMALL)


@pytest.fixture
def model() -> MCConfig:
    """What trainings on text are of."""
    return TEXT_MODEL


@pytest.fixture
def settings() -> TrainConfig:
    """Of a training with two micro-steps a step."""
    return small_settings(accumulation=2)


@pytest.fixture
def mc(config: MCConfig) -> MCController:
    return MCController(config)


@pytest.fixture
def tokens(config: MCConfig) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, config.vocab_size, (3, config.sequence_tokens), generator=generator)


class RefuseWaiting(TorchDispatchMode):
    """Raises at the operators for which the host would have to wait for a device."""

    WAITING = (
        "aten::_local_scalar_dense",
        "aten::nonzero",
        "aten::masked_select",
        "aten::equal",
    )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket._qualified_op_name
        by_mask = name.startswith("aten::index") and any(
            isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1:2])
        )
        if name in self.WAITING or by_mask:
            raise AssertionError(f"the host waits for the device at {func}")
        return func(*args, **(kwargs or {}))
