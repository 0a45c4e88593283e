"""Tensors in what calls take and return. What places look like is in test_conditions.py."""

import pytest
import torch

from lensnet_guard.calls.tensors import describe, plain, read, tensors_in

ONE, TWO = torch.ones(1), torch.ones(2)


class TestTensorsIn:
    def test_in_order(self):
        """Depth first, as written; what is no tensor is passed over."""
        value = [ONE, {"a": (TWO, None), "b": "text"}, 3, [[ONE]]]
        assert [place for place, _ in tensors_in(value)] == ["[0]", "[1].a[0]", "[3][0][0]"]
        assert [tensor for _, tensor in tensors_in(value)] == [ONE, TWO, ONE]

    def test_keys_that_are_tensors(self):
        """Are not shown: that would show their values."""
        assert [place for place, _ in tensors_in({ONE: TWO})] == ["<Tensor>"]

    def test_a_class_is_no_value(self):
        """Though it has fields."""

        class Pair(tuple):
            _fields = ("left",)

        assert list(tensors_in(Pair)) == []


class TestPlain:
    def test_a_wrapper(self):
        """What it wraps; anything else is itself."""
        nested = torch.nested.nested_tensor([ONE, TWO], layout=torch.jagged)
        parts = list(plain(nested))
        assert torch.equal(parts[0], torch.ones(3))
        assert [*plain(ONE)] == [ONE]


class TestRead:
    def test_in_order(self):
        """As they were given."""
        assert read([torch.tensor(n) for n in (3, 1, 2)]) == [3, 1, 2]
        assert read([]) == []

    @pytest.mark.gpu
    def test_of_several_devices(self):
        """As they were given, whichever is read first."""
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        scalars = [torch.tensor(n, device=d) for n, d in ((3, "cpu"), (1, "cuda"), (2, "cpu"))]
        assert read(scalars) == [3, 1, 2]


class TestDescribe:
    def test_a_tensor(self):
        """Dtype, shape, device."""
        assert describe(torch.ones(2, 31, dtype=torch.int64)) == "int64[2, 31] cpu"
