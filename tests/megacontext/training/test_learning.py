"""LensNet learns to focus: a real training, from nothing, judged on sequences it never saw."""

from pathlib import Path

import pytest

from megacontext import MCConfig, TrainConfig, load_model, train
from megacontext.data.recall import RecallSource
from megacontext.evaluation.compare import evaluate, gap_closed
from megacontext.evaluation.intervals import paired_interval
from megacontext.evaluation.ways import LENSNET, RANDOM, Comparing

SOURCE = RecallSource(keys=4, symbols=8, facts=2, questions=1)
MODEL = MCConfig(
    vocab_size=SOURCE.vocab_size,
    d_model=32,
    lm_layers=2,
    lens_layers=1,
    sequence_tokens=64,
    train_wc_length=36,
    recent_tokens=16,
    horizon_tokens=SOURCE.horizon_tokens,
    num_variants=4,
)
SETTINGS = TrainConfig(
    data="recall",
    lm_steps=160,
    steps=60,
    batch_size=16,
    learning_rate=4e-3,
    lens_learning_rate=4e-3,
)


def test_lensnet_finds_the_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of six hold facts, and two can be expanded: it beats chance by far."""
    monkeypatch.setattr("megacontext.training.run.load_source", lambda *_: SOURCE)
    result = train(tmp_path / "run", MODEL, SETTINGS)
    assert str(result.verdict) == (
        "60 micro-steps, 60 LensNet calls, 0 violations; 6 inference calls"
    )
    what = Comparing(oracle_draws=8)
    found = evaluate(load_model(tmp_path / "run"), SOURCE, sequences=128, seed=1, what=what)
    low, _ = paired_interval(found.nll[RANDOM] - found.nll[LENSNET])
    assert low > 0.5  # nats; 1.3 is usual
    assert gap_closed(found, LENSNET) > 0.75
