"""How to train: values of another type are refused by name."""

import pytest

from megacontext import TrainConfig


class TestRefusals:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"compile": "no"}, "compile must be a bool, not 'no'"),
            ({"shard": 0}, "shard must be a bool, not 0"),
            ({"device": 0}, "device must be a str, not 0"),
            ({"text": "notes.txt"}, "text must be a tuple of paths, each a str, not 'notes.txt'"),
            ({"text": (1,)}, r"text must be a tuple of paths, each a str, not \(1,\)"),
        ],
    )
    def test_values_of_another_type(self, values: dict[str, object], message: str) -> None:
        """A word in a flag's place counted as true, and a path as one for each of its letters."""
        with pytest.raises(TypeError, match=f"^{message}$"):
            TrainConfig(**values)  # type: ignore[arg-type]
