"""Language models of transformers in the place of our own: small ones, saved to disk."""

import dataclasses
import importlib
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.megacontext.conftest import SMALL, small_settings, weights
from tests.megacontext.test_controller import RefuseWaiting
from torch import Tensor

from megacontext import (
    MCConfig,
    MCController,
    SessionConfig,
    load_model,
    train,
)
from megacontext.model import hf_language_model
from megacontext.model.hf_loading import language_model_sizes

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0}
LLAMA = SIZES | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
KINDS = {
    "llama, tied": ("LlamaConfig", LLAMA | {"tie_word_embeddings": True}),
    "llama": ("LlamaConfig", LLAMA | {"tie_word_embeddings": False}),
    "gpt2, tied": (
        "GPT2Config",
        SIZES | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    ),
}
SETTINGS = small_settings(
    lm_steps=1,
    lm_batch_size=2,
    steps=4,
    accumulation=2,
    checkpoint_interval=2,
    warmup_steps=1,
    learning_rate=3e-5,
)


def save(kind: str, path: Path, **changes: Any) -> Any:
    """A model with random weights, saved; with dropout that no one should meet."""
    name, values = KINDS[kind]
    config = getattr(transformers, name)(**values | changes)
    config.attention_dropout = config.resid_pdrop = config.attn_pdrop = config.embd_pdrop = 0.5
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(path)
    return model


def config_of(path: Path, **changes: Any) -> MCConfig:
    sizes = {k: v for k, v in SMALL.items() if k not in ("vocab_size", "d_model", "num_heads")}
    sizes |= language_model_sizes(path)
    return MCConfig(**sizes | {"language_model": str(path)} | changes)


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return save(request.param, tmp_path / "model")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save("llama", tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 256, (2, 96), generator=torch.Generator().manual_seed(0))


def plain(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Starts and spans of tokens at LOD0."""
    starts = torch.arange(tokens.shape[1]).expand_as(tokens)
    return starts, torch.ones_like(starts)


class TestNames:
    @pytest.mark.parametrize("name", ["cache", "past_key_values"])
    def test_of_the_cache_in_another_version_of_the_library(self, name: str) -> None:
        """Every model of transformers 4 and of the first versions 5 was refused."""
        parameter = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)

        def forward() -> None: ...

        forward.__signature__ = inspect.Signature([parameter])  # type: ignore[attr-defined]
        assert hf_language_model.cache_name(SimpleNamespace(forward=forward)) == name


class TestReading:
    def test_plain_tokens_give_the_models_own_logits(
        self, model: Any, tmp_path: Path, tokens: Tensor
    ) -> None:
        """To rounding, also in training mode: there is no dropout."""
        mc = MCController(config_of(tmp_path / "model")).train()
        with torch.no_grad():
            logits = mc.language_model(mc.language_model.embed(tokens), *plain(tokens))
            torch.testing.assert_close(logits, model(tokens).logits, rtol=0, atol=1e-6)
        scale = float(mc.language_model.scale)
        assert scale == 2**-6  # near 0.02
        assert 0.5 < float(mc.language_model.embed(tokens).detach().std()) < 2
        tied = mc.language_model.model.get_output_embeddings().weight
        assert (tied is mc.language_model.embedding.weight) == model.config.tie_word_embeddings

    def test_positions_with_a_gap_were_taken_for_another_sequence(
        self, model: Any, tmp_path: Path, tokens: Tensor
    ) -> None:
        """The library guesses so without a mask; here a late entry sees those before the gap."""
        mc = MCController(config_of(tmp_path / "model"))
        starts, spans = plain(tokens[:1, :8])
        spans = spans.clone()
        spans[:, 3] = 4  # a gist of four tokens
        starts = torch.cat([starts[:, :4], starts[:, 4:] + 3], dim=1)
        embeddings = mc.language_model.embed(tokens[:1, :8]).detach().requires_grad_()
        mc.language_model(embeddings, starts, spans)[0, 6].sum().backward()
        assert embeddings.grad is not None
        reached = embeddings.grad[0].abs().sum(-1) > 0
        assert reached.tolist() == [True] * 7 + [False]

    def test_an_entry_stands_at_its_last_token(
        self, model: Any, tmp_path: Path, tokens: Tensor
    ) -> None:
        """So the token after a gist of four at token 4 is at 8, one further than the gist."""
        mc = MCController(config_of(tmp_path / "model"))
        starts, spans = torch.tensor([[0, 4, 8]]), torch.tensor([[4, 4, 1]])
        inputs = mc.language_model.embed(tokens[:1, :3])
        with torch.no_grad():
            logits = mc.language_model(inputs, starts, spans)
            expected = model(
                inputs_embeds=inputs * 2**-6,
                position_ids=torch.tensor([[3, 7, 8]]),
                attention_mask=torch.ones(3, 3, dtype=torch.bool).tril()[None, None],
            ).logits
        assert logits.equal(expected)

    def test_pads_change_nothing(self, model: Any, tmp_path: Path, tokens: Tensor) -> None:
        """On the left, whatever they hold, and the entries beside them are finite."""
        mc = MCController(config_of(tmp_path / "model"))
        inputs, (starts, spans) = mc.language_model.embed(tokens), plain(tokens)
        pads = torch.zeros(2, 5, dtype=torch.bool)
        pad_mask = torch.cat([~pads, torch.zeros_like(tokens, dtype=torch.bool)], dim=1)
        with torch.no_grad():
            padded = mc.language_model(
                torch.cat([torch.randn(2, 5, 32), inputs], dim=1),
                torch.cat([pads.long(), starts], dim=1),
                torch.cat([pads.long() + 1, spans], dim=1),
                pad_mask,
            )
            assert padded.isfinite().all()
            torch.testing.assert_close(
                padded[:, 5:], mc.language_model(inputs, starts, spans), atol=1e-5, rtol=1e-4
            )

    def test_weights_of_half_the_width_are_trained_in_float32(
        self, tmp_path: Path, tokens: Tensor
    ) -> None:
        """AdamW's small steps are lost in bfloat16."""
        saved = save("llama", tmp_path / "model", dtype="bfloat16").to(torch.bfloat16)
        saved.save_pretrained(tmp_path / "model")
        mc = MCController(config_of(tmp_path / "model"))
        assert {p.dtype for p in mc.parameters()} == {torch.float32}
        embedding = saved.get_input_embeddings().weight
        assert mc.language_model.embedding.weight.equal(embedding.float())


class TestMicroStep:
    @pytest.mark.lensnet_calls(exact=1)
    def test_gradients_reach_all_of_it(self, model: Any, tmp_path: Path, tokens: Tensor) -> None:
        """Model, GistNet, LensNet; one call of LensNet; and the host never waits for a device."""
        mc = MCController(config_of(tmp_path / "model"))
        with mc.context("training"):
            with RefuseWaiting():
                result = mc.process_batch(tokens)
            torch.autograd.backward(result.loss)
        assert result.metrics["lensnet_calls"] == 1
        for network in (mc.language_model.model, mc.gistnet.mlp[2], mc.lensnet):
            norms = [float(p.grad.norm()) for p in network.parameters() if p.grad is not None]
            assert len(norms) == len(list(network.parameters()))
            assert max(norms) > 0

    def test_ragged_batches(self, llama: Path, tokens: Tensor) -> None:
        """A shorter sequence is judged alike beside a longer one and alone."""
        mc = MCController(config_of(llama, num_variants=1))
        padded = tokens.clone()
        padded[1, :50] = 0
        pad_mask = torch.arange(96).expand(2, -1) < torch.tensor([[0], [50]])
        together = mc.process_batch(padded, pad_mask=pad_mask)
        mc.allocator = mc.config.new_allocator()
        alone = mc.process_batch(tokens[1:, 50:])
        context = together.variants.working_context
        with torch.no_grad():
            nll = mc.token_nll(context)[2:].sum(-1)
            torch.testing.assert_close(
                nll[0], mc.token_nll(alone.variants.working_context)[0].sum()
            )

    @pytest.mark.parametrize("kind", ["llama", "gpt2, tied"])
    def test_recompute_changes_nothing(self, kind: str, tmp_path: Path, tokens: Tensor) -> None:
        """Same gradients; the blocks run twice; sessions keep their cache."""
        save(kind, tmp_path / "model")
        gradients, runs = [], []
        for recompute in (False, True):
            mc = MCController(config_of(tmp_path / "model"))
            mc.language_model.recompute = recompute
            ran: list[None] = []
            model = mc.language_model.model
            block = model.model.layers[0] if kind == "llama" else model.transformer.h[0]
            block.mlp.register_forward_pre_hook(lambda *_, ran=ran: ran.append(None))
            with mc.context("training"):
                torch.autograd.backward(mc.process_batch(tokens).loss)
            gradients.append(torch.cat([p.grad.flatten() for p in mc.parameters()]))
            runs.append(len(ran))
            check_session(mc, tokens[0])
        torch.testing.assert_close(*gradients)
        assert runs == [1, 2]

    @pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at all of them
    @pytest.mark.parametrize("recompute", [False, True])
    def test_compiled(self, llama: Path, tokens: Tensor, recompute: bool) -> None:
        """In one graph, without a minute of C++ compiler."""
        torch._dynamo.reset()
        losses = []
        for compiled in (False, True):
            mc = MCController(config_of(llama))
            mc.language_model.recompute = recompute
            if compiled:
                mc.language_model.compile(backend="aot_eager", dynamic=False, fullgraph=True)
            losses.append(mc.process_batch(tokens).loss)
        torch.testing.assert_close(*losses)
        torch._dynamo.reset()


def check_session(mc: MCController, tokens: Tensor) -> None:
    """What a session reads bit by bit is what the model says of the whole working context."""
    mc.begin_inference_session(tokens[:60], settings=SessionConfig(refocus_interval=8))
    logits = torch.cat([mc.inference_step(tokens[i : i + 1]) for i in range(60, 65)], dim=1)
    context = mc.working_context
    with torch.no_grad():
        whole = mc.language_model(context.embeddings, context.starts, context.spans)
    torch.testing.assert_close(logits, whole[:, -5:], atol=1e-5, rtol=1e-4)
    mc.end_inference_session()


class TestSessions:
    def test_with_the_cache_logits_are_those_without_it(
        self, model: Any, tmp_path: Path, tokens: Tensor
    ) -> None:
        """After a refocus, and token by token."""
        check_session(MCController(config_of(tmp_path / "model")), tokens[0])

    def test_a_history_that_is_longer_than_the_positions(
        self, model: Any, tmp_path: Path, tokens: Tensor
    ) -> None:
        """Loses its oldest entries; 128 positions, of which the last is used, and no more."""
        mc = MCController(config_of(tmp_path / "model"))
        long = torch.cat([tokens.flatten()] * 2)
        for begin in (100, 300):
            mc.begin_inference_session(long[:begin], settings=SessionConfig(refocus_interval=16))
            reached = []
            for token in long[begin : begin + 60]:
                mc.inference_step(token[None])
                context = mc.working_context
                reached.append(int((context.starts + context.spans).max()))
            assert 100 < max(reached) <= 128
            assert mc.inference_report().first_token > 0

    def test_too_few_positions_for_a_session(self, llama: Path, tokens: Tensor) -> None:
        """Refused before the first token."""
        mc = MCController(config_of(llama))
        with pytest.raises(ValueError) as raised:
            mc.begin_inference_session(tokens[0], settings=SessionConfig(refocus_interval=100))
        assert str(raised.value) == (
            "the language model's positions leave 28 tokens between refocuses, and the last 16 at "
            "LOD0 with what must stand before them take up to 31; refocus more often "
            "(refocus_interval)"
        )


class TestTraining:
    @pytest.mark.parametrize(("kind", "bf16"), [("llama, tied", False), ("gpt2, tied", True)])
    def test_a_run_goes_on_without_the_folder_that_it_began_with(
        self, kind: str, bf16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Bit by bit, and so does what is loaded from it: the run keeps all that it needs."""
        path = tmp_path / "model"
        model = save(kind, path)
        settings = dataclasses.replace(SETTINGS, bf16=bf16)
        whole = train(tmp_path / "whole", config_of(path), settings)
        assert whole.verdict.clean
        assert set(whole.verdict.calls_per_micro_step) == {1}
        process_batch, calls = MCController.process_batch, iter(range(100))

        def dies(self: MCController, *args: Any, **kwargs: Any) -> Any:
            if next(calls) == 5:
                raise KeyboardInterrupt
            return process_batch(self, *args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(MCController, "process_batch", dies)
            train(tmp_path / "cut", config_of(path), settings)
        path.rename(tmp_path / "moved")
        train(tmp_path / "cut", resume=True)
        first, second = weights(tmp_path / "whole"), weights(tmp_path / "cut")
        assert all(first[name].equal(second[name]) for name in first)
        loaded = load_model(tmp_path / "cut")
        assert all(loaded.state_dict()[name].equal(first[name]) for name in first)
        before = model.get_input_embeddings().weight
        assert not loaded.language_model.embedding.weight.equal(before)
        assert (
            loaded.language_model.embedding.weight - before
        ).abs().max() < 1e-2  # it began there

    def test_a_run_that_was_killed_before_its_first_checkpoint_has_the_given_weights(
        self, llama: Path, tmp_path: Path
    ) -> None:
        """And not random ones."""
        train(tmp_path / "run", config_of(llama), SETTINGS)
        whole = weights(tmp_path / "run")
        for name in ("checkpoint.pt", "metrics.jsonl"):
            (tmp_path / "run" / name).unlink()
        train(tmp_path / "run", resume=True)
        assert all(whole[name].equal(w) for name, w in weights(tmp_path / "run").items())

    def test_random_weights_from_a_config(self, llama: Path, tmp_path: Path) -> None:
        """Of the seed."""
        config = dataclasses.replace(config_of(llama), language_model=str(llama / "config.json"))
        first, again = (MCController(config).language_model.embedding.weight for _ in range(2))
        assert first.equal(again)
        pretrained = MCController(config_of(llama)).language_model.embedding.weight
        assert not first.equal(pretrained)
        assert abs(float(first.detach().std()) - 0.02) < 0.002

    def test_gistnet_learns_as_fast_as_lensnet(self, llama: Path, tmp_path: Path) -> None:
        """It is new, and a rate that spares a pretrained model would hardly move it."""
        before = MCController(config_of(llama)).state_dict()
        settings = dataclasses.replace(SETTINGS, learning_rate=1e-12, lens_learning_rate=1e-2)
        train(tmp_path / "run", config_of(llama), settings)
        moved = {
            k: float((v - before[k]).abs().max()) for k, v in weights(tmp_path / "run").items()
        }
        assert moved["gistnet.mlp.2.weight"] > 1e-3
        assert max(v for k, v in moved.items() if k.startswith("language_model")) < 1e-6


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"d_model": 64},
                "d_model is 64, but the language model in {path} has 32: set d_model to that, or "
                "leave it out",
            ),
            (
                {"vocab_size": 300},
                "vocab_size is 300, but the language model in {path} has 256: set vocab_size to "
                "that, or leave it out",
            ),
            (
                {"sequence_tokens": 129},
                "sequence_tokens 129 reaches beyond the 128 positions of the language model in "
                "{path} (max_position_embeddings); shorten the sequences",
            ),
            (
                {"language_model": "nowhere"},
                "language_model 'nowhere' is no folder with a config.json: give one that "
                "model.save_pretrained(folder) made",
            ),
        ],
    )
    def test_what_does_not_fit(self, llama: Path, changes: dict[str, Any], message: str) -> None:
        """When the controller is made."""
        config = config_of(llama, **changes)
        with pytest.raises((ValueError, FileNotFoundError)) as raised:
            MCController(config)
        assert str(raised.value) == message.format(path=llama)

    def test_weights_that_are_not_there(self, llama: Path) -> None:
        """A model with random weights would look like a pretrained one."""
        weights = llama / "model.safetensors"
        state = importlib.import_module("safetensors.torch").load_file(weights)
        del state["model.norm.weight"]
        importlib.import_module("safetensors.torch").save_file(state, weights, {"format": "pt"})
        with pytest.raises(ValueError) as raised:
            MCController(config_of(llama))
        assert str(raised.value) == (
            f"no causal language model can be made from {llama}: 1 weights are not there, such as "
            "model.norm.weight"
        )
        weights.unlink()
        with pytest.raises(ValueError, match="no causal language model can be made from"):
            MCController(config_of(llama))

    def test_a_window_that_slides(self, tmp_path: Path) -> None:
        """It is counted in tokens, and an entry is more than one."""
        config = transformers.MistralConfig(**LLAMA, sliding_window=16)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        with pytest.raises(ValueError) as raised:
            MCController(config_of(tmp_path))
        assert str(raised.value) == (
            f"MistralForCausalLM in {tmp_path} has layers of sliding_attention: how far back they "
            "look is counted in tokens, and entries stand for more than one; full attention is "
            "needed"
        )

    def test_a_model_without_positions(self, tmp_path: Path) -> None:
        """BLOOM counts them itself."""
        config = transformers.BloomConfig(**SIZES, hidden_size=32, n_layer=1, n_head=2)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="BloomForCausalLM"):
            MCController(config_of(tmp_path))

    def test_without_the_library(self, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The extra is named. Our own model needs nothing of it."""
        config = config_of(llama)
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(ImportError) as raised:
            MCController(config)
        assert str(raised.value) == (
            f"the language model {llama} needs the library transformers, which cannot be imported "
            "(import of transformers halted; None in sys.modules): "
            'pip install "lensnet-guard[hf]"'
        )
        MCController(MCConfig(**SMALL))
