"""Settings that work: sizes of model and training that go together, by name."""

from megacontext.config import MCConfig
from megacontext.data.recall import RecallSource
from megacontext.model.gguf import SMOLLM2
from megacontext.training.train_config import TrainConfig

_RECALL = RecallSource()

# What each is for stands in the help of `megacontext train`.
SETTINGS: dict[str, tuple[MCConfig, TrainConfig]] = {
    "demo": (MCConfig(), TrainConfig()),
    "recall": (
        MCConfig(
            vocab_size=_RECALL.vocab_size,
            d_model=64,
            lm_layers=2,
            block_size=_RECALL.block_size,
            sequence_tokens=256,
            train_wc_length=95,
            recent_tokens=32,
            horizon_tokens=_RECALL.horizon_tokens,
            num_variants=7,
        ),
        TrainConfig(
            data="recall",
            lm_steps=300,
            steps=600,
            batch_size=16,
            learning_rate=2e-3,
            lens_learning_rate=2e-3,
        ),
    ),
    "text": (
        MCConfig(
            sequence_tokens=256,
            train_wc_length=67,
            recent_tokens=32,
            horizon_tokens=16,
            num_variants=7,
        ),
        TrainConfig(
            lm_steps=500,
            steps=500,
            batch_size=16,
            learning_rate=2e-3,
            lens_learning_rate=2e-3,
        ),
    ),
    # 29 blocks of history, and room for three of them at LOD0 before the tail.
    "smollm2": (
        MCConfig(
            vocab_size=49_152,
            d_model=576,
            num_heads=9,
            lm_layers=30,
            block_size=32,
            sequence_tokens=1_024,
            train_wc_length=218,
            recent_tokens=96,
            horizon_tokens=32,
            language_model=SMOLLM2,
            freeze_language_model=True,
            gists="weighted",
            lens_reads="tokens",
            num_variants=1,
        ),
        TrainConfig(
            data="mixed",
            gist_steps=100,
            kept_sequences=160,
            guess_steps=1_000,
            steps=100,
            batch_size=16,
            lens_learning_rate=3e-3,
            log_interval=10,
            checkpoint_interval=25,
        ),
    ),
}
