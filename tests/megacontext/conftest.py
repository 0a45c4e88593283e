"""Small, real models for the tests."""

import pytest
import torch
from torch import Tensor

from megacontext import MCConfig, MCController

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


@pytest.fixture
def config() -> MCConfig:
    return MCConfig(**SMALL)


@pytest.fixture
def mc(config: MCConfig) -> MCController:
    return MCController(config)


@pytest.fixture
def tokens(config: MCConfig) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, config.vocab_size, (3, config.sequence_tokens), generator=generator)
