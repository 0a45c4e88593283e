"""Where sequences come from: each data set by its name; models unfit for one are refused."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import megacontext
from megacontext import MCConfig, TrainConfig
from megacontext.data.mixture import MixedSource
from megacontext.data.mqar import MQARSource
from megacontext.data.needles import NeedleSource
from megacontext.data.windows import TRIES, WindowSource
from megacontext.training.sources import load_source

TEXT = (str(Path(megacontext.__file__).parent),)
NEEDLES = MCConfig(
    block_size=64,
    max_lod=1,
    sequence_tokens=1_024,
    train_wc_length=1_024 - 63 * 9,
    recent_tokens=192,
)
MIXED = dataclasses.replace(NEEDLES, vocab_size=4_096)  # for as many pairs as there is room for
MQAR = MCConfig(sequence_tokens=256, train_wc_length=95, recent_tokens=32, horizon_tokens=12)


class TestLoadSource:
    @pytest.mark.parametrize(("data", "tries"), [("files", 1), ("reuse", TRIES)])
    def test_windows_of_files(self, data: str, tries: int) -> None:
        """Unselected ones, and those that use again; the tail and the horizon are the model's."""
        source = load_source(TrainConfig(data=data, text=TEXT), MCConfig())
        assert isinstance(source, WindowSource)
        assert (source.tries, source.recent_tokens, source.horizon_tokens) == (tries, 64, 32)
        assert len(source.documents.held_out) > 5

    def test_needles_in_pythons_manual(self) -> None:
        """Or in a text of one's own."""
        source = load_source(TrainConfig(data="needles"), NEEDLES)
        assert isinstance(source, NeedleSource)
        assert any(b"exception" in text.tobytes() for text in source.prose.held_out)
        own = load_source(TrainConfig(data="needles", text=TEXT), NEEDLES)
        assert isinstance(own, NeedleSource)
        assert any(b"import numpy" in text.tobytes() for text in own.prose.training)

    def test_mqar_of_numbers(self) -> None:
        """A model without a tokenizer knows no words: both parts are made of the same symbols."""
        source = load_source(TrainConfig(data="mqar"), MQAR)
        assert isinstance(source, MQARSource)
        assert source.tokenizer is None
        assert source.training is source.held_out
        assert source.held_out_batch(np.random.default_rng(0), 2, 256).tokens.max() < 256

    @pytest.mark.parametrize(
        ("data", "model"), [("needles", NEEDLES), ("mqar", MQAR), ("mixed", MIXED)]
    )
    def test_sequences_that_would_be_trimmed_are_refused(self, data: str, model: MCConfig) -> None:
        """For then blocks would not be where facts were put."""
        longer = dataclasses.replace(model, sequence_tokens=model.sequence_tokens + 3)
        kept, step = model.sequence_tokens, model.block_size - 1
        with pytest.raises(ValueError) as raised:
            load_source(TrainConfig(data=data), longer)
        assert str(raised.value) == (
            f"sequences of {data} must not be trimmed, and of {kept + 3} tokens a working context "
            f"of {model.train_wc_length} entries keeps {kept}: set sequence_tokens to {kept} or "
            f"{kept + step}"
        )

    def test_all_of_them_mixed(self) -> None:
        """Windows of both kinds of the same files, needles in the manual, and pairs."""
        source = load_source(TrainConfig(data="mixed", text=TEXT), MIXED)
        assert isinstance(source, MixedSource)
        assert source.shares == {"reuse": 0.5, "files": 0.2, "needles": 0.15, "mqar": 0.15}
        assert sum(source.shares.values()) == pytest.approx(1)
        assert source.sources.keys() == source.shares.keys()
        reuse, files, needles, mqar = source.sources.values()
        assert isinstance(reuse, WindowSource)
        assert isinstance(files, WindowSource)
        assert (reuse.tries, files.tries) == (TRIES, 1)
        assert reuse.documents is files.documents
        assert isinstance(needles, NeedleSource)
        assert any(b"exception" in text.tobytes() for text in needles.prose.held_out)
        assert isinstance(mqar, MQARSource)
        for make in (source.batch, source.lm_batch, source.held_out_batch):
            assert make(np.random.default_rng(0), 8, 1_024).tokens.shape == (8, 1_024)

    def test_each_source_of_a_mixture_is_tried(self) -> None:
        """Or a run would end when one is first drawn from that cannot give such sequences."""
        with pytest.raises(ValueError, match="416 pairs before the protected tail: 3 questions"):
            load_source(TrainConfig(data="mixed", text=TEXT), NEEDLES)

    def test_what_makes_its_own_sequences_reads_no_text(self) -> None:
        """Nor pretends to."""
        for data in ("recall", "mqar"):
            with pytest.raises(ValueError) as raised:
                TrainConfig(data=data, text=TEXT)
            assert str(raised.value) == f"{data} makes its own sequences; leave out the text"
