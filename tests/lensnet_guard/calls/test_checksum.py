"""Checksums of tensors' bits. Which kinds of tensor they tell a bit of is in test_frozen.py."""

import subprocess
import sys

import pytest
import torch

from lensnet_guard.calls.checksum import checksums

LONG = 2**20 + 7  # of more than one stretch


def one(tensor):
    return checksums([tensor])[0]


class TestChecksums:
    def test_same_bits_same_sum(self):
        """Wherever they lie, and however they are laid out."""
        rows = torch.randn(8, 6)
        for same in (rows.clone(), rows.T.contiguous().T, torch.cat([rows, rows])[8:]):
            assert one(same) == one(rows)

    def test_one_of_many(self):
        """Each tensor has its own, in order; empty ones have none."""
        tensors = [torch.randn(3), torch.empty(0), torch.arange(LONG), torch.tensor(True)]
        assert checksums(tensors) == list(map(one, tensors))
        assert [len(own) for own in checksums(tensors)] == [1, 0, 3, 1]

    @pytest.mark.parametrize("place", [0, 2**20 - 1, 2**20, LONG - 1])
    def test_each_place_counts(self, place):
        """The first and last of each stretch."""
        long = torch.zeros(LONG, dtype=torch.int8)
        before = one(long)
        long[place] = 1
        assert one(long) != before

    def test_order_counts(self):
        """Within a stretch, and between them."""
        short, long = torch.arange(9), torch.arange(LONG) // 2**20
        assert one(short.flip(0)) != one(short) != one(short.roll(1))
        assert one(long.flip(0)) != one(long)

    @pytest.mark.parametrize("bit", [0, 31, 32, 63])
    def test_two_bits_of_one_weight(self, bit):
        """Flips do not cancel out, of the sign neither, where a product overflows."""
        words = torch.zeros(64, dtype=torch.int64)
        flipped = torch.full((64,), 1 << bit if bit < 63 else -(1 << 63), dtype=torch.int64)
        sums = {one(words), one(flipped)}
        for number in range(64):
            few = words.clone()
            few[: number + 1] = flipped[: number + 1]
            sums.add(one(few))
        assert len(sums) == 65

    def test_signs_of_nan_and_zero(self):
        """Bits are compared, not values."""
        nan, zero = torch.tensor([float("nan")]), torch.zeros(1)
        assert one(nan) == one(nan.clone())
        assert one(zero) != one(-zero)

    def test_same_in_every_process(self):
        """So that ranks could compare theirs."""
        code = (
            "import torch; from lensnet_guard.calls.checksum import checksums; "
            "torch.manual_seed(7); print(checksums([torch.arange(9)]))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout == f"{checksums([torch.arange(9)])}\n"

    def test_reads_once(self, monkeypatch):
        """One wait for all tensors of a device."""
        reads, tolist = [], torch.Tensor.tolist
        monkeypatch.setattr(torch.Tensor, "tolist", lambda t: reads.append(1) or tolist(t))
        checksums([torch.randn(3), torch.randn(5).bfloat16(), torch.arange(3)])
        assert reads == [1]
        assert checksums([]) == []

    @pytest.mark.gpu
    def test_on_a_gpu(self):
        """The same as on the CPU, whichever adds up."""
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        for tensor in (torch.randn(3, 5), torch.randn(LONG).bfloat16(), torch.arange(9)):
            assert one(tensor.cuda()) == one(tensor)
        mixed = [torch.ones(3), torch.ones(3).cuda(), torch.zeros(3)]
        assert checksums(mixed) == list(map(one, mixed))
