"""The model's own attention as a picker: what it says is what the layers compute."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megacontext import LanguageModel
from megacontext.evaluation.attention import attention
from megacontext.evaluation.pickers import Visible

K, BLOCKS, LAST = 4, 5, 3
TOKENS = np.random.default_rng(0).integers(0, 50, (2, BLOCKS * K + 6))
VISIBLE = Visible(TOKENS, BLOCKS, K, picks=2)


def read_by(model: LanguageModel) -> object:
    def read(tokens: torch.Tensor) -> None:
        starts = torch.arange(tokens.shape[1]).expand_as(tokens)
        model(model.embed(tokens), starts, torch.ones_like(starts))

    return read


class TestAttention:
    def test_it_is_what_each_query_takes_of_each_key(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Found by giving the layers values that are one-hot: what comes out is the attention."""
        torch.manual_seed(0)
        model = LanguageModel(50, 16, 2, 2)
        mean, most = attention(VISIBLE, read_by(model), LAST)
        noted = []
        compute = F.scaled_dot_product_attention

        def spy(query, key, value, **how):  # type: ignore[no-untyped-def]
            keys = torch.eye(key.shape[2]).expand(*key.shape[:2], -1, -1)
            noted.append(compute(query, key, keys, **how)[:, :, -LAST:].sum(2))
            return compute(query, key, value, **how)

        monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
        with torch.no_grad():
            read_by(model)(torch.from_numpy(TOKENS))  # type: ignore[operator]
        heads = torch.cat(noted, dim=1)
        assert heads.shape[1] == 4  # two layers of two heads
        heads[:, :, :4] = 0
        blocks = heads[:, :, : BLOCKS * K].reshape(2, 4, BLOCKS, K).sum(-1)
        np.testing.assert_allclose(mean, blocks.mean(1), atol=1e-6)
        np.testing.assert_allclose(most, blocks.amax(1), atol=1e-6)

    def test_a_model_of_transformers_that_shares_keys(self) -> None:
        """Two queries a key (grouped-query attention): as its eager attention says."""
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
        mean, most = attention(VISIBLE, lambda tokens: model(input_ids=tokens), LAST)
        model.set_attn_implementation("eager")
        with torch.no_grad():
            layers = model(input_ids=torch.from_numpy(TOKENS), output_attentions=True).attentions
        heads = torch.cat(layers, dim=1)[:, :, -LAST:].sum(2)
        heads[:, :, :4] = 0
        blocks = heads[:, :, : BLOCKS * K].reshape(2, 8, BLOCKS, K).sum(-1)
        np.testing.assert_allclose(mean, blocks.mean(1), atol=1e-5)
        np.testing.assert_allclose(most, blocks.amax(1), atol=1e-5)

    def test_nothing_is_noted_afterwards(self) -> None:
        """And the model computes what it did."""
        model = LanguageModel(50, 16, 1, 2)
        entries = model.embed(torch.from_numpy(TOKENS)), torch.zeros(2, 26), torch.ones(2, 26)
        before = model(*entries)
        attention(VISIBLE, read_by(model), LAST)
        assert model(*entries).equal(before)

    def test_attention_that_is_not_seen_is_told(self) -> None:
        """Instead of scores of nothing."""
        with pytest.raises(RuntimeError) as raised:
            attention(VISIBLE, lambda tokens: tokens, LAST)
        assert str(raised.value) == (
            "the language model computes attention otherwise than by "
            "torch.nn.functional.scaled_dot_product_attention, so what it attends to was not seen: "
            'make it with attn_implementation="sdpa"'
        )
