"""Stand-ins for the models and data sets of TRL's tests, in the layout of the hub's cache.

Example: python benchmarks/trl_standins.py ~/trl /tmp/trl-cache

TRL's tests load ``trl-internal-testing/tiny-…`` and ``…/zen`` from the hub. Its checkout holds the
scripts that made them; this runs those scripts without the hub. What they take from there, which
is configurations, tokenizers and processors of released models, is made here: a byte-level BPE
trained on TRL's own documentation, with the chat template that TRL ships for that model. What they
would upload goes into the folder. `trl_suite.py` calls this, and points HF_HOME there.

Not the hub's models: weights and vocabularies are others, the architectures are the same.
"""

import argparse
import importlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

VOCABULARY = 1_024
OURS = "trl-internal-testing/"
REVISION = "0" * 40
DATA_SCRIPTS = "generate_*_dataset.py"
MODEL_SCRIPTS = "generate_tiny_models/for_*/*.py"
SPECIAL = re.compile(
    r"<\|[\w ]+\|>|</?(?:think|tool_call|tool_response|start_of_turn|end_of_turn)>"
)


@dataclass(frozen=True)
class Original:
    """A released model that TRL's scripts begin from, as far as they need it.

    Attributes:
        prefix: What its name on the hub begins with; the first that fits is taken.
        model_type: By transformers' name; where a script asks for a configuration.
        template: TRL's file of its chat template; None for a model without.
        eos: What ends a turn.
        pad: What pads; None for a model without.
        bos: What begins a text; None for a model without.
    """

    prefix: str
    model_type: str | None = None
    template: str | None = None
    eos: str = "</s>"
    pad: str | None = None
    bos: str | None = None


QWEN = {"eos": "<|im_end|>", "pad": "<|endoftext|>"}
LLAMA = {"eos": "<|eot_id|>", "bos": "<|begin_of_text|>"}
GEMMA = {"eos": "<eos>", "pad": "<pad>", "bos": "<bos>"}
NEMOTRON = {"eos": "<|im_end|>", "bos": "<s>"}
ORIGINALS = (
    Original("Qwen/Qwen2.5-VL", "qwen2_5_vl", "qwen2_5_vl", **QWEN),
    Original("Qwen/Qwen2-VL", "qwen2_vl", "qwen2_5_vl", **QWEN),
    Original("Qwen/Qwen2.5", "qwen2", "qwen2_5", **QWEN),
    Original("Qwen/Qwen3-4B-Instruct-2507", "qwen3", "qwen3_instruct_2507", **QWEN),
    Original("Qwen/Qwen3-VL", "qwen3_vl", "qwen3_vl", **QWEN),
    Original("Qwen/Qwen3-30B", "qwen3_moe", "qwen3", **QWEN),
    Original("Qwen/Qwen3-", "qwen3", "qwen3", **QWEN),
    Original("Qwen/Qwen3.5-0.8B", "qwen3_5", "qwen3_5_nothink", **QWEN),
    Original("Qwen/Qwen3.5", "qwen3_5", "qwen3_5_think", **QWEN),
    Original("Qwen/Qwen3.6", "qwen3_5_moe", "qwen3_6", **QWEN),
    Original("meta-llama/Meta-Llama-3-", "llama", "llama3", **LLAMA),
    Original("meta-llama/Llama-3.1", "llama", "llama3_1", **LLAMA),
    Original("meta-llama/Llama-3.2", "llama", "llama3_2", **LLAMA),
    Original("google/gemma-3", "gemma3", "gemma3", **GEMMA),
    Original("google/gemma", "gemma", "gemma", **GEMMA),
    Original("zai-org/GLM", "glm4_moe", "glm4moe", eos="<|user|>", pad="<|endoftext|>"),
    Original("openai/gpt-oss", "gpt_oss", "gptoss", eos="<|return|>", pad="<|endoftext|>"),
    Original("microsoft/Phi-3.5", "phi3", "phi3_5", eos="<|end|>", pad="<|endoftext|>"),
    Original("microsoft/Phi-3", "phi3", "phi3", eos="<|end|>", pad="<|endoftext|>"),
    Original(
        "deepseek-ai", "deepseek_v3", "deepseekv3", eos="<|end|>", pad="<|pad|>", bos="<|bos|>"
    ),
    Original("CohereLabs/tiny-aya", "cohere2", "cohere2", eos="<|END_OF_TURN_TOKEN|>", pad="<PAD>"),
    Original("CohereLabs/aya", "cohere", "cohere", eos="<|END_OF_TURN_TOKEN|>", pad="<PAD>"),
    Original("LiquidAI/LFM2.5", "lfm2", "lfm2_2_5", eos="<|im_end|>", pad="<|pad|>"),
    Original("LiquidAI/LFM2-", "lfm2", "lfm2", eos="<|im_end|>", pad="<|pad|>"),
    Original("nvidia/NVIDIA-Nemotron-3-Nano", "nemotron_h", "nemotron_3_nano", **NEMOTRON),
    Original("nvidia/NVIDIA-Nemotron-3-Super", "nemotron_h", "nemotron_3_super", **NEMOTRON),
    Original("nvidia/NVIDIA-Nemotron-3-Ultra", "nemotron_h", "nemotron_3_ultra", **NEMOTRON),
    Original("mistralai", "mistral", bos="<s>"),
    Original("EleutherAI", "gpt_neox", eos="<|endoftext|>"),
    Original("openai-community", "gpt2", eos="<|endoftext|>", bos="<|endoftext|>"),
    Original("facebook/opt", "opt", pad="<pad>", bos="</s>"),
    Original("facebook/bart", "bart", pad="<pad>", bos="<s>"),
    Original("google/flan-t5", "t5", pad="<pad>"),
    Original("tiiuae", "falcon_mamba", eos="<|im_end|>", pad="<|pad|>"),
    Original("allenai", "olmo3", eos="<|im_end|>", pad="<|pad|>"),
)


class NotMade(Exception):
    """Something that TRL's scripts need and that is not made here; says what."""


def original(name: str) -> Original:
    for found in ORIGINALS:
        if name.startswith(found.prefix):
            return found
    raise NotMade(f"nothing stands in for {name}")


# What the scripts take from the hub --------------------------------------------------------------


@cache
def tokenizer(name: str, documentation: Path) -> Any:
    """A byte-level BPE with the special tokens and the chat template of a released model."""
    import trl
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    of = original(name)
    template = None
    if of.template:
        file = Path(trl.__file__).parent / "chat_templates" / f"{of.template}.jinja"
        if not file.exists():
            raise NotMade(f"trl {trl.__version__} has no chat template {file.name}")
        template = file.read_text(encoding="utf-8")
    special = [token for token in (of.pad, of.bos, of.eos) if token]
    special = list(dict.fromkeys([*special, *sorted(set(SPECIAL.findall(template or "")))]))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (file.read_text(encoding="utf-8") for file in sorted(documentation.glob("*.md")))
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=of.eos,
        pad_token=of.pad,
        bos_token=of.bos,
        chat_template=template,
        model_max_length=32_768,
    )


def generation_config(name: str, documentation: Path) -> Any:
    from transformers import GenerationConfig

    words = tokenizer(name, documentation)
    return GenerationConfig(
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )


def configuration(name: str, documentation: Path, **changes: Any) -> Any:
    from transformers import AutoConfig

    words = tokenizer(name, documentation)
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    ids["pad_token_id"] = words.pad_token_id
    return AutoConfig.for_model(
        original(name).model_type, **{"vocab_size": len(words), **ids, **changes}
    )


def processor(name: str, documentation: Path) -> Any:
    raise NotMade(f"no image processor stands in for {name}'s")


def fit(model: Any, words: Any) -> None:
    """Give a model the vocabulary of its tokenizer where TRL's script has written a larger one."""
    if model.config.get_text_config().vocab_size > len(words):
        model.resize_token_embeddings(len(words), mean_resizing=False)
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(model.config, token, getattr(words, token))


# What they would upload --------------------------------------------------------------------------


@dataclass(frozen=True)
class Cache:
    """The hub's cache, as huggingface_hub and datasets find it under HF_HOME."""

    folder: Path

    def snapshot(self, repository: str) -> Path:
        """The folder of a model's files."""
        home = self.folder / "hub" / f"models--{repository.replace('/', '--')}"
        (home / "refs").mkdir(parents=True, exist_ok=True)
        (home / "refs" / "main").write_text(REVISION)
        return home / "snapshots" / REVISION

    def put_model(self, model: Any, words: Any, generation: Any, *name: str | None) -> str:
        """As ``push_to_hub`` of TRL's scripts, with the name that it makes."""
        prefix, suffix = (*name, None, None)[:2]
        parts = [part for part in (prefix, type(model).__name__, suffix) if part]
        repository = f"{OURS}{'-'.join(parts)}"
        files = self.snapshot(repository)
        if words is not None:
            fit(model, words)
        for piece in (model, words, generation):
            if piece is not None:
                piece.save_pretrained(files)
        return repository

    def put_data(self, splits: Any, repository: str, config_name: str) -> None:
        """As ``DatasetDict.push_to_hub``."""
        from datasets import ArrowBasedBuilder, DatasetInfo, SplitGenerator

        class Written(ArrowBasedBuilder):
            def _info(self) -> DatasetInfo:
                return DatasetInfo(features=next(iter(splits.values())).features)

            def _split_generators(self, _: Any) -> list[SplitGenerator]:
                return [
                    SplitGenerator(name=split, gen_kwargs={"rows": rows})
                    for split, rows in splits.items()
                ]

            def _generate_tables(self, rows: Any) -> Iterator[tuple[Any, Any]]:
                yield (0, 0), rows.with_format("arrow")[:]

        Written(
            cache_dir=str(self.folder / "datasets"),
            dataset_name=repository.split("/")[1],
            config_name=config_name,
            repo_id=repository,
            hash=REVISION,
        ).download_and_prepare()


# Running them ------------------------------------------------------------------------------------


def make_data(checkout: Path, cache: Cache, say: Callable[[str], None]) -> list[str]:
    """Run TRL's scripts that make data sets; what could not be made."""
    from datasets import DatasetDict
    from transformers import HfArgumentParser

    missing = []

    def push(splits: DatasetDict, repository: str, config_name: str = "default", **_: Any) -> None:
        cache.put_data(splits, repository, config_name)

    for script in sorted(checkout.glob(f"scripts/{DATA_SCRIPTS}")):
        say(f"data: {script.stem}")
        try:
            module = importlib.import_module(f"scripts.{script.stem}")
            (settings,) = HfArgumentParser(module.ScriptArguments).parse_args_into_dataclasses([])
            with patch.object(DatasetDict, "push_to_hub", push):
                module.main(settings.test_size, True, settings.repo_id)
        except Exception as error:
            missing.append(f"{script.stem}: {error!r}"[:300])
    return missing


def make_models(checkout: Path, cache: Cache, say: Callable[[str], None]) -> list[str]:
    """Run TRL's scripts that make tiny models; what could not be made."""
    import torch
    import transformers

    documentation = checkout / "docs" / "source"
    common = importlib.import_module("scripts.generate_tiny_models._common")
    missing = []

    def nothing(*_: Any, **__: Any) -> None:
        """The checks against the hub's originals."""

    def of(owner: Any, make: Callable[..., Any]) -> Any:
        real = owner.from_pretrained

        def from_pretrained(name: str, *args: Any, **changes: Any) -> Any:
            if name.startswith(OURS):
                return real(name, *args, **changes)
            changes.pop("revision", None)
            return make(name, documentation, **changes)

        return staticmethod(from_pretrained)

    def push(model: Any, words: Any, generation: Any, *name: str, **_: Any) -> None:
        say(f"model: {cache.put_model(model, words, generation, *name)}")

    with ExitStack() as patched:
        for name in ("check_transformers_version", "check_dtype_pattern", "print_config_diff"):
            patched.enter_context(patch.object(common, name, nothing))
        patched.enter_context(patch.object(common, "smoke_test", nothing))
        patched.enter_context(patch.object(common, "push_to_hub", push))
        for owner, make in (
            (transformers.AutoTokenizer, tokenizer),
            (transformers.AutoProcessor, processor),
            (transformers.AutoConfig, configuration),
            (transformers.GenerationConfig, generation_config),
        ):
            patched.enter_context(patch.object(owner, "from_pretrained", of(owner, make)))
        scripts = sorted(checkout.glob(f"scripts/{MODEL_SCRIPTS}"))
        # adapters are made from a model that is in the cache by then
        for script in sorted(scripts, key=lambda script: script.stem.startswith("peft_")):
            if script.stem == "__init__":
                continue
            module = ".".join(script.relative_to(checkout).with_suffix("").parts)
            torch.manual_seed(0)
            try:
                importlib.import_module(module)
            except Exception as error:
                missing.append(f"{script.stem}: {error!r}"[:300])
    return missing


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, help="a checkout of TRL's repository")
    parser.add_argument("folder", type=Path, help="becomes HF_HOME; emptied before")
    arguments = parser.parse_args()
    checkout, folder = arguments.checkout.resolve(), arguments.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    os.environ.update(
        HF_HOME=str(folder), HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1"
    )
    sys.path.insert(0, str(checkout))  # for its folder of scripts

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    made = Cache(folder)
    missing = [*make_data(checkout, made, say), *make_models(checkout, made, say)]
    (folder / "missing.json").write_text(json.dumps(missing, indent=1))
    for line in missing:
        say(f"not made: {line}")


if __name__ == "__main__":
    main()
