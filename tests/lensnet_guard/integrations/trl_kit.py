"""Small random models with a tokenizer, data and trainers of TRL, made here and used offline."""

import random

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

disable_progress_bars()

WORDS = "the quick brown fox jumps over lazy dog what is capital of france paris hello test".split()
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|eos|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
ARGUMENTS = {
    "per_device_train_batch_size": 2,
    "max_steps": 3,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "seed": 1,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "bf16": False,
    "gradient_checkpointing": False,
}


def save_models(folder):
    """Write a language model, a reference, a reward model and their tokenizer below a folder."""
    trained = ByteLevelBPETokenizer()
    marks = ["<|eos|>", "<|pad|>", "<|user|>", "<|assistant|>"]
    trained.train_from_iterator([" ".join(WORDS)] * 4, vocab_size=300, special_tokens=marks)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token="<|eos|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = CHAT
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 1, "eos_token_id": 0, "bos_token_id": 0}
    torch.manual_seed(0)
    for name in ("policy", "reference"):
        Qwen2ForCausalLM(Qwen2Config(**ids, **SIZES)).save_pretrained(folder / name)
    judge = Qwen2ForSequenceClassification(Qwen2Config(**ids, **SIZES, num_labels=1))
    judge.save_pretrained(folder / "judge")
    for name in ("policy", "reference", "judge"):
        tokenizer.save_pretrained(folder / name)
    return folder


class Kit:
    """Models, data and trainers from a folder that `save_models` has written."""

    def __init__(self, folder, output):
        self.folder, self.output = folder, output
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "policy")

    def model(self, name="policy"):
        return AutoModelForCausalLM.from_pretrained(self.folder / name, dtype=torch.float32)

    def judge(self):
        return AutoModelForSequenceClassification.from_pretrained(
            self.folder / "judge", num_labels=1, dtype=torch.float32
        )

    def arguments(self, config, **options):
        return config(output_dir=str(self.output), **(ARGUMENTS | options))


def _text(rng, words):
    return " ".join(rng.choice(WORDS) for _ in range(words))


def preferences(number=32):
    """Prompts, each with a better and a worse completion."""
    rng = random.Random(0)
    return Dataset.from_list(
        [
            {"prompt": _text(rng, 4), "chosen": " " + _text(rng, 5), "rejected": " " + _text(rng, 6)}
            for _ in range(number)
        ]
    )


def judged(number=32):
    """Prompts with a completion each, every other one good."""
    rng = random.Random(0)
    return Dataset.from_list(
        [
            {"prompt": _text(rng, 4), "completion": " " + _text(rng, 5), "label": bool(n % 2)}
            for n in range(number)
        ]
    )


def prompts(number=32):
    """Prompts alone."""
    rng = random.Random(0)
    return Dataset.from_list([{"prompt": _text(rng, 4)} for _ in range(number)])


def chats(number=32):
    """Conversations of one question and one answer."""
    rng = random.Random(0)
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": _text(rng, 4)},
                    {"role": "assistant", "content": _text(rng, 5)},
                ]
            }
            for _ in range(number)
        ]
    )


def losses(trainer):
    """What a training has logged, to the last digit."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
