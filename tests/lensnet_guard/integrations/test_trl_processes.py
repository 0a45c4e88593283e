"""TRL's trainers on two processes, as torchrun starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="TRL comes with the extra trl")

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def told(trl_models, tmp_path_factory):
    """What each of two ranks logged, without a guard and with one."""
    output = tmp_path_factory.mktemp("ranks")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = Path(__file__).with_name("trl_two_processes.py")
    done = subprocess.run(
        [*torchrun, script, trl_models, output],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((output / f"rank{rank}.json").read_text()) for rank in range(2)]
    return ranks, output, done.stdout


def test_each_rank_logs_what_it_logs_without_a_guard(told):
    """The losses are gathered from both; the first rank alone logs them."""
    ranks, _, _ = told
    for kind, steps in {"dpo": 3, "grpo": 3, "tuned": 3, "turns": 2}.items():
        assert ranks[0][kind]["guarded"] == ranks[0][kind]["bare"]
        assert len(ranks[0][kind]["bare"]) == steps


def test_each_rank_has_kept_the_contract(told):
    """Each calls its own reference, or its model through DDP, for each of its own micro-batches."""
    ranks, _, _ = told
    for rank in ranks:
        assert rank["dpo"]["calls"] == {"ref_model": 12}
        assert rank["tuned"]["calls"] == {"model": 6}
        assert rank["grpo"]["calls"] == {"ref_model": 4, "reward_funcs.0": 2}
    assert [rank["turns"]["calls"] for rank in ranks] == [
        {"model": 4},
        {"model": 6},
    ]  # each its own


def test_each_rank_has_a_log_and_one_a_word(told):
    """A file for each, and one verdict on the screen."""
    _, output, printed = told
    for kind in ("dpo", "grpo"):
        names = sorted(path.name for path in (output / kind).iterdir())
        assert names == ["lensnet.rank0.jsonl", "lensnet.rank1.jsonl"]
    assert printed.count("lensnet_guard: ref_model:") == 2
    assert printed.count("lensnet_guard: model:") == 2
