# SPDX-License-Identifier: MIT
"""The precision of float32 products that a user chooses: `torchpar.fp32_products`.

The kernels run on the executor of `nogpu`, whose tensor cores cut operands of TF32 off.
"""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from samples import normal
from torch import Tensor
from torch import distributed as dist
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.func import grad, hessian, jvp, vmap
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import torchpar
from benchmarks.driver import target
from nogpu import Emulator, Launch, emulate
from torchpar.kernels.matmul_t import symmetric_matmul as launch
from torchpar.kernels.rule import Tiles
from torchpar.ops.fp32_matmul import fp32_matmul
from torchpar.parallel.launch.local import Ranks

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

slow = pytest.mark.slow
F32 = torch.float32
# The error of a product of TF32, of operands that are cut off to 11 bits, relative to |a|·|b|.
CUT = 2 * 2**-10
# Rounded to 11 bits, an operand has a rest of at most 2⁻¹¹ of it, of 12 bits, whose last one is cut
# off: 2⁻²³. So the product of two rests, and what is cut off times the other operand, are missing.
LOST = 2**-22 + 2 * 2**-23


@pytest.fixture(autouse=True)
def follows_the_flag() -> Iterator[None]:
    """Each test begins, and should end, without a mode."""
    assert torchpar.fp32_products.get() is None
    yield
    found = torchpar.fp32_products.get()
    torchpar.fp32_products(None)
    assert found is None


@contextmanager
def flag(precision: str) -> Iterator[None]:
    """PyTorch's own flag."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, dtype=F32, seed=seed)


X, WEIGHT, BIAS = numbers(40, 136), numbers(24, 136, seed=1) / 8, numbers(24, seed=2)
C = numbers(40, 40, seed=3)
C = C + C.mT
CALLS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "matmul_t": (torchpar.matmul_t, (X,)),
    "symmetric_matmul": (
        lambda a, c: torchpar.symmetric_matmul(a, a, c, alpha=0.5, beta=-1.5),
        (X, C),
    ),
    "linear_sigmoid": (torchpar.linear_sigmoid, (X, WEIGHT, BIAS)),
}
PLAIN: dict[str, Callable[..., Tensor]] = {
    "matmul_t": lambda x: x @ x.mT,
    "symmetric_matmul": lambda a, c: 0.5 * (a @ a.mT) - 1.5 * c,
    "linear_sigmoid": lambda x, w, b: torch.nn.functional.linear(x, w, b).sigmoid(),
}
# The same calls with fewer columns, for tests of no values.
NARROW = {
    name: (call, tuple(t[:, :33] if t.shape[-1] == 136 else t for t in args))
    for name, (call, args) in CALLS.items()
}
# Quick to compile. The others call kernels alike.
by_name = pytest.mark.parametrize(
    "name", [pytest.param(one, marks=[slow] * (one != "matmul_t")) for one in CALLS]
)


def results(
    call: Callable[..., Tensor], args: tuple[Tensor, ...], mode: Any = None
) -> list[Tensor]:
    """The result of a call in ``mode``, and the gradients of a loss, computed outside of it."""
    leaves = [t.detach().clone().requires_grad_() for t in args]
    with torchpar.fp32_products(mode):
        y = call(*leaves)
    g = normal(*y.shape, seed=5).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, g)]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """The largest error of each tensor, relative to its largest number."""
    return [
        ((a.double() - b).abs().max() / b.abs().max()).item()
        for a, b in zip(found, exact, strict=True)
    ]


def exact_results(name: str) -> list[Tensor]:
    return results(PLAIN[name], tuple(t.double() for t in CALLS[name][1]))


def precision_of(one: Launch) -> str:
    """The precision of the products of a launch."""
    if not one.counters.total.tensor_flops:
        return "ieee"
    return "tf32x3" if "cvt.rna.tf32" in one.ptx else "tf32"


def precisions(gpu: Emulator) -> list[str]:
    """Those of all products that kernels have computed."""
    products = ("symmetric_matmul", "linear_sigmoid", "fp32_matmul")
    launches = [one for one in gpu.launches if one.kernel.startswith(products)]
    return [precision_of(one) for one in launches]


# Values


@by_name
def test_results_and_gradients_have_the_precision_of_the_mode(name: str) -> None:
    call, args = CALLS[name]
    exact = exact_results(name)
    native = errors(results(PLAIN[name], args), exact)
    for mode in ("ieee", "tf32", "tf32x3"):
        with emulate("sm_90"):
            found = errors(results(call, args, mode), exact)
        if mode == "tf32":  # but for gradients of a bias and of C, which are no products
            is_product = [
                t.shape not in (BIAS.shape, C.shape) or not i for i, t in enumerate(exact)
            ]
            assert all(
                e > 20 * n for e, n, yes in zip(found, native, is_product, strict=True) if yes
            )
        else:
            assert all(e <= 2 * n + 2**-24 for e, n in zip(found, native, strict=True)), mode


FEW = [("ieee", "matmul_t")]  # which is compiled in any run


@pytest.mark.parametrize(
    "of_pytorch, name",
    [
        pytest.param(flag, name, marks=[slow] * ((flag, name) not in FEW))
        for flag in ("ieee", "tf32")
        for name in CALLS
    ],
)
def test_the_mode_stands_above_pytorchs_flag(of_pytorch: str, name: str) -> None:
    """Without a mode the flag decides. In a mode that the flag does not name, kernels compute the
    gradients, too, since PyTorch's products have the flag's precision."""
    call, args = CALLS[name]  # whose kernels other tests have compiled
    with flag(of_pytorch):
        for mode in (None, "ieee", "tf32", "tf32x3"):
            with emulate("sm_90") as gpu:
                results(call, args, mode)
            first, *of_gradients = precisions(gpu)
            assert first == (mode or of_pytorch)
            assert set(of_gradients) == (set() if mode in (None, of_pytorch) else {mode})


def test_products_that_are_added_in_place_have_the_precision_of_the_mode() -> None:
    h = C.clone()
    with emulate("sm_90") as gpu, torchpar.fp32_products("tf32x3"):
        torchpar.symmetric_matmul(X, X, h, alpha=0.5, beta=-1.5, out=h)
    assert precisions(gpu) == ["tf32x3"]
    with emulate("sm_90"), torchpar.fp32_products("tf32x3"):
        assert torch.equal(h, torchpar.symmetric_matmul(X, X, C, alpha=0.5, beta=-1.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float64, marks=slow)])
def test_other_dtypes_have_no_mode(dtype: torch.dtype) -> None:
    x = X.to(dtype)
    with emulate("sm_90"):
        expected = results(torchpar.matmul_t, (x,))
        found = results(torchpar.matmul_t, (x,), "tf32")
    assert all(map(torch.equal, found, expected))


def test_autocast_leaves_the_mode_alone() -> None:
    with emulate("sm_90"), torchpar.fp32_products("tf32x3"):
        with torch.autocast("cpu", torch.bfloat16):
            low = torchpar.matmul_t(X)
            assert torchpar.fp32_products.get() == "tf32x3"
        assert torch.equal(low, torchpar.matmul_t(X.bfloat16()))


@by_name
def test_a_cpu_computes_in_float32_in_any_mode(name: str) -> None:
    call, args = CALLS[name]
    expected = results(call, args)
    for mode in ("ieee", "tf32", "tf32x3"):
        assert all(map(torch.equal, results(call, args, mode), expected))


# Infinities, NaN, the largest and the smallest numbers


@triton.jit
def three_products_kernel(x, out, N: tl.constexpr, K: tl.constexpr):
    i, k = tl.arange(0, N)[:, None], tl.arange(0, K)[None, :]
    a = tl.load(x + i * K + k)
    tl.store(out + i * N + k, tl.dot(a, a.T, input_precision="tf32x3"))


def by_three_products_alone(x: Tensor) -> Tensor:
    """X·Xᵀ of a square matrix as Triton computes it."""
    out = torch.empty(len(x), len(x))
    three_products_kernel[(1,)](x, out, *x.shape)
    return out


LARGEST = torch.finfo(F32).max
HARD = [math.inf, -math.inf, math.nan, LARGEST, -LARGEST, 3e38, 2.0**64, 1.8446743e19, 1e-38, 0.0]


def hard_operand() -> Tensor:
    """Rows of ones with one hard number, and rows of zeros with one: numbers whose split, or whose
    product, is not finite, in sums with others and alone."""
    x = torch.zeros(64, 64)
    for i, value in enumerate(HARD):
        x[i] = 1
        x[i, i] = x[32 + i, 5] = value
    x[60, 5], x[61, 5], x[62, 5] = 2.0**100, 2.0**60 * (1 - 2**-13), -0.5
    return x


def assert_special_values(found: Tensor, x: Tensor) -> None:
    """Infinities and NaN are those of float64, and what is finite is as exact as one of TF32."""
    exact = x.double() @ x.double().mT
    expected = exact.float()
    special = ~expected.isfinite()
    assert torch.equal(found[special].nan_to_num(nan=7), expected[special].nan_to_num(nan=7))
    assert found[~special].isfinite().all()
    scale = (x.double().abs() @ x.double().abs().mT)[~special]
    assert ((found[~special] - exact[~special]).abs() <= CUT * scale + 2.0**-149).all()


BY_TMA = Tiles(64, 64, 32, 4, 3, "tma")


@pytest.mark.parametrize(
    "arch, tiles",
    [
        ("sm_90", Tiles(64, 64, 32, 4, 3)),
        ("sm_90", BY_TMA),
        pytest.param("sm_80", Tiles(64, 64, 32, 4, 3), marks=slow),
        pytest.param("sm_100", BY_TMA, marks=slow),
        pytest.param("sm_90", Tiles(128, 128, 32, 8, 3, "tma"), marks=slow),
        pytest.param("sm_90", Tiles(64, 128, 32, 4, 3, "tma"), marks=slow),
    ],
)
def test_infinities_and_nan_are_those_of_float64(arch: str, tiles: Tiles) -> None:
    x = hard_operand()
    with emulate(arch):
        found = launch(x, x, "tf32x3", None, tiles=tiles)
    assert_special_values(found, x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("tiles", [Tiles(64, 64, 32, 4, 3), BY_TMA])
def test_a_gpu_keeps_infinities_and_nan(tiles: Tiles) -> None:
    if tiles.by_tma and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the GPU has no TMA")
    x = hard_operand()
    assert_special_values(launch(x.cuda(), x.cuda(), "tf32x3", None, tiles=tiles).cpu(), x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@by_name
def test_a_gpu_has_the_precision_of_the_mode(name: str) -> None:
    """Also beside a flag under which PyTorch's library would have another one."""
    call, args = CALLS[name]
    exact, native = exact_results(name), errors(results(PLAIN[name], args), exact_results(name))
    for of_pytorch in ("ieee", "tf32"):
        with flag(of_pytorch):
            found = results(call, tuple(t.cuda() for t in args), "tf32x3")
        found_errors = errors([t.cpu() for t in found], exact)
        assert all(e <= 2 * n + LOST for e, n in zip(found_errors, native, strict=True))


def test_three_products_alone_lose_infinities() -> None:
    x = hard_operand()
    with emulate("sm_90"):
        found = by_three_products_alone(x)
        for i in range(len(HARD)):  # of 2⁶⁴ only the products with other hard numbers
            if HARD[i] in (LARGEST, -LARGEST, 3e38):
                row = torch.zeros_like(x)
                row[0], row[1, 0] = x[i], 0.5
                with pytest.raises(AssertionError):
                    assert_special_values(by_three_products_alone(row), row)
    with pytest.raises(AssertionError):
        assert_special_values(found, x)


def test_infinities_and_nan_of_a_linear_layer_and_of_gradients() -> None:
    x = hard_operand()
    with emulate("sm_90"):
        for product in (
            lambda t: fp32_matmul(t, t, "tf32x3"),
            lambda t: fp32_matmul(t[None], t, "tf32x3")[0],
        ):
            assert_special_values(product(x), x)
        with torchpar.fp32_products("tf32x3"):
            y = torchpar.linear_sigmoid(x, x)
    z = (x.double() @ x.double().mT).float()
    assert torch.equal(y.isnan(), z.isnan())
    assert (y[z == math.inf] == 1).all()
    assert (y[z == -math.inf] == 0).all()


def test_only_tiles_that_are_not_finite_are_computed_again() -> None:
    x = numbers(128, 64)
    flops = []
    for value in (1.0, math.inf):
        x[3, 5] = value
        with emulate("sm_90") as gpu:
            launch(x, x, "tf32x3", None, tiles=Tiles(64, 64, 32, 4, 3))
        flops.append(sum(gpu.launches[0].counters.total.tensor_flops.values()))
    of_one = 2 * 64 * 64 * 64
    assert flops == [3 * 3 * of_one, 3 * 3 * of_one + 2 * of_one]  # a column of tiles


def test_what_is_lost_of_small_numbers() -> None:
    """Of an operand at most 2⁻²³ of it are cut off, or 2⁻¹³⁶, TF32's smallest number, if that is
    more."""
    a = numbers(64, 1) * 2.0 ** torch.arange(-149, 43, 3)[:, None]
    big = torch.full((64, 1), 2.0**80)
    with emulate("sm_90"):
        found = fp32_matmul(a, big, "tf32x3").double()
    exact = a.double() @ big.double().mT
    lost = (found - exact).abs()
    allowed = LOST * exact.abs() + 2.0**-136 * 2.0**80
    assert (lost <= allowed).all()
    assert (lost > LOST * exact.abs() + 2.0**-24 * exact.abs()).any(), "nothing is lost"
    assert (found[20:] != 0).all()


def test_tiny_numbers_are_0_beside_an_infinity() -> None:
    """They are 0 for TF32, of which the smallest number is 2⁻¹³⁶."""
    tiny = torch.tensor([[2.0**-136], [2.0**-138], [-(2.0**-149)], [0.0]])
    with emulate("sm_90"):
        found = fp32_matmul(torch.full((64, 1), math.inf), tiny.repeat(16, 1), "tf32x3")
    found = found[:, :4]
    assert found[0, 0] == math.inf
    assert found[0, 1:].isnan().all()


# torch.func, derivatives of any order


def second_derivatives(call: Callable[..., Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(call(x).sin().sum(), x, create_graph=True)
    return torch.autograd.grad(g.cos().sum(), x)[0]


SMALL = numbers(3, 20) / 4
TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], Tensor], Tensor]] = {
    "vmap": lambda call, x: vmap(call)(torch.stack([x, 2 * x])),
    "grad": lambda call, x: grad(lambda t: call(t).sin().sum())(x),
    "jvp": lambda call, x: jvp(call, (x,), (x.cos(),))[1],
    "vmap of grad": lambda call, x: vmap(grad(lambda t: call(t).sin().sum()))(torch.stack([x, -x])),
    "hessian": lambda call, x: hessian(lambda t: call(t).sin().sum())(x),
    "second derivatives": second_derivatives,
}


# With others the same rules call the same kernels.
ALWAYS = [("matmul_t", "vmap"), ("linear_sigmoid", "grad")]


@pytest.mark.parametrize(
    "name, transform",
    [
        pytest.param(name, one, marks=[slow] * ((name, one) not in ALWAYS))
        for name in CALLS
        for one in TRANSFORMS
    ],
)
def test_transforms_have_the_precision_of_the_mode(name: str, transform: str) -> None:
    # Of the size of other tests, whose kernels are compiled, but where numbers are squared.
    operand = SMALL if transform in ("hessian", "vmap of grad") else X / 4
    m, k = operand.shape

    def of_one(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        others = [t[:m, :m] if t is C else t[:, :k] for t in CALLS[name][1][1:2]]
        return lambda x: function(
            x, *(t.to(x.dtype) for t in others), *[None] * (name == "linear_sigmoid")
        )

    plain = of_one(PLAIN[name])
    exact = [TRANSFORMS[transform](plain, operand.double())]
    native = [TRANSFORMS[transform](plain, operand)]
    with flag("tf32"), emulate("sm_90") as gpu, torchpar.fp32_products("tf32x3"):
        found = [TRANSFORMS[transform](of_one(CALLS[name][0]), operand)]
    assert set(precisions(gpu)) == {"tf32x3"}
    assert errors(found, exact)[0] <= 2 * errors(native, exact)[0] + LOST


def test_a_weight_for_each_sample() -> None:
    x, weight = numbers(2, *X.shape), numbers(2, *WEIGHT.shape, seed=1) / 8
    bias = numbers(2, *BIAS.shape, seed=2)
    exact = vmap(PLAIN["linear_sigmoid"])(x.double(), weight.double(), bias.double())
    with emulate("sm_90") as gpu, torchpar.fp32_products("tf32x3"):
        found = vmap(torchpar.linear_sigmoid)(x, weight, bias)
        for dims in ((0, None), (None, 0)):
            args = [t if dim == 0 else t[0] for t, dim in zip((x, weight), dims, strict=True)]
            one = vmap(lambda a, b: fp32_matmul(a, b, "tf32x3"), dims)(*args)
            assert errors([one], [torch.matmul(args[0].double(), args[1].double().mT)])[0] < 2**-21
    assert set(precisions(gpu)) == {"tf32x3"}
    assert errors([found], [exact])[0] < 2**-21


# Modes and threads


def test_a_block_a_setter_and_a_decorator() -> None:
    get, seen = torchpar.fp32_products.get, []
    with torchpar.fp32_products("tf32x3") as nothing:
        assert nothing is None
        with torchpar.fp32_products(None):
            assert get() is None
        assert get() == "tf32x3"
        with pytest.raises(ZeroDivisionError), torchpar.fp32_products("ieee"):
            seen.append(1 // 0)
        assert get() == "tf32x3"
    assert get() is None
    torchpar.fp32_products("tf32")
    assert get() == "tf32"

    @torchpar.fp32_products("tf32x3")
    def decorated(depth: int) -> None:
        """What it does."""
        seen.append(get())
        if depth:
            decorated(depth - 1)

    assert get() == "tf32"
    decorated(2)
    assert (seen, get(), decorated.__doc__) == (["tf32x3"] * 3, "tf32", "What it does.")
    torchpar.fp32_products(None)
    with pytest.raises(ValueError, match=r"mode is 'tf32x2', expected one of .* or None"):
        torchpar.fp32_products("tf32x2")
    assert get() is None


def in_a_thread(function: Callable[[], Any]) -> Any:
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


@by_name
def test_threads_share_the_mode_and_a_backward_has_that_of_its_forward(name: str) -> None:
    assert in_a_thread(torchpar.fp32_products.get) is None
    with torchpar.fp32_products("tf32x3"):
        assert in_a_thread(torchpar.fp32_products.get) == "tf32x3"
    call, args = CALLS[name]
    leaves = [t.detach().requires_grad_() for t in args]
    with emulate("sm_90") as gpu:
        with torchpar.fp32_products("tf32x3"):
            y = call(*leaves)
        with torchpar.fp32_products("tf32"):
            in_a_thread(lambda: torch.autograd.grad(y.sum(), leaves))
    assert len(precisions(gpu)) > 1
    assert set(precisions(gpu)) == {"tf32x3"}


def test_a_checkpoint_computes_again_in_the_mode_of_its_backward() -> None:
    x = X.clone().requires_grad_()
    found = []
    for mode in ("tf32x3", None):
        with emulate("sm_90") as gpu:
            with torchpar.fp32_products("tf32x3"):
                y = checkpoint(torchpar.matmul_t, x, use_reentrant=False)
            with torchpar.fp32_products(mode):
                torch.autograd.grad(y.sum(), x)
            found.append(precisions(gpu)[:2])
    assert found == [["tf32x3", "tf32x3"], ["tf32x3", "ieee"]]


# Compilers


def graphs_of(call: Callable[..., Any], *args: Tensor) -> tuple[list[Any], Callable[..., Any]]:
    """The precisions of the operators in each graph, filled as ``call`` is compiled."""
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Any:
        calls = [n for n in graph.graph.nodes if n.op == "call_function"]
        graphs.append([n.kwargs.get("precision") for n in calls if "torchpar" in str(n.target)])
        return graph.forward

    torch.compiler.reset()
    return graphs, torch.compile(call, backend=backend, fullgraph=True)


def test_another_mode_compiles_again() -> None:
    def compute() -> list[Tensor]:
        return [call(*args) for call, args in NARROW.values()]

    graphs, compiled = graphs_of(compute)
    for mode in (None, "tf32x3", "tf32x3", "tf32", None, "tf32x3"):
        with torchpar.fp32_products(mode):
            compiled()
    assert graphs == [[mode] * 3 for mode in (None, "tf32x3", "tf32")]


def test_a_block_and_a_decorator_within_a_compiled_function() -> None:
    @torchpar.fp32_products("tf32")
    def decorated(x: Tensor) -> Tensor:
        return torchpar.matmul_t(x)

    def compute(x: Tensor) -> list[Tensor]:
        with torchpar.fp32_products("tf32x3"):
            first = torchpar.matmul_t(x)
        return [first, torchpar.matmul_t(x), decorated(x)]

    graphs, compiled = graphs_of(compute)
    for _ in range(2):
        compiled(X)
    assert graphs == [["tf32x3", None, "tf32"]]
    assert torchpar.fp32_products.get() is None


def test_an_exported_program_keeps_its_mode() -> None:
    class Model(torch.nn.Module):
        def forward(self, *args: Tensor) -> list[Tensor]:
            at = iter(args)
            return [call(*(next(at) for _ in own)) for call, own in CALLS.values()]

    args = tuple(t for _, own in CALLS.values() for t in own)
    with torchpar.fp32_products("tf32x3"):
        program = torch.export.export(Model(), args)
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    assert [n.kwargs["precision"] for n in calls] == ["tf32x3"] * 3
    with emulate("sm_90") as gpu:
        program.module()(*args)
    assert precisions(gpu) == ["tf32x3"] * 3


aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.bmm.default, aten.addmm.default)


def of_a_graph(function: Callable[..., Any], *shapes: Any) -> tuple[list[str], int]:
    """The precisions of kernels' products in the graph of a function of tensors on a GPU that is
    not here, and the number of PyTorch's products."""

    def compute(*args: Tensor) -> tuple[Tensor, ...]:
        result = function(*args)
        return result if isinstance(result, tuple) else (result,)

    with target(90), FakeTensorMode():
        args = [torch.empty(shape, device="cuda") for shape in shapes]
        graph = aot_export_joint_simple(compute, args, trace_joint=False)
    nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
    given = [
        {**node.kwargs["kwargs"], **kernel_side_table.get_constant_args(constants)}
        for node in nodes
        if (constants := node.kwargs.get("constant_args_idx")) is not None
    ]
    kernels = [one["PRECISION"] for one in given if "PRECISION" in one]
    return kernels, sum(node.target in PRODUCTS for node in nodes)


@pytest.mark.parametrize("of_pytorch", ["ieee", "tf32"])
def test_graphs_have_kernels_of_the_mode(of_pytorch: str) -> None:
    """Of many rows; of few rows the library computes, if its precision suffices."""
    large, few, layer = [(2048, 256)], [(64, 4096)], [(2048, 1024), (1024, 1024)]
    with flag(of_pytorch):
        assert of_a_graph(torchpar.matmul_t, *large) == ([of_pytorch], 0)
        with torchpar.fp32_products("tf32x3"):
            assert of_a_graph(torchpar.matmul_t, *large) == (["tf32x3"], 0)
            assert of_a_graph(torchpar.linear_sigmoid, *layer) == (["tf32x3"], 0)
            by_library = ([], 1) if of_pytorch == "ieee" else (["tf32x3"], 0)
            assert of_a_graph(torchpar.matmul_t, *few) == by_library


def test_graphs_of_gradients_have_kernels_of_the_mode_of_the_forward() -> None:
    def backward(rule: Callable[..., Any], mode: str | None, *saved: Tensor) -> Any:
        needs = (True,) * (len(saved) - 1)
        ctx = SimpleNamespace(saved_tensors=saved[1:], needs_input_grad=needs, precision=mode)
        return rule(ctx, saved[0])

    of_gram = partial(backward, import_module("torchpar.ops.matmul_t")._backward)
    of_layer = partial(backward, import_module("torchpar.ops.linear_sigmoid")._backward)
    gram, few = [(2048, 2048), (2048, 1024)], [(64, 64), (64, 33)]
    layer = [(2048, 1024), (2048, 1024), (1024, 1024), (2048, 1024)]  # G, X, W and Y
    assert of_a_graph(partial(of_gram, "tf32x3"), *gram) == (["tf32x3"], 0)
    assert of_a_graph(partial(of_gram, "tf32x3"), *few) == ([], 1)
    with flag("tf32"):
        assert of_a_graph(partial(of_gram, "tf32x3"), *few) == (["tf32x3"], 0)
        assert of_a_graph(partial(of_gram, "ieee"), *few) == (["ieee"], 0)
    assert of_a_graph(partial(of_layer, "tf32x3"), *layer) == (["tf32x3"] * 2, 0)
    with torchpar.fp32_products("tf32x3"):
        assert of_a_graph(partial(of_gram, "ieee"), *gram) == ([], 1)
        assert of_a_graph(partial(of_layer, None), *layer) == ([], 2)


# The operators themselves


A, B = X[:5, :7].clone(), WEIGHT[:4, :7].clone()
OPERANDS = {
    "matmul_t.precision": [A],
    "linear_sigmoid.precision": [A, B],
    "symmetric_matmul.precision": [A, A],
    "fp32_matmul.default": [A, B],
}


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=[slow] * (one != "matmul_t.precision")) for one in OPERANDS]
)
def test_the_operators_keep_pytorchs_rules(name: str) -> None:
    op, operands = attrgetter(name)(torch.ops.torchpar), OPERANDS[name]
    for batch in (True, False) if name.startswith("fp32") else (False,):
        leaves = [t[None] if batch and t is A else t for t in operands]
        opcheck(
            op,
            tuple(t.clone().requires_grad_() for t in leaves),
            {"precision": "tf32x3"},
        )


def of_two_ranks() -> list[str]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = []
    for name, (call, args) in CALLS.items():
        exact = exact_results(name)
        # Replicated operands are those of one process.
        places = (Replicate(),) if name == "symmetric_matmul" else (Shard(0), Shard(1))
        for place in places:
            leaves = [
                distribute_tensor(
                    t, mesh, [Replicate() if t.dim() == 1 else place]
                ).requires_grad_()
                for t in args
            ]
            with emulate("sm_90") as gpu:
                with torchpar.fp32_products("tf32x3"):
                    y = call(*leaves)
                g = distribute_tensor(normal(*y.shape, seed=5).float(), mesh, [Replicate()])
                tensors = [y.detach(), *torch.autograd.grad(y, leaves, g)]
                found += precisions(gpu)
            assert max(errors([t.full_tensor() for t in tensors], exact)) < 2**-20, (name, place)
    return sorted(set(found))


@slow
def test_dtensors_have_the_precision_of_the_mode(ranks: Ranks) -> None:
    assert ranks(2, of_two_ranks) == [["tf32x3"]] * 2
