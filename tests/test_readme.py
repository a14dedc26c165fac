# SPDX-License-Identifier: MIT
"""The README's example runs, and its table of support is true for every operator."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from operators import OPERATORS
from samples import differences, widest, widest_arguments

from torchpar.training.verify import EXPECTED

# gradcheck doubts differences in float32; those of `quarters` are exact.
pytestmark = pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double precision")

README = (Path(__file__).parent.parent / "README.md").read_text()


def table() -> dict[str, dict[str, str]]:
    """The table's cells by row and operator."""
    lines = re.search(r"^\| \| `maximum`.*\n((?:\|.*\n)+)", README, re.MULTILINE).group(0).splitlines()
    header, _, *rows = ([cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


def inputs(name: str, device: str, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """Of the widest dtype if none is given."""
    shapes = OPERATORS[name].small[0]
    if dtype is None:
        return [*widest_arguments(name, shapes, device)]
    torch.manual_seed(0)
    return [(3 * torch.randn(shape)).to(device=device, dtype=dtype) for shape in shapes]


def total(name: str) -> Callable[..., torch.Tensor]:
    return lambda *args: OPERATORS[name].op(*args).sin().sum()


def autograd(name: str, device: str) -> None:
    args = [t.requires_grad_() for t in inputs(name, device)]
    op, how = OPERATORS[name].op, differences(name)
    incoming = widest(name, *op(*args).shape, device=device, seed=9).requires_grad_()
    assert torch.autograd.gradcheck(op, args, check_forward_ad=True, **how)
    assert torch.autograd.gradgradcheck(op, args, (incoming,), **how)


def functional(name: str, device: str) -> None:
    args, f = inputs(name, device), total(name)
    leaf = args[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf, *args[1:]), leaf)
    torch.testing.assert_close(torch.func.grad(f)(*args), expected)
    torch.testing.assert_close(torch.func.jacrev(f)(*args), expected)
    tangent = torch.func.jvp(lambda x: f(x, *args[1:]), (args[0],), (args[0],))[1]
    torch.testing.assert_close(tangent, (expected * args[0]).sum())
    hessian = torch.autograd.functional.hessian(lambda x: f(x, *args[1:]), args[0])
    torch.testing.assert_close(torch.func.hessian(f)(*args), hessian)

    operator = OPERATORS[name].op
    stacked = [torch.stack([t, t + 1]) for t in inputs(name, device)]
    expected = torch.stack([operator(*(t[i] for t in stacked)) for i in range(2)])
    torch.testing.assert_close(torch.func.vmap(operator)(*stacked), expected)


def compiled(name: str, device: str) -> None:
    args, f = inputs(name, device), total(name)
    torch.testing.assert_close(torch.compile(f, fullgraph=True, dynamic=True)(*args), f(*args))


def export(name: str, device: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, *args: torch.Tensor) -> torch.Tensor:
            return total(name)(*args)

    args = tuple(inputs(name, device))
    program = torch.export.export(Module(), args)
    assert f"torchpar.{name}.default" in program.graph_module.code
    torch.testing.assert_close(program.module()(*args), total(name)(*args))


def autocast(name: str, device: str) -> None:
    with torch.autocast(device, dtype=torch.bfloat16):
        assert OPERATORS[name].op(*inputs(name, device, torch.float32)).dtype == torch.bfloat16


def cuda_graph(name: str, device: str) -> None:
    args, operator = inputs(name, device), OPERATORS[name].op
    expected = operator(*args)  # compiles the kernel before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = operator(*args)
    graph.replay()
    torch.testing.assert_close(captured, expected)


FEATURES: dict[str, Callable[[str, str], None]] = {
    "autograd, to second order, and forward mode": autograd,
    "torch.func: grad, jacrev, hessian, jvp, vmap": functional,
    "torch.compile, fullgraph and dynamic": compiled,
    "torch.export": export,
    "torch.autocast casts to its dtype": autocast,
    "CUDA graphs": cuda_graph,
}
DTYPE_ROWS = {row: re.findall(r"\w+", row) for row in table() if re.search(r"float\d|int\d", row)}


def test_every_row_is_tested():
    assert set(table()) == {*DTYPE_ROWS, *FEATURES, "cpu", "cuda"}


def test_every_operator_is_in_the_readme():
    columns = {name for cells in table().values() for name in cells}
    assert columns == set(OPERATORS)
    assert set(re.findall(r"`torch\.ops\.torchpar\.(\w+)\(", README)) == set(OPERATORS)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [dtype for row in DTYPE_ROWS.values() for dtype in row])
def test_dtypes(name, dtype, device):
    (cell,) = [cells[name] for row, cells in table().items() if dtype in DTYPE_ROWS.get(row, ())]
    args = inputs(name, device, getattr(torch, dtype))
    assert cell == ("yes" if getattr(torch, dtype) in OPERATORS[name].dtypes else "no")
    if cell == "yes":
        assert OPERATORS[name].op(*args).dtype == getattr(torch, dtype)
    else:
        with pytest.raises(RuntimeError, match=f"torchpar::{name}: .* has dtype torch.{dtype}, expected"):
            OPERATORS[name].function(*args)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("feature", FEATURES)
def test_features(name, feature, device):
    if feature == "CUDA graphs" and device == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    cell = table()[feature][name]
    if cell == "yes":
        FEATURES[feature](name, device)
    else:
        assert cell == "no"
        with pytest.raises(AssertionError):
            FEATURES[feature](name, device)


@pytest.mark.parametrize("name", OPERATORS)
def test_devices(name, device):
    """The row says what runs there."""
    with torch.profiler.profile(acc_events=True) as profile:
        OPERATORS[name].op(*inputs(name, device))
    events = {event.key for event in profile.key_averages()}
    runs = "ATen" if OPERATORS[name].aten in events else "Triton"
    assert table()[device][name] == runs


def test_the_published_hash_is_the_one_that_is_checked():
    assert re.findall(r"prints `([0-9a-f]{64})`", README) == [EXPECTED]


def test_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})  # torch.compile reads no source of it
