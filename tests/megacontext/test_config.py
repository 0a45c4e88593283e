"""The configuration refuses what cannot be built, before anything is."""

import dataclasses

import pytest

from megacontext import MCConfig, Recipe, UnreachableTarget
from megacontext.allocators.cut import kept_tokens


class TestRefusals:
    @pytest.mark.parametrize(
        ("values", "error", "message"),
        [
            ({"d_model": 96.0}, TypeError, "d_model must be an int, not 96.0"),
            ({"block_size": "8"}, TypeError, "block_size must be an int, not '8'"),
            ({"temperature": "hot"}, TypeError, "temperature must be a number, not 'hot'"),
            ({"num_variants": 0}, ValueError, "num_variants must be positive, not 0"),
            ({"num_variants": True}, TypeError, "num_variants must be an int, not True"),
            ({"temperature": float("nan")}, ValueError, "temperature must be positive, not nan"),
            ({"seed": -1}, ValueError, "seed must not be negative, but is -1"),
            ({"recipe": {}}, TypeError, "recipe must be a Recipe, not {}"),
            (
                {"freeze_language_model": "no", "language_model": "x"},
                TypeError,
                "freeze_language_model must be a bool, not 'no'",
            ),
            ({"language_model": None}, TypeError, "language_model must be a str, not None"),
            (
                {"d_model": 20, "num_heads": 4},
                ValueError,
                "d_model 20 must be a multiple of 2 · num_heads = 8: "
                "rotary positions turn pairs of features",
            ),
            (
                {"horizon_tokens": 64},
                ValueError,
                "horizon_tokens 64 must be fewer than recent_tokens 64: "
                "LensNet needs recent tokens before the horizon to look at",
            ),
            (
                {"lod2_probability": 2.0},
                ValueError,
                "lod2_probability must be a number in [0, 1], not 2.0",
            ),
        ],
    )
    def test_by_name_and_value(
        self, values: dict[str, object], error: type[Exception], message: str
    ) -> None:
        """The message says which field, what it is, and what it may be."""
        with pytest.raises(error) as raised:
            MCConfig(**values)  # type: ignore[arg-type]
        assert str(raised.value) == message

    def test_a_target_below_what_collapses_reach(self) -> None:
        """DESIGN's mistake: with a low target it looped for 0.5 s and failed at run time."""
        with pytest.raises(UnreachableTarget) as raised:
            MCConfig(train_wc_length=40)
        assert str(raised.value) == (
            "train_wc_length 40 cannot be reached from every sequence of up to 384 tokens with "
            "block_size 8, LODs up to 2 and 64 recent tokens at LOD0; "
            "the nearest length that can is 76"
        )

    def test_the_length_that_the_message_names_works(self) -> None:
        """And one less does not."""
        assert MCConfig(train_wc_length=76).train_wc_length == 76
        with pytest.raises(UnreachableTarget):
            MCConfig(train_wc_length=75)

    def test_every_sequence_length_reaches_an_accepted_target(self) -> None:
        """What construction accepts never fails in a step, for shorter sequences either."""
        config = MCConfig(train_wc_length=76)
        allocator = config.new_allocator()
        for length in range(76, config.sequence_tokens + 1):
            kept = kept_tokens(length, 76, config.block_size)
            assert len(allocator.sample(kept, 76)) == 76

    def test_a_target_above_the_sequence(self) -> None:
        """Nothing is ever expanded beyond its tokens."""
        with pytest.raises(UnreachableTarget) as raised:
            MCConfig(train_wc_length=400)
        assert str(raised.value) == (
            "train_wc_length 400 exceeds sequence_tokens 384; the longest possible is 384"
        )

    def test_a_focus_window_that_no_view_fits(self) -> None:
        """Checked at construction too, as LensNet would otherwise fail in the first step."""
        with pytest.raises(UnreachableTarget, match="does not fit a focus_window of 8"):
            MCConfig(focus_window=8)


class TestRecipe:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"scored": "both"}, "scored must be one of view, variant, not 'both'"),
            ({"judged": 3}, "judged must be one of horizon, all, not 3"),
        ],
    )
    def test_choices(self, values: dict[str, object], message: str) -> None:
        """Named."""
        with pytest.raises(ValueError) as raised:
            Recipe(**values)  # type: ignore[arg-type]
        assert str(raised.value) == message

    def test_what_an_older_version_wrote_is_read(self) -> None:
        """There its parts stood among the rest, beside options that there are no more."""
        saved = {"d_model": 32, "scored": "variant", "causal_lens": True, "judged": "horizon"}
        unused = {"rank_weight": 0.0, "budget_weight": 0.0, "standardize": False}
        expected = MCConfig(d_model=32, recipe=Recipe(scored="variant", causal_lens=True))
        assert MCConfig.from_json(saved | unused) == expected

    @pytest.mark.parametrize(
        ("name", "value"), [("rank_weight", 0.5), ("budget_weight", 0.1), ("standardize", True)]
    )
    def test_what_was_trained_otherwise_is_refused(self, name: str, value: object) -> None:
        """It would be another training."""
        with pytest.raises(ValueError) as raised:
            MCConfig.from_json({name: value})
        assert str(raised.value) == (
            f"{name} is {value}, and the preference loss has no such term any more, for it did "
            "not help: use the version of this library that began the run, or train anew"
        )


class TestDefaults:
    def test_they_can_be_saved_and_read_back(self) -> None:
        """As config.json does."""
        for config in (MCConfig(), MCConfig(d_model=32, recipe=Recipe("variant", "all", True))):
            assert MCConfig.from_json(dataclasses.asdict(config)) == config

    def test_no_lod2_has_a_higher_floor(self) -> None:
        """Probability 0 forbids LOD2, so the shortest length is that of LOD1."""
        with pytest.raises(UnreachableTarget, match="LODs up to 1"):
            MCConfig(lod2_probability=0.0, train_wc_length=70)
