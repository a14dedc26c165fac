# SPDX-License-Identifier: MIT
"""Kernels of CUDA C++: a corpus, right and wrong, and what a launch refuses."""

import numpy as np
import pytest
from cuda_programs import PROGRAMS, launched, said_of

pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is not installed")


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_of_the_corpus(name):
    kind, fault, lines = said_of(name)
    gpu, pairs = launched(name)
    report = str(gpu.report())
    if kind == "right":
        assert gpu.faults == [], report
        for got, want in pairs:
            np.testing.assert_array_equal(np.asarray(got), np.asarray(want), report)
        return
    assert gpu.faults, f"{name} has no fault"
    first = gpu.faults[0]
    assert first.name == fault, report
    assert first.kind == ("warning" if kind == "warning" else "error"), report
    assert first.source is not None, report
    assert first.source[1] in lines, report
