# SPDX-License-Identifier: MIT
"""Plain data between two processes: what is packed is unpacked, and nothing else is."""

import random
from collections import namedtuple
from fractions import Fraction

import numpy as np
import pytest
import torch

from torchpar.baselines.plain_data import Iterated, Listed, Other, Unreadable, pack, unpack

VALUES = (None, True, 7, -1.5, 10**30, "σ", [], (1, [2.0, (None,)]), [[0.0] * 3] * 2)
ARRAYS = (
    *(np.arange(6).reshape(2, 3).astype(kind) for kind in ("f2", ">f4", "i8", "u1", "c16", "?")),
    *(np.zeros((0, 3)), np.float32(2.5), np.array(["a", "bc"]), np.arange(12.0)[::-2]),
    np.arange(12).reshape(3, 4).T,
)


def test_plain_values_and_arrays_come_back():
    assert [unpack(pack(one)) for one in VALUES] == [*VALUES]
    assert np.isnan(unpack(pack(float("nan"))))
    found = unpack(pack(list(ARRAYS)))
    for one, back in zip(ARRAYS, found, strict=True):
        assert (back.dtype, back.shape) == (one.dtype, one.shape)
        assert (back == one).all()


def test_what_numpy_takes_for_an_array_is_one_and_other_objects_leave_their_class():
    pair = namedtuple("Pair", "a b")(1, np.ones(2))
    assert unpack(pack(torch.ones(2, requires_grad=True))).tolist() == [1, 1]
    assert unpack(pack(np.ma.array([1, 2], mask=[0, 1]))).tolist() == [1, 2]
    assert [*map(np.sum, unpack(pack(pair)))] == [1, 2]
    generator = unpack(pack(i for i in range(3)))
    assert ([*generator], type(generator).__name__) == ([0, 1, 2], "generator")
    assert isinstance(generator, Iterated)
    assert not isinstance(generator, Listed)
    assert np.asarray(unpack(pack(range(3)))).tolist() == [0, 1, 2]
    for one in (object(), {"a": 1}, {1}, b"x", Fraction(1, 2), 1 << 2000, np.array([{}])):
        back = unpack(pack(one))
        assert isinstance(back, Other)
        assert type(back).__name__ == type(one).__name__


def test_packed_bytes_that_were_changed_are_unreadable_or_other_data():
    data = pack([np.arange(5.0), ["a", (1, None)], np.ones((2, 2), "f4")])
    rng = random.Random(0)
    refused = 0
    for _ in range(2000):
        changed = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            changed[rng.randrange(len(data) // 2)] = rng.randrange(256)
        try:
            unpack(changed[: rng.choice([len(data), rng.randrange(len(data))])])
        except Unreadable:
            refused += 1
    assert refused > 500
    for header in (
        b'["array","<f8",[3],800]',
        b'["array","|O",[1],8]',
        b'["array","<f8",[-1],8]',
        b'["array","<f8",[1e9],8]',
        b'["array","<f8",[99999999999],799999999992]',
        b'["what"]',
        b'{"a":1}',
        b"[]",
        b"[" * 100_000,
    ):
        with pytest.raises(Unreadable):
            unpack(b"%d " % len(header) + header)
