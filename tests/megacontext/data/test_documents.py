"""Documents: which part a text is in depends on its name alone."""

import hashlib
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megacontext.data.documents import is_held_out, joined, read_documents, split_documents
from megacontext.data.tokenizer import ByteTokenizer

TEXTS = [(f"{i}.txt", bytes([i])) for i in range(40)]


class TestSplitDocuments:
    @given(st.sets(st.integers(0, 39), min_size=10))
    def test_a_text_stays_in_its_part_when_others_go(self, kept: set[int]) -> None:
        """Whatever else there is; and none is in both."""
        made = split_documents([TEXTS[i] for i in sorted(kept)], ByteTokenizer())
        held_out = {int(text[0]) for text in made.held_out}
        assert held_out == {i for i in kept if is_held_out(f"{i}.txt")}
        assert {int(text[0]) for text in made.training} == kept - held_out

    def test_one_in_five_is_held_out(self) -> None:
        """Of many names, by the first byte of their SHA-256."""
        names = [f"folder/{i}.py" for i in range(2_000)]
        assert 340 < sum(map(is_held_out, names)) < 460
        assert all(
            is_held_out(n) == (hashlib.sha256(n.encode()).digest()[0] % 5 == 0) for n in names
        )

    def test_of_a_few_texts_the_end_of_each_is_held_out(self) -> None:
        """The last fifth."""
        made = split_documents([("a", bytes(range(10))), ("b", b"12345")], ByteTokenizer())
        assert [text.tolist() for text in made.held_out] == [[8, 9], [ord("5")]]
        assert joined(made.training, 256).tolist() == [*range(8), *b"1234"]

    def test_copies_by_another_name_were_in_both_parts(self) -> None:
        """The first of them counts, so that nothing that is trained on is held out as well."""
        copies = [(f"copy of {name}", text) for name, text in TEXTS]
        assert any(
            is_held_out(a) != is_held_out(b) for (a, _), (b, _) in zip(TEXTS, copies, strict=True)
        )
        made = split_documents([*TEXTS, *copies], ByteTokenizer())
        assert made.sha256 == split_documents(TEXTS, ByteTokenizer()).sha256

    def test_the_fingerprint_tells_texts_and_parts_apart(self) -> None:
        """A changed text is found, and one that changed parts by its name."""
        of = [split_documents(texts, ByteTokenizer()).sha256 for texts in (TEXTS, TEXTS)]
        assert of[0] == of[1]
        name = next(name for name, _ in TEXTS if is_held_out(name))
        renamed = [(n if n != name else "training", text) for n, text in TEXTS]
        assert not is_held_out("training")
        assert split_documents(renamed, ByteTokenizer()).sha256 != of[0]
        assert split_documents([*TEXTS[:-1], ("39.txt", b"!")], ByteTokenizer()).sha256 != of[0]


class TestReadDocuments:
    def test_names_are_paths_within_the_folder(self, tmp_path: Path) -> None:
        """So the parts are the same wherever the folder is."""
        parts = []
        for place in ("here", "there"):
            folder = tmp_path / place / "texts"
            for name, text in TEXTS:
                file = folder / "sub" / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(text)
            parts.append(read_documents([folder], ByteTokenizer()))
        assert parts[0].sha256 == parts[1].sha256
        held_out = {text for name, text in TEXTS if is_held_out(f"sub/{name}")}
        assert {text.tobytes() for text in parts[0].held_out} == held_out

    def test_the_description_counts(self) -> None:
        """Files and tokens of both parts."""
        made = split_documents([("a", bytes(10))], ByteTokenizer())
        assert made.description == {
            "sha256": made.sha256,
            "files": 1,
            "held_out_files": 1,
            "training_bytes": 8,
            "held_out_bytes": 2,
        }
        assert np.concatenate(made.held_out).dtype == np.uint8
