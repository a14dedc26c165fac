# SPDX-License-Identifier: MIT
"""PyTorch's operators on bfloat16 and float16 in float32: each result is rounded once."""

import pytest
import torch
import triton
import triton.language as tl
from torch import nn
from torch.nn import functional as F

from nogpu import command, emulate
from nogpu.cuda.stand_in import cuda_is_cpu

pytest_plugins = ["pytester"]
TYPES = (torch.bfloat16, torch.float16)


def added_in_place(x, y):
    x = x.clone()
    x.mul_(0.3).add_(y, alpha=0.7)
    return x


def written_to_out(x, y):
    out = torch.empty(0, dtype=x.dtype)
    torch.add(x, y, alpha=0.3, out=out)
    return out


def written_to_a_part(x, y):
    whole = torch.zeros(9, 40, dtype=x.dtype)
    whole[1:9, ::2].copy_(x)
    whole[1:9, ::2].pow_(3)
    return whole


def several(x, y):
    return F.layer_norm(x, (20,), y[0], y[1]), *x.aminmax(dim=1), x.argmax(1), x > y


def a_list(x, y):
    made = [x.clone(), y.clone()]
    torch._foreach_mul_(made, 0.3)
    torch._foreach_addcdiv_(made, [y, x], [x.abs() + 1, y.abs() + 1], 0.7)
    return made


# Each with one rounding of each result.
ONCE = {
    "a power": lambda x, y: x.abs() ** 1.7,
    "a product of all": lambda x, y: x.prod(1),
    "a sum": lambda x, y: x.logsumexp(1),
    "another type": lambda x, y: x.sum(1, dtype=torch.float32),
    "both types": lambda x, y: x * y.float(),
    "a matrix product": lambda x, y: torch.addmm(y[0, :8], x, y.T, beta=0.5, alpha=0.3),
    "a view": lambda x, y: x.view(4, -1).T,
    "a factory": lambda x, y: torch.full_like(x, 0.3),
    "out": written_to_out,
    "several results": several,
}


def in_two_steps(x, y):
    """The values of `added_in_place`, computed in float32."""
    return ((0.3 * x.float()).to(x.dtype).float() + 0.7 * y.float()).to(x.dtype)


def divided_in_two_steps(x, y):
    for a, b in ((x, y), (y, x)):
        quotient = b.float() / (a.abs() + 1).float()
        yield ((0.3 * a.float()).to(a.dtype).float() + 0.7 * quotient).to(a.dtype)


def powers_in_a_part(x, y):
    whole = torch.zeros(9, 40, dtype=x.dtype)
    whole[1:9, ::2] = (x.float() ** 3).to(x.dtype)
    return whole


# The steps are operators, and each one rounds.
STEPS = {
    "in place": (added_in_place, in_two_steps),
    "a part": (written_to_a_part, powers_in_a_part),
    "a list": (a_list, lambda x, y: tuple(divided_in_two_steps(x, y))),
}


def operands(dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 20, generator=generator).to(dtype) for _ in range(2)]


def listed(result):
    return list(result) if isinstance(result, (tuple, list)) else [result]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ONCE)
def test_a_result_is_that_of_float32_rounded_once(name, dtype):
    x, y = operands(dtype)
    with emulate(operators="float32"):
        found = listed(ONCE[name](x, y))
    for one, wide, plain in zip(
        found, listed(ONCE[name](x.float(), y.float())), listed(ONCE[name](x, y)), strict=True
    ):
        assert one.dtype == plain.dtype
        assert torch.equal(one, wide.to(one.dtype))


def test_a_cpu_rounds_some_results_several_times():
    """Without the option there is something to mend."""
    x, y = operands(torch.bfloat16)
    with emulate():
        found = [torch.equal(f(x, y), f(x.float(), y.float()).bfloat16()) for f in SINGLE]
    assert not all(found)


SINGLE = [ONCE[name] for name in ("a power", "a product of all", "a sum")]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", STEPS)
def test_what_is_written_is_rounded_in_each_step(name, dtype):
    x, y = operands(dtype)
    before = x.clone(), y.clone()
    with emulate(operators="float32"):
        found = listed(STEPS[name][0](x, y))
    for one, expected in zip(found, listed(STEPS[name][1](x, y)), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, expected, rtol=torch.finfo(dtype).eps, atol=0)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


@pytest.mark.parametrize("operators", ["cpu", "float32"])
def test_sums_of_many_gradients_are_rounded_once(operators):
    """Of 3000 words, 4 of which differ, a CPU adds up each gradient in bfloat16."""
    table = torch.randn(4, 16).bfloat16().requires_grad_()
    words, by_word = torch.arange(3000) % 4, torch.linspace(0.5, 1.5, 3000)[:, None].bfloat16()
    with emulate(operators=operators):
        (F.embedding(words, table) * by_word).sum().backward()
    exact = torch.zeros(4).double().index_add(0, words, by_word[:, 0].double())
    error = (table.grad.double() - exact[:, None]).abs().max() / exact.max()
    assert bool(error <= 2**-8) is (operators == "float32")
    assert table.grad.dtype == torch.bfloat16


def test_a_model_trains_with_its_optimizer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 1))
    x, y = torch.randn(64, 8).bfloat16(), torch.randn(64, 1).bfloat16()
    for options in ({"foreach": True}, {"fused": True}, {"foreach": False}):
        model.bfloat16()
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2, **options), []
        with emulate(operators="float32"):
            for _ in range(5):
                optimizer.zero_grad()
                loss = F.mse_loss(model(x), y)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_only_tensors_of_the_device_are_computed_so():
    x, _ = operands(torch.bfloat16)
    plain, once = x.prod(1), x.float().prod(1).bfloat16()
    with emulate(operators="float32") as gpu, cuda_is_cpu(gpu):
        assert torch.equal(x.prod(1), plain)
        device = x.cuda()
        assert torch.equal(device.cpu().prod(1), plain)
        found = device.prod(1)
        assert found.is_cuda
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = device.prod(1)
        graph.replay()
        assert torch.equal(found.cpu(), once)
        assert torch.equal(captured.cpu(), once)


@triton.jit
def copy(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i))


def test_what_nobody_has_written_is_still_named():
    with emulate(operators="float32") as gpu:
        x, out = torch.empty(16).bfloat16(), torch.empty(16, dtype=torch.bfloat16)
        copy[(1,)](torch.empty_like(out), out, 16)
        x.add_(1)
        copy[(1,)](x, out, 16)
    assert [fault.name for fault in gpu.faults] == ["uninitialised memory"]


TEST = """
import torch
def test_it():
    x = torch.full((20,), 1.0078125, dtype=torch.bfloat16)
    assert torch.equal(x.prod(), x.float().prod().bfloat16())
"""


def test_the_plugin_and_the_command_take_the_option(pytester, tmp_path):
    pytester.makepyfile(TEST)
    assert pytester.runpytest_inprocess("--nogpu", "--nogpu-operators=float32").ret == 0
    script = tmp_path / "script.py"
    script.write_text(TEST + "test_it()\n", "utf-8")
    assert command.main(["--operators", "float32", str(script)]) == 0
    with pytest.raises(AssertionError):
        command.main([str(script)])


def test_another_way_is_refused():
    with (
        pytest.raises(ValueError, match="operators is 'float64', expected 'cpu' or 'float32'"),
        emulate(operators="float64"),
    ):
        pass
