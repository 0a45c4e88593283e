"""TRL's DPO trainer under the contract that it keeps, with nothing named.

A small random model and its tokenizer are made here, so that nothing is downloaded. Run me, and
then with --break-it, where a metric asks the reference model a second time in each micro-batch: a
quarter more time per step, and nothing in the loss curve shows it.
"""

import argparse
import tempfile
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from lensnet_guard import LensNetViolation
from lensnet_guard.integrations.transformers import guarded_trainer

WORDS = ["[PAD]", "[EOS]", "what", "is", "the", "capital", "of", "france", "?", "paris", "rome"]


class MeasuredTrainer(DPOTrainer):
    """Logs how sure the reference is, which it asks once more for that."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            self.ref_model(inputs["input_ids"])
        return super().compute_loss(model, inputs, *args, **kwargs)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--break-it", action="store_true")
trainer_class = MeasuredTrainer if parser.parse_args().break_it else DPOTrainer

disable_progress_bars()
words = Tokenizer(WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[PAD]"))
words.pre_tokenizer = Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]", unk_token="[PAD]"
)
pair = {"prompt": "what is the capital of france ?", "chosen": " paris", "rejected": " rome"}
tiny = {"vocab_size": len(WORDS), "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
config = GPT2Config(**tiny, bos_token_id=1, eos_token_id=1, pad_token_id=0)

with tempfile.TemporaryDirectory() as folder:
    trainer = trainer_class(
        GPT2LMHeadModel(config),
        GPT2LMHeadModel(config).eval(),
        args=DPOConfig(
            folder,
            max_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_list([pair] * 16),
        eval_dataset=Dataset.from_list([pair] * 4),
        processing_class=tokenizer,
    )
    try:
        with guarded_trainer(trainer):
            trainer.train()  # prints its verdict
    except LensNetViolation as violation:
        print(f"{type(violation).__name__}: {violation}")
