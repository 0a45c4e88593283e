"""Peers: those on this machine, and signs of life through a store."""

import os
import subprocess
import sys

import pytest
import torch.distributed as dist

from lensnet_guard.ranks import peers
from lensnet_guard.ranks.peers import Peers
from lensnet_guard.ranks.processes import Process, this_process


def test_a_lost_process_is_told_once() -> None:
    """Of those that run in the same place; elsewhere the number says nothing."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    here = this_process()
    gone = Process(here.place, child.pid, 1)
    ranks = Peers(0, [here, Process(here.place + 1, child.pid, 1), gone])
    assert ranks.lost() == 2
    assert ranks.lost() is None


def test_nobody_is_asked_where_no_place_is_known() -> None:
    """Where the kernel tells nothing."""
    nowhere = Process(0, os.getpid(), 0)
    assert Peers(0, [nowhere, nowhere._replace(pid=1)]).lost() is None


def test_silence_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the next rank; and that it is over."""
    monkeypatch.setattr(peers, "SILENT_S", 0.0)
    here, store = this_process(), dist.HashStore()
    first, second = (Peers(rank, [here, here]) for rank in range(2))
    assert first.exchange(store) is None
    assert first.exchange(store) == (
        "rank 1 has been silent for 0 s: its process or its machine is stopped, or cut off; "
        "nothing is ended because of that"
    )
    assert first.exchange(store) is None
    second.exchange(store)
    assert first.exchange(store) == "rank 1 is heard again"
