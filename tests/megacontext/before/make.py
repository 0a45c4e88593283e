"""Made the files beside it, once, by commit b8ffdb3: `test_before` says what is read from them.

Example: python make.py FOLDER
"""

import json
import shutil
import socket
import sys
from pathlib import Path

import torch
from megacontext.pretrained import load_model
from megacontext.train_config import TrainConfig
from megacontext.train_result import TrainingStopped
from megacontext.trainer import train

from megacontext import MCConfig, MCController, SessionConfig

folder = Path(sys.argv[1])
socket.gethostname = lambda: "host"
torch.set_num_threads(1)

# A run on facts far back, whose vocabulary has room for bytes: `generate` reads it too.
MODEL = MCConfig(
    d_model=16,
    num_heads=2,
    lm_layers=1,
    lens_layers=1,
    sequence_tokens=144,
    train_wc_length=67,
    recent_tokens=24,
    horizon_tokens=6,
    num_variants=2,
)
SETTINGS = TrainConfig(
    data="recall",
    lm_steps=2,
    lm_batch_size=2,
    steps=4,
    batch_size=2,
    log_interval=1,
    checkpoint_interval=2,
    warmup_steps=2,
)

train(folder / "whole", MODEL, SETTINGS)
(folder / "whole" / "metrics.jsonl").rename(folder / "metrics_of_the_whole.jsonl")
shutil.rmtree(folder / "whole")
asked = iter(range(100))
try:  # it is asked before the first step, after two of the language model alone, after two more
    train(folder / "run", MODEL, SETTINGS, stop=lambda: next(asked) == 4)
except TrainingStopped as stopped:
    print(stopped)

# A session on disk of that run's model, and what it says next.
mc = load_model(folder / "run")
history = torch.randint(0, 256, (130,), generator=torch.Generator().manual_seed(5))
of = SessionConfig(refocus_interval=8, cooldown=3, margin=0.0)
mc.begin_inference_session(history[:120], tree_store="disk", path=folder / "session", settings=of)
mc.inference_step(history[120:])
mc.end_inference_session()
logits = mc.resume_inference_session(folder / "session")
said = {"tokens": mc.inference_report().tokens, "logits": logits[0, 0, :8].tolist()}
(folder / "session_says.json").write_text(json.dumps(said) + "\n")
mc.end_inference_session()

keys = {name: list(weight.shape) for name, weight in MCController(MODEL).state_dict().items()}
(folder / "state_dict_keys.json").write_text(json.dumps(keys, indent=1) + "\n")
