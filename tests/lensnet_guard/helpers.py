"""What many tests of the guard need: a scope, an input, and the lines of a log."""

import json

import torch

SCOPE = "preference_scorer"  # of the default policy
X = torch.ones(2, 3)
FILE = "lensnet.rank0.jsonl"  # of a process without a rank


def read(path):
    """The lines of a log file, each of which must be one JSON object."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def events(lines):
    """What each of them tells of."""
    return [line["event"] for line in lines]
