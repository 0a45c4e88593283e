"""Families of transformers that read otherwise than in their library are refused at load."""

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megacontext.cli import main
from megacontext.model.hf_checks import _plain_tokens
from megacontext.model.hf_language_model import HFLanguageModel
from megacontext.model.hf_loading import load_language_model

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
}
FALCON = {k: v for k, v in SIZES.items() if not k.startswith(("inter", "max"))}
INSTEAD = "take a model of another family, such as Llama, Qwen or GPT-2"


def save(path: Path, config: Any) -> Path:
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


class TestRefused:
    def test_positions_that_do_not_count_from_0(self, tmp_path: Path) -> None:
        """RoBERTa's begin behind its padding token; it trained on others without a word."""
        path = save(tmp_path / "model", transformers.RobertaConfig(**SIZES, is_decoder=True))
        with pytest.raises(ValueError) as raised:
            load_language_model(path)
        message = str(raised.value)
        assert message.startswith(
            f"RobertaForCausalLM in {path} reads plain tokens otherwise than in its library, with "
            "logits that differ by up to 0."
        )
        assert message.endswith(f"it may count positions from another number than 0: {INSTEAD}")

    def test_no_positions_at_all(self, tmp_path: Path) -> None:
        """They are taken, and change nothing."""
        config = transformers.SmolLM3Config(
            **SIZES, num_key_value_heads=2, no_rope_layers=[0, 0], pad_token_id=0
        )
        path = save(tmp_path / "model", config)
        with pytest.raises(ValueError) as raised:
            load_language_model(path)
        assert str(raised.value) == (
            f"SmolLM3ForCausalLM in {path} takes no notice of the positions that it is given, and "
            f"a gist stands for more than one token: {INSTEAD}"
        )

    def test_alibi(self, tmp_path: Path) -> None:
        """Its biases are made of a mask of another shape."""
        path = save(tmp_path / "model", transformers.FalconConfig(**FALCON, alibi=True))
        with pytest.raises(ValueError) as raised:
            load_language_model(path)
        assert str(raised.value).startswith(
            f"FalconForCausalLM in {path} cannot read entries at positions that it is given ("
        )
        assert str(raised.value).endswith(f"): {INSTEAD}")

    def test_what_the_library_cannot_run(self, tmp_path: Path) -> None:
        """More heads of keys than there are heads."""
        path = save(tmp_path / "model", transformers.Qwen2Config(**SIZES, num_key_value_heads=16))
        with pytest.raises(ValueError) as raised:
            load_language_model(path)
        assert str(raised.value).startswith(f"Qwen2ForCausalLM in {path} cannot be run by its lib")
        assert str(raised.value).endswith("): put its config.json right")

    @pytest.mark.parametrize("part", ["mask", "cache"])
    def test_what_takes_no_notice(
        self, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of a mask, or of what it has read."""
        forward = transformers.LlamaForCausalLM.forward

        @functools.wraps(forward)
        def heedless(self: Any, **given: Any) -> Any:
            mask = given.get("attention_mask")
            cache = given.get("cache", given.get("past_key_values"))
            if part == "mask" and mask is not None:
                given["attention_mask"] = mask[:1]
            elif part == "cache" and cache is not None:
                del given["attention_mask"]
                given = {k: v for k, v in given.items() if v is not cache}
            return forward(self, **given)

        path = save(tmp_path / "model", transformers.LlamaConfig(**SIZES))
        monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", heedless)
        with pytest.raises(ValueError) as raised:
            load_language_model(path)
        assert (
            "takes no notice of the attention mask that it is given"
            if part == "mask"
            else "reads plain tokens in two pieces, by its cache, otherwise than in its library"
        ) in str(raised.value)

    def test_it_left_a_run_folder_that_could_not_be_resumed(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Now it is refused before there is one, without an advice on usage."""
        path = save(tmp_path / "model", transformers.FalconConfig(**FALCON, alibi=True))
        run_dir = tmp_path / "run"
        arguments = ["--sequence-tokens", "128", "--train-wc-length", "72", "--text", __file__]
        with pytest.raises(SystemExit) as ended:
            main(
                ["train", "--run-dir", str(run_dir), "--language-model", str(path), *arguments],
                standalone_mode=False,
            )
        assert ended.value.code == 3
        error = capsys.readouterr().err
        assert f"Error: FalconForCausalLM in {path} cannot read entries" in error
        assert "Usage" not in error
        assert "Traceback" not in error
        assert not run_dir.exists()


class TestAccepted:
    @pytest.mark.parametrize(
        "config",
        [
            transformers.LlamaConfig(**SIZES),
            transformers.MixtralConfig(
                **SIZES, num_local_experts=2, num_key_value_heads=2, router_jitter_noise=0.5
            ),
            transformers.GemmaConfig(**SIZES, head_dim=8, num_key_value_heads=4),
            transformers.OPTConfig(
                vocab_size=64,
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=130,
                word_embed_proj_dim=32,
            ),
            transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=12),
            transformers.FalconConfig(**FALCON),
        ],
        ids=lambda config: config.model_type,
    )
    def test_other_families(self, config: Any, tmp_path: Path) -> None:
        """Also one of 12 positions; nothing random is drawn, and modes are as they were."""
        path = save(tmp_path / "model", config)
        torch.manual_seed(3)
        drawn = torch.rand(1)
        torch.manual_seed(3)
        model = load_language_model(path)
        assert torch.rand(1) == drawn
        assert not model.training
        assert HFLanguageModel(model).recompute is False

    @pytest.mark.parametrize("size", [3, 64])
    def test_tokens_that_mean_no_more_than_others(self, size: int) -> None:
        """A configuration need not have all of the special ones, nor are they always one."""
        config = SimpleNamespace(vocab_size=size, eos_token_id=[33, 34], bos_token_id=None)
        (tokens,) = _plain_tokens(config, 4).tolist()
        assert tokens == ([1, 2, 1, 2] if size == 3 else [32, 35, 36, 37])
