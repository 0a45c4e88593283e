"""Text as tokens: bytes, or by the tokenizer that a given language model brings."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.megacontext.conftest import TEXT, invoke

from megacontext.data.source import load_corpus
from megacontext.data.tokenizer import ByteTokenizer, PretrainedTokenizer, tokenizer_of

transformers = pytest.importorskip("transformers")

SOURCES = Path(*TEXT)
SIZES = "--steps 2 --batch-size 2 --lens-layers 1 --block-size 4 --sequence-tokens 96"
SMALL = f"{SIZES} --train-wc-length 48 --recent-tokens 16 --horizon-tokens 8".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 300 tokens, and a Llama that has four more of them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    made.train_from_iterator([(SOURCES / "calls" / "policy.py").read_text()], trainer)
    path = tmp_path_factory.mktemp("given") / "model"
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")
    tokenizer.save_pretrained(path)
    config = transformers.LlamaConfig(
        vocab_size=304,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


class TestPretrainedTokenizer:
    @pytest.mark.parametrize(
        "text", ["def f(x):\n    return x  # fünf, 日本 🙂🙂\n", "  leading\t", "🙂"]
    )
    def test_what_is_encoded_is_decoded_token_by_token(self, folder: Path, text: str) -> None:
        """Also characters that take several tokens, and pieces that end within one."""
        tokenizer = tokenizer_of(str(folder))
        data = text.encode()
        tokens = np.concatenate(list(tokenizer.encode([data[:3], b"", data[3:]]))).tolist()
        decode = tokenizer.decoder()
        assert b"".join(decode(token) for token in tokens) == data
        assert max(tokens) < tokenizer.vocab_size == 300

    def test_special_tokens_are_neither_added_nor_shown(self, folder: Path) -> None:
        """The end of a text is no part of it."""
        tokenizer = tokenizer_of(str(folder))
        (tokens,) = tokenizer.encode([b"a"])
        assert len(tokens) == 1
        assert tokenizer.decoder()(0) == b""

    def test_beside_the_config_too(self, folder: Path, tmp_path: Path) -> None:
        """As a run keeps it; and without one, text is bytes."""
        assert isinstance(tokenizer_of(str(folder / "config.json")), PretrainedTokenizer)
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        for path in ("", str(tmp_path), str(tmp_path / "config.json")):
            assert isinstance(tokenizer_of(path), ByteTokenizer)

    def test_one_that_is_damaged(self, tmp_path: Path) -> None:
        """Text must not become bytes in silence."""
        (tmp_path / "tokenizer.json").write_text('{"version"')
        with pytest.raises(ValueError, match=r"the tokenizer in .* cannot be loaded .*; put its"):
            tokenizer_of(str(tmp_path))


class TestCorpus:
    def test_of_tokens(self, folder: Path) -> None:
        """Fewer than bytes, and other ones: another fingerprint."""
        tokens = load_corpus([SOURCES], 96, tokenizer_of(str(folder)))
        text = load_corpus([SOURCES], 96)
        assert len(tokens.training) < 0.8 * len(text.training)
        assert tokens.training.dtype == np.uint16
        assert tokens.description.keys() - {"sha256", "files"} == {
            "training_tokens",
            "validation_tokens",
        }
        assert tokens.sha256 != text.sha256
        assert tokens.vocab_size == 300
        assert 3 < tokens.unigram_entropy() < np.log(300)


def words(path: Path, vocab_size: int, ids: dict[str, int]) -> Path:
    """A model that embeds so many tokens, and a tokenizer of whole words with such ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"<unk>": 0, **ids}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>").save_pretrained(
        path
    )
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


class TestIdsBeyondTheNumberOfTokens:
    @pytest.fixture
    def text(self, tmp_path: Path) -> Path:
        path = tmp_path / "text"
        path.write_text("alpha beta gamma " * 600)
        return path

    def test_they_wrapped_around(self, tmp_path: Path, text: Path) -> None:
        """Four tokens, the last of which has id 300: it became 44, another word or none."""
        path = words(tmp_path / "model", 512, {"alpha": 1, "beta": 2, "gamma": 300})
        tokenizer = tokenizer_of(str(path))
        assert tokenizer.vocab_size == 301
        corpus = load_corpus([text], 96, tokenizer)
        assert corpus.training.dtype == np.uint16
        assert set(corpus.training.tolist()) == {1, 2, 300}
        decode = tokenizer.decoder()
        assert b"".join(map(decode, corpus.training[:3].tolist())) == b"alpha beta gamma"

    @pytest.mark.parametrize("size", [3, 300])
    def test_a_model_that_does_not_embed_them(self, tmp_path: Path, text: Path, size: int) -> None:
        """Is refused, whether the text has them or not, before a folder is made."""
        path = words(tmp_path / "model", size, {"alpha": 1, "beta": 2, "omega": 300})
        arguments = ["train", "--run-dir", tmp_path / "run", "--text", text]
        code, _, err = invoke(*arguments, "--language-model", path, *SMALL)
        assert code == 3
        assert err == (
            f"Error: the language model in {path} embeds {size} tokens, and the tokenizer beside "
            "it has ids up to 300: put the tokenizer there that the model was trained with, or "
            "give the model more embeddings (model.resize_token_embeddings(301))\n"
        )
        assert not (tmp_path / "run").exists()


class TestCommands:
    def test_train_evaluate_and_generate(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The whole way, and the model's own folder is not needed after the first step of it."""
        monkeypatch.setattr("megacontext.evaluation.overview.draw_overview", lambda *_: None)
        run_dir, given = tmp_path / "run", tmp_path / "given"
        folder.rename(given)
        arguments = ["train", "--run-dir", run_dir, "--text", SOURCES, "--language-model", given]
        code, out, _ = invoke(*arguments, *SMALL)
        assert code == 0, out
        assert f"{given} reads text as its tokenizer's tokens\n" in out
        assert out.splitlines()[-1] == (
            "2 micro-steps, 2 LensNet calls, 0 violations; 1 inference call"
        )
        saved = json.loads((run_dir / "config.json").read_text())
        sizes: dict[str, Any] = saved["model"]
        assert (sizes["d_model"], sizes["vocab_size"], sizes["num_heads"]) == (32, 304, 2)
        assert sizes["language_model"] == str(given)
        assert saved["train"]["learning_rate"] == 3e-5
        assert "training_tokens" in saved["source"]
        given.rename(folder)
        code, out, err = invoke(
            "generate", "--run-dir", run_dir, "--text", "def ", "--max-tokens", 9
        )
        assert (code, "9 tokens generated" in err) == (0, True)
        code, out, _ = invoke("eval", "--run-dir", run_dir, "--sequences", 2, "--oracle-draws", 1)
        assert (code, "recency window" in out) == (0, True)

    def test_a_model_without_a_tokenizer_reads_bytes(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And says so; generating takes only the tokens that are bytes. Options win."""
        monkeypatch.setattr("megacontext.evaluation.overview.draw_overview", lambda *_: None)
        run_dir, config = tmp_path / "run", tmp_path / "config.json"
        config.write_bytes((folder / "config.json").read_bytes())
        arguments = ["train", "--run-dir", run_dir, "--text", SOURCES, "--language-model", config]
        code, out, _ = invoke(*arguments, *SMALL, "--num-heads", 4)
        assert code == 0, out
        assert f"{config} reads text as bytes, for it has no tokenizer\n" in out
        saved = json.loads((run_dir / "config.json").read_text())
        assert (saved["model"]["num_heads"], saved["train"]["learning_rate"]) == (4, 3e-3)
        code, out, err = invoke(
            "generate", "--run-dir", run_dir, "--text", "def ", "--max-tokens", 9
        )
        assert (code, "9 bytes generated" in err) == (0, True)

    def test_what_does_not_fit_is_wrong_usage(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Before the text becomes tokens, and the folder is made."""
        monkeypatch.setattr("megacontext.training.run.load_source", None)
        arguments = ["train", "--run-dir", tmp_path / "run", "--language-model", folder]
        code, _, err = invoke(*arguments, "--sequence-tokens", 256)
        assert code == 2
        assert "reaches beyond the 128 positions of the language model" in " ".join(err.split())
        assert not (tmp_path / "run").exists()
