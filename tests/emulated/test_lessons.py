# SPDX-License-Identifier: MIT
"""Lessons on the emulated GPU: they compute what they compute on a CPU, and launch our kernels.

Each lesson makes one step. The training loss before it and the test loss after it are compared with
those of the same flags without the emulator.
"""

import re

import pytest
from commands import ROOT, forked, rows_of
from fake_data import fashion_mnist

pytest.importorskip("tyro", reason="tyro reads the flags")

# The float32 sums of 784 products may be off by half of this, and two orders of one sum differ by
# twice that (Higham, Accuracy and Stability of Numerical Algorithms, 3.1).
ROUNDING = 784 * 2**-23
# Muon's iterations are in bfloat16 on a GPU, and its step has this relative error.
BFLOAT16 = 2**-8
SMALL = "--epochs 1 --hidden 16"
LESSONS = {
    "train_ddp": (SMALL, {"linear_sigmoid_kernel", "symmetric_matmul_kernel"}),
    "train_by_hand": (
        f"{SMALL} --activation sigmoid --fused",
        {"linear_sigmoid_kernel", "maximum_flat_kernel"},
    ),
    "train_tensor_parallel": (SMALL, {"linear_sigmoid_kernel", "sigmoid_backward_kernel"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_runs_on_the_emulated_gpu(fork_server, tmp_path, name):
    words, kernels = LESSONS[name]
    data = fashion_mnist(tmp_path / "data", train=32, test=16)
    losses = []
    for command, device in (((), "cpu"), (("-m", "nogpu", "--cuda-is-cpu"), "cuda")):
        metrics = tmp_path / f"{device}.jsonl"
        flags = f"{words} --dataset fashion-mnist --data {data} --device {device}".split()
        script = str(ROOT / "examples" / f"{name}.py")
        code, out, err = forked(*command, script, *flags, "--metrics", str(metrics))
        assert code == 0, out + err
        *_, last = rows_of(metrics)
        losses.append((last["train_loss"], last["test_loss"]))
    (train, test), (emulated_train, emulated_test) = losses
    assert emulated_train == pytest.approx(train, rel=ROUNDING)
    error = BFLOAT16 if "symmetric_matmul_kernel" in kernels else ROUNDING
    assert emulated_test == pytest.approx(test, rel=error)
    assert kernels <= set(re.findall(r"\w+_kernel", out))
    assert out.splitlines()[-1].endswith("; 0 errors, 0 warnings, 0 notes")
