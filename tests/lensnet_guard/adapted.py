"""Small random models, and PEFT's adapters for them."""

import pytest
import torch

peft = pytest.importorskip("peft", reason="the extra named test is not installed")
transformers = pytest.importorskip("transformers")

IDS = torch.arange(8).reshape(2, 4)


def make_model(**settings):
    """Two layers of eight, with weights that are the same each time."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=15,
        **settings,
    )
    return transformers.LlamaForCausalLM(config).eval()


def lora(**settings):
    """An adapter that changes what the model computes as soon as it is made."""
    return peft.LoraConfig(
        **{"target_modules": ["q_proj"], "r": 2, "init_lora_weights": False, **settings}
    )
