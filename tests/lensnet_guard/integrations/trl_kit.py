"""Small random models with a tokenizer, data and trainers of TRL, made here and used offline."""

import os
import random
from functools import partial

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import trl
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
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

WORDS = [
    *("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "what", "is"),
    *("capital", "of", "france", "paris", "hello", "test"),
]
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
    """Trainers of TRL from a folder that `save_models` has written; each is made as a user would.

    Args:
        folder: Where the models are.
        output: Where trainings write.
    """

    def __init__(self, folder, output):
        self.folder, self.output = folder, output
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "policy")

    def model(self, name="policy"):
        return AutoModelForCausalLM.from_pretrained(self.folder / name, dtype=torch.float32)

    def judge(self):
        return AutoModelForSequenceClassification.from_pretrained(
            self.folder / "judge", num_labels=1, dtype=torch.float32
        )

    def make(self, kind, cls=None, **options):
        """Return a trainer of a kind, from the same random numbers each time.

        Args:
            kind: One of this class's methods below.
            cls: A class that is derived from the library's.
            options: Of its configuration; ``peft=True`` for new adapters in place of a reference,
                ``tuned=True`` for some that were there before.
        """
        torch.manual_seed(0)
        random.seed(0)
        return getattr(self, kind)(cls, **options)

    def dpo(self, cls, *, peft=False, tuned=False, reference=True, **options):
        reference = self.model("reference") if reference and not peft and not tuned else None
        model = get_peft_model(self.model(), adapters()) if tuned else self.model()
        return self._made(cls or trl.DPOTrainer, trl.DPOConfig, preferences, peft, options)(
            model, reference
        )

    def kto(self, cls, *, peft=False, **options):
        reference = None if peft else self.model("reference")
        return self._made(cls or trl.KTOTrainer, trl.KTOConfig, judged, peft, options)(
            self.model(), reference
        )

    def grpo(self, cls, *, peft=False, judge=True, **options):
        return self._online(cls or trl.GRPOTrainer, trl.GRPOConfig, peft, judge, options)

    def rloo(self, cls, *, peft=False, judge=True, **options):
        return self._online(cls or trl.RLOOTrainer, trl.RLOOConfig, peft, judge, options)

    def online_dpo(self, cls, *, peft=False, **options):
        from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

        options = {"max_new_tokens": 6} | options
        made = self._made(cls or OnlineDPOTrainer, OnlineDPOConfig, prompts, peft, options)
        return made(
            self.model(),
            None if peft else self.model("reference"),
            reward_funcs=self.judge(),
            reward_processing_classes=self.tokenizer,
        )

    def gkd(self, cls, **options):
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        options = {"max_new_tokens": 6} | options
        return self._made(cls or GKDTrainer, GKDConfig, chats, False, options)(
            self.model(), self.model("reference")
        )

    def distillation(self, cls, **options):
        options = {"max_completion_length": 6} | options
        cls = cls or trl.DistillationTrainer
        return self._made(cls, trl.DistillationConfig, prompts, False, options)(
            self.model(), self.model("reference")
        )

    def reward(self, cls, **options):
        return self._made(cls or trl.RewardTrainer, trl.RewardConfig, preferences, False, options)(
            self.judge()
        )

    def sft(self, cls, **options):
        return self._made(cls or trl.SFTTrainer, trl.SFTConfig, chats, False, options)(self.model())

    def arguments(self, config, **options):
        """The settings of a quick training on the CPU."""
        return config(output_dir=str(self.output), **(ARGUMENTS | options))

    def _online(self, cls, config, peft, judge, options):
        options = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1} | options
        return self._made(cls, config, prompts, peft, options)(
            self.model(), self.judge() if judge else _length
        )

    def _made(self, cls, config, data, peft, options):
        """What makes a trainer of the models that it is given."""
        return partial(
            cls,
            args=self.arguments(config, **options),
            train_dataset=data(),
            eval_dataset=data(4),
            processing_class=self.tokenizer,
            **({"peft_config": adapters()} if peft else {}),
        )


def adapters():
    """Adapters that differ from the model without them from the first step on."""
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def _length(completions, **_):
    return [float(len(text) % 5) for text in completions]


def _text(rng, words):
    return " ".join(rng.choice(WORDS) for _ in range(words))


def preferences(number=32):
    """Prompts, each with a better and a worse completion."""
    rng = random.Random(0)
    return Dataset.from_list(
        [
            {
                "prompt": _text(rng, 4),
                "chosen": " " + _text(rng, 5),
                "rejected": " " + _text(rng, 6),
            }
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
