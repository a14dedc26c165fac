# SPDX-License-Identifier: MIT
"""Every rule of the exact mode: rows alone and in a batch, default dtypes, overloads, PyTorch's
checks."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import torchpar
from torchpar import exact
from torchpar.errors import ConfigError
from torchpar.exact.functions import in_pieces, sqrt64
from torchpar.exact.registry import EXACT_RULES, PRIVATE
from torchpar.ops.symmetric_matmul import symmetric_matmul

aten, ops = torch.ops.aten, torch.ops.torchpar
ROWS, COLUMNS = 4, 6
INDEX = torch.tensor([2, 0, 0, 2, 1, 2])  # of the elements of a row
WEIGHT = torch.linspace(-1, 1, COLUMNS * COLUMNS).view(COLUMNS, COLUMNS)
KERNEL = torch.linspace(-1, 1, 6).view(2, 1, 3)
SEQUENCE = [1], [1], [1], False, [0], 1  # stride, padding, dilation, …, groups of a convolution


def to_places(x: Tensor) -> Tensor:
    """Terms (rows, columns) for an indexed sum: each row of x has three targets of its own."""
    return (INDEX + 3 * torch.arange(len(x))[:, None]).flatten()


def by_embedding(x: Tensor) -> Tensor:
    """Each row of x is the gradient of two places of a text, of one token."""
    tokens = torch.arange(len(x)).repeat(2)
    return aten.embedding_dense_backward(torch.cat([x, x.flip(1)]), tokens, len(x), -1, False)


def of_convolution(x: Tensor) -> Tensor:
    g = torch.stack([x, x.flip(1)], 1)
    mask = [True, False, False]
    return aten.convolution_backward(g, x[:, None], KERNEL, [2], *SEQUENCE, mask)[0]


def of_pool(x: Tensor) -> Tensor:
    image = x.view(-1, 1, 2, 3)
    shape = [2, 2], [1, 1], [0, 0], [1, 1], False
    _, places = aten.max_pool2d_with_indices(torch.ones_like(image), *shape)
    return aten.max_pool2d_with_indices_backward(image[..., :1, :2], image, *shape, places)


def attention(x: Tensor) -> Tensor:
    q = x.view(-1, 1, 2, 3)
    return F.scaled_dot_product_attention(q, q.flip(-2), q.flip(-1))


def of_attention(x: Tensor) -> Tensor:
    q = x.view(-1, 1, 2, 3)
    return torch.func.vjp(lambda q: F.scaled_dot_product_attention(q, q, q), q)[1](q.flip(-1))[0]


def of_layer_norm(x: Tensor) -> Tensor:
    _, mean, rstd = aten.native_layer_norm(x, [COLUMNS], WEIGHT[0], None, 1e-5)
    return aten.native_layer_norm_backward(
        x, x, [COLUMNS], mean, rstd, WEIGHT[0], None, [True, True, False]
    )[0]


def group_norm(x: Tensor) -> tuple[Tensor, ...]:
    """One group of two channels of three pixels."""
    return aten.native_group_norm(x.view(-1, 2, 3), WEIGHT[0, :2], None, len(x), 2, 3, 1, 1e-5)


def of_group_norm(x: Tensor) -> Tensor:
    image, (_, mean, rstd) = x.view(-1, 2, 3), group_norm(x)
    shape = len(x), 2, 3, 1, [True, True, False]
    return aten.native_group_norm_backward(image, image, mean, rstd, WEIGHT[0, :2], *shape)[0]


def symmetric(x: Tensor) -> Tensor:
    a = x.view(-1, 2, 3)
    return symmetric_matmul(a, a, WEIGHT[:2, :2].expand(len(x), 2, 2), alpha=0.3, beta=0.7)


def added_in_place(x: Tensor) -> Tensor:
    a, h = x.view(-1, 2, 3), WEIGHT[:2, :2].repeat(len(x), 1, 1)
    ops.symmetric_addmm_(h, a, a.clone(), alpha=0.3, beta=0.7)
    return h


def each(names: str, call: Callable[[Any, Tensor], Any]) -> dict[str, Callable[[Tensor], Any]]:
    """For each operator of these names a function of rows, by ``call(operator, rows)``."""
    return {name: partial(call, getattr(aten, name)) for name in names.split()}


# Functions of rows (n, columns) to n rows, by the rule that they take.
ROW_CASES: dict[str, Callable[[Tensor], Any]] = {
    **each("exp exp2 expm1 sigmoid tanh erf silu gelu", lambda f, x: f(x)),
    **each("log log2 log1p rsqrt sqrt", lambda f, x: f(x.abs())),
    **each("sin cos erfinv", lambda f, x: f(x.tanh())),
    **each(
        "sigmoid_backward tanh_backward silu_backward gelu_backward", lambda f, x: f(x, x.flip(1))
    ),
    "softplus": lambda x: aten.softplus(x, 2.0, 3.0),
    "softplus_backward": lambda x: aten.softplus_backward(x, x.flip(1), 2.0, 3.0),
    "add": lambda x: aten.add(x, x.flip(1), alpha=0.3),
    "sub": lambda x: aten.sub(x, x.flip(1), alpha=0.3),
    "rsub": lambda x: aten.rsub(x, x.flip(1), alpha=0.3),
    "addcmul": lambda x: aten.addcmul(x, x.flip(1), WEIGHT[0], value=0.3),
    "addcdiv": lambda x: aten.addcdiv(x, x.flip(1), WEIGHT[0], value=0.3),
    "lerp": lambda x: aten.lerp(x, x.flip(1), 0.7),
    "pow": lambda x: (x**3, x.abs() ** 1.7, x.abs() ** WEIGHT[0], 2**x),
    "_softmax": lambda x: aten._softmax(x, 1, False),
    "_log_softmax": lambda x: aten._log_softmax(x, 1, False),
    "_softmax_backward_data": lambda x: aten._softmax_backward_data(x, x.tanh(), 1, x.dtype),
    "_log_softmax_backward_data": lambda x: aten._log_softmax_backward_data(
        x, x.tanh(), 1, x.dtype
    ),
    "logsumexp": lambda x: x.logsumexp(1),
    "sum": lambda x: x.sum(1),
    "mean": lambda x: x.mean(1),
    "var": lambda x: x.var(1),
    "std": lambda x: x.std(1),
    "norm": lambda x: aten.norm(x, 2, [1]),
    "linalg_vector_norm": lambda x: torch.linalg.vector_norm(x, 1, 1),
    "cumsum": lambda x: x.clamp(-9, 9).nan_to_num(0).round().cumsum(1),
    "native_layer_norm": lambda x: F.layer_norm(x, [COLUMNS], WEIGHT[0], WEIGHT[1]),
    "native_layer_norm_backward": of_layer_norm,
    "native_group_norm": group_norm,
    "native_group_norm_backward": of_group_norm,
    "mm": lambda x: x @ WEIGHT,
    "bmm": lambda x: x.view(-1, 2, 3) @ x.view(-1, 3, 2),
    "addmm": lambda x: torch.addmm(WEIGHT[0], x, WEIGHT, beta=0.5),
    "baddbmm": lambda x: torch.baddbmm(
        x.view(-1, 2, 3), x.view(-1, 2, 3), WEIGHT[:3, :3].repeat(len(x), 1, 1)
    ),
    "matmul_t": lambda x: torchpar.matmul_t(x.view(-1, 2, 3)),
    "matmul_t_backward": lambda x: ops.matmul_t_backward(
        x.unflatten(1, (2, 3))[..., :2], x.view(-1, 2, 3)
    ),
    "symmetric_matmul": symmetric,
    "symmetric_addmm": added_in_place,
    "fp32_matmul": lambda x: ops.fp32_matmul(x.view(-1, 2, 3), WEIGHT[:4, :3], precision="ieee"),
    "mv": lambda x: x.mv(WEIGHT[0]),
    "dot": lambda x: torch.stack([row.dot(WEIGHT[0]) for row in x]),
    "convolution": lambda x: aten.convolution(x[:, None], KERNEL, WEIGHT[0, :2], *SEQUENCE),
    "convolution_backward": of_convolution,
    "embedding_dense_backward": by_embedding,
    "scatter_add": lambda x: x.new_ones(len(x), 3).scatter_add(1, INDEX.expand(len(x), -1), x),
    "_index_put_impl": lambda x: aten.index_put(
        x.new_ones(3 * len(x)), [to_places(x)], x.flatten(), True
    ).view(len(x), 3),
    "index_add": lambda x: x.new_ones(len(x), 3).index_add(1, INDEX, x),
    "mse_loss_backward": lambda x: aten.mse_loss_backward(x, x.flip(1), WEIGHT[:1], 0),
    "scatter": lambda x: x.new_ones(len(x), 3).scatter(1, INDEX.expand(len(x), -1), x),
    "max_pool2d_with_indices_backward": of_pool,
    **each("amax amin", lambda f, x: f(x, [1])),
    **each("max min", lambda f, x: f(x, 1)[0]),
    **each("maximum minimum", lambda f, x: f(x, WEIGHT[0])),
    "sort": lambda x: tuple(x.sort(1)),
    "topk": lambda x: tuple(x.topk(3, 1)),
    "clamp": lambda x: x.clamp(-1, 1),
    "clamp_min": lambda x: x.clamp_min(0.5),
    "clamp_max": lambda x: x.clamp_max(0.5),
    "_scaled_dot_product_flash_attention_for_cpu": lambda x: F.scaled_dot_product_attention(
        *3 * [x.view(-1, 2, 3)]
    ),
    "_scaled_dot_product_flash_attention_for_cpu_backward": of_attention,
}
# Draws, which depend on the number of elements, and constants.
WITHOUT_ROWS = {
    "normal_",
    "uniform_",
    "bernoulli_",
    "native_dropout",
    "arange",
    "linspace",
    "logspace",
}
HOSTILE = [1e13, 1e-13, 3e38, 1e-42, math.nan, math.inf, -math.inf, 0.0]


def test_every_rule_has_a_case():
    assert set(ROW_CASES) | WITHOUT_ROWS == set(EXACT_RULES)


def bits(results: Any) -> list[Tensor]:
    results = results if isinstance(results, tuple) else (results,)
    return [t.contiguous().view(len(t), -1).view(torch.int32) for t in results]


@pytest.mark.parametrize("name", ROW_CASES)
def test_a_row_does_not_depend_on_the_others(name):
    x = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    with exact.mode():
        alone = [bits(ROW_CASES[name](x[i : i + 1].clone())) for i in range(ROWS)]
        wide = [[x, x[:1] * scale, x.new_full((1, COLUMNS), scale)] for scale in HOSTILE]
        batches = [bits(ROW_CASES[name](torch.cat(rows))) for rows in wide]
    for of_batch in batches:
        for i, of_row in enumerate(alone):
            assert all(torch.equal(a[0], b[i]) for a, b in zip(of_row, of_batch, strict=True))


def test_indexed_sums_have_a_unit_for_each_target():
    """Small terms stay beside large ones, and what is not finite stays in its own place."""
    values = torch.tensor([1e13, 1.0, math.inf, 3.0, -math.inf, math.nan, 2.0])
    places = torch.tensor([0, 1, 2, 3, 4, 5, 3])
    expected = torch.tensor([1e13, 1.0, math.inf, 5.0, -math.inf, math.nan])
    table = torch.ones(6, 1, requires_grad=True)
    with exact.mode():
        sums = [
            torch.zeros(6).index_add(0, places, values),
            torch.zeros(6).scatter_add(0, places, values),
            torch.zeros(6).index_put((places,), values, accumulate=True),
            torch.autograd.grad(F.embedding(places, table), table, values[:, None])[0].flatten(),
            torch.autograd.grad(table[places], table, values[:, None])[0].flatten(),
            torch.autograd.grad(table.gather(0, places[:, None]), table, values[:, None])[
                0
            ].flatten(),
            torch.autograd.grad(table.index_select(0, places), table, values[:, None])[0].flatten(),
        ]
        opposed = torch.zeros(100).index_add(
            0, torch.tensor([99, 99]), torch.tensor([math.inf, -math.inf])
        )
    for found in sums:
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert opposed[99].isnan()
    assert not opposed[:99].any()


@pytest.mark.parametrize("name", ROW_CASES)
def test_a_rule_ignores_the_default_dtype(name):
    x = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    with exact.mode():
        expected = bits(ROW_CASES[name](x))
    try:
        for dtype in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(dtype)
            with exact.mode():
                found = ROW_CASES[name](x)
            assert all(map(torch.equal, bits(found), expected))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ROW_CASES)
def test_a_rule_is_the_same_in_inference_mode(name):
    x = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    if name.endswith("_for_cpu_backward"):
        pytest.skip("inference mode has no gradients")
    with exact.mode():
        expected = bits(ROW_CASES[name](x))
    with torch.inference_mode(), exact.mode():
        assert all(map(torch.equal, bits(ROW_CASES[name](x)), expected))


def overloads(name: str) -> list[Any]:
    """The overloads of an operator that have a kernel; a few of TorchScript's have none."""
    found = []
    for packet in (getattr(aten, name, None), getattr(aten, name + "_", None)):
        for overload in packet.overloads() if packet else ():
            func = getattr(packet, overload)
            try:
                torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CPU")
            except RuntimeError:
                continue
            found.append(func)
    return found


X = torch.tensor([1.0, 2.0, 4.0, 9.0])
M = torch.eye(4) * X
# Arguments by the names that schemas have for them; others are those of X.
ARGUMENTS: dict[str, Any] = {
    **dict.fromkeys(("mat1", "mat2", "batch1", "batch2"), M),
    "vec": X,
    "tensor": X,
    "dim": 0,
    "dims": [0],
    "unbiased": False,
    "keepdim": True,
    "correction": 0,
    "ord": 2,
    "p": 2,
    "alpha": 3,
    "beta": 2,
    "value": 2,
    "exponent": 2,
    "weight": 0.75,
    "end": X + 1,
    "half_to_float": False,
    "threshold": 3.0,
    "min": 2.0,
    "max": 4.0,
    "dtype": torch.float32,
    "approximate": "tanh",
    "input_dtype": torch.float32,
}
OVERLOADED = """
    add sub rsub pow sum mean var norm linalg_vector_norm logsumexp lerp amax amin max min clamp
    clamp_min
    clamp_max gelu softplus mm addmm addcmul addcdiv _softmax _log_softmax cumsum exp silu
"""


def call(func: Any) -> Any:
    """The overload's results for X or M; its outputs are new tensors."""
    x = M if "mm" in func._schema.name else X
    args, kwargs = [], {}
    for argument in func._schema.arguments:
        kind = str(argument.type)
        if argument.is_out:
            kwargs[argument.name] = torch.empty(
                0, dtype=torch.int64 if argument.name.endswith("s") else None
            )
            continue
        value = ARGUMENTS.get(argument.name, x)
        if argument.name == "dim":
            value = [0] if "List" in kind else 0
        elif kind == "Tensor" or "Optional[Tensor]" in kind:
            value = value if isinstance(value, Tensor) else torch.full_like(x, float(value))
        elif "number" in kind and isinstance(value, Tensor):
            value = 2
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value.clone() if isinstance(value, Tensor) else value)
    return func(*args, **kwargs)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", OVERLOADED.split())
def test_every_overload_has_pytorchs_values(name, inference):
    tried = 0
    for func in overloads(name):
        if "dtype" in func._overloadname and "mm" in name:  # products into another dtype, of GPUs
            continue
        with torch.inference_mode(inference):
            expected = call(func)
            with exact.mode():
                found = call(func)
        found, expected = (one if isinstance(one, tuple) else (one,) for one in (found, expected))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, msg=lambda text, func=func: f"{func}: {text}")
        tried += 1
    assert tried


def test_variance_in_inference_mode_is_not_divided_by_n_minus_1():
    with torch.inference_mode(), exact.mode():
        assert X.var(unbiased=False) == 9.5
        assert X.var(0, unbiased=False, keepdim=True).tolist() == [9.5]
        assert X.std(0, False) == math.sqrt(9.5)


BYTES = torch.full((64, 64), 127, dtype=torch.int8)
IMAGE = torch.ones(2, 5, 3)
# Calls that PyTorch refuses, and operators that differ between processors.
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a product of bytes": (
        lambda: torch._int_mm(BYTES, BYTES),
        "no exact version of aten._int_mm.default",
    ),
    "integers to which a fraction is added": (
        lambda: torch.tensor([1, 2]).add_(0.5),
        "can't be cast",
    ),
    "groups": (lambda: F.group_norm(IMAGE, 2), "divisible by num_groups"),
    "a weight of one group": (lambda: F.group_norm(IMAGE, 5, torch.ones(1)), "Expected weight"),
    "mm of 3-D": (lambda: torch.ops.aten.mm(IMAGE, IMAGE.mT), "must be a matrix"),
    "dot of 2-D": (lambda: torch.dot(M, M), "1D tensors expected"),
    "a bias of size 1": (
        lambda: F.conv1d(IMAGE, torch.ones(4, 5, 2), torch.ones(1)),
        "with 4 elements",
    ),
    "a layer's bias of size 1": (lambda: F.layer_norm(M, (4,), torch.ones(1)), "Expected weight"),
    "a dimension twice": (lambda: M.sum((0, 0)), "multiple times"),
    "a dimension that is not there": (lambda: M.softmax(2), "out of range"),
    "a range": (lambda: M.clone().uniform_(2, 1), "from=2 > to=1"),
    "a deviation": (lambda: M.clone().normal_(0, -1), "std >= 0"),
    "a probability": (lambda: M.clone().bernoulli_(2.0), "expects p to be in"),
    "probabilities": (lambda: torch.bernoulli(M), "p is .* to .*, expected 0 to 1"),
    "two masks": (
        lambda: F.scaled_dot_product_attention(M, M, M, M, is_causal=True),
        "should not be set",
    ),
    "heads": (
        lambda: F.scaled_dot_product_attention(M, M[:, :2], M),
        "mat1 and mat2|Expected size|inner",
    ),
    "a negative power of integers": (lambda: torch.arange(3) ** -1, "negative integer powers"),
    "a largest element of none": (lambda: torch.ones(0, 3).amax(0), "non-zero size"),
    "a float sum of integers": (
        lambda: BYTES.cumsum(0, dtype=torch.float32),
        "no exact .* aten.cumsum",
    ),
    "interpolated bytes": (
        lambda: F.interpolate(BYTES.to(torch.uint8)[None, None], scale_factor=2, mode="bilinear"),
        "no exact version of aten.*upsample_bilinear2d",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_pytorch_refuses_is_refused(name):
    function, message = REFUSED[name]
    with exact.mode(), pytest.raises((ConfigError, RuntimeError, IndexError), match=message):
        function()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_foreign_operands_are_named():
    quantized = torch.quantize_per_tensor(torch.ones(3, 4), 0.1, 0, torch.quint8)
    sparse, turned = torch.eye(3).to_sparse(), torch.ones(3) + 1j
    with exact.mode():
        for operand, kind in ((quantized, "quantized"), (sparse, "sparse"), (turned, "complex")):
            for function in (torch.clone, lambda t: torch.cat([t, t])):
                with pytest.raises(
                    ConfigError, match=f"no exact version of .* for {kind} operands"
                ):
                    function(operand)


def test_checks_draw_no_random_numbers():
    """The native operator runs once for a new shape, on zeros, and must leave the generator as it
    is."""

    def draw(n: int) -> Tensor:
        torch.manual_seed(0)
        return torch.cat([torch.randn(n), torch.rand(n), torch.empty(n).uniform_()])

    with exact.mode():
        first, second = draw(23), draw(23)
    assert torch.equal(first, second)


def test_equal_elements_keep_their_order():
    """Elsewhere their order depends on the processor: PyTorch sorts in vectors, which is not
    stable."""
    x = torch.arange(4000) % 7
    signs = torch.where(x % 2 == 0, 0.0, -0.0)
    with exact.mode():
        orders = [x.sort()[1], x.argsort(), x.float().sort()[1], x.topk(4000, largest=False)[1]]
        highest = x.topk(5)[1]
        sorted_signs = signs.sort()[0]
    assert all(torch.equal(order, x.argsort(stable=True)) for order in orders)
    assert highest.tolist() == [6, 13, 20, 27, 34]
    assert torch.equal(sorted_signs.signbit(), signs.signbit())


def test_the_default_dtype_is_that_of_integers_and_numbers():
    """What is remembered of the native operator holds for its default dtype alone."""
    found = []
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            torch.set_default_dtype(dtype)
            with exact.mode():
                found.append((torch.arange(3) - 2.5).dtype == dtype)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == [True] * 3


def test_numbers_and_empty_tensors():
    number, empty = torch.tensor(2.0, requires_grad=True), torch.ones(0, 3)
    with exact.mode():
        assert number.softmax(0) == 1
        assert number.log_softmax(-1) == 0
        assert number.logsumexp(0) == 2
        assert number.logsumexp(0, keepdim=True).shape == ()
        assert number.detach().scatter_add(0, torch.tensor(0), torch.tensor(3.0)) == 5
        for function in (
            lambda x: x.gather(0, torch.tensor([0])),
            lambda x: x.topk(1, 0)[0],
            lambda x: x.max(0)[0],
        ):
            assert torch.autograd.grad(function(number).sum(), number)[0] == 1
        nothing = torch.autograd.grad(
            number.gather(0, torch.zeros(0, dtype=torch.uint8)).sum(), number
        )
        assert nothing[0] == 0
        assert empty.softmax(0).shape == (0, 3)
        assert empty.logsumexp(0).tolist() == [-math.inf] * 3
        assert empty.logsumexp(1).shape == (0,)
        assert empty.sum(0).tolist() == [0.0] * 3
        assert (
            torch.zeros(3).index_add(0, torch.tensor([], dtype=torch.int64), torch.ones(0)).tolist()
            == [0.0] * 3
        )
        with pytest.warns(UserWarning, match="degrees of freedom"):  # PyTorch's own
            assert torch.ones(1, 2, 1).var(2).isnan().all()
        assert torch.ops.aten.add.Scalar(X, 2, 3).tolist() == [7.0, 8.0, 10.0, 15.0]
        assert F.dropout(number.detach(), 0.0) == 2


POINTS = torch.tensor(
    [
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.5,
        -0.5,
        2.0,
        -2.0,
        math.inf,
        -math.inf,
        math.nan,
        1e-45,
        -1e-45,
        1e-39,
        3e38,
        -3e38,
        89.0,
        -104.0,
        1 - 2**-24,
        2**-24 - 1,
        5.0,
        3.0,
        -3.0,
        2.0**24,
        1 - 2**24,
    ]
)
WHOLE = (0.0, 1.0, 2.0, 3.0, -1.0, -3.0, math.inf, -math.inf, math.nan, 101.0, -100.0, 1e10)
EXPONENTS = (*WHOLE, 0.5, -0.5, 1.3, -1.3)
SPECIAL: dict[str, Callable[[Tensor], Tensor]] = {
    **{
        name: getattr(torch, name)
        for name in ("exp", "expm1", "log", "log2", "log1p", "sigmoid", "tanh", "erf")
    },
    **{name: getattr(torch, name) for name in ("erfinv", "rsqrt")},
    "silu": F.silu,
    "softplus": lambda x: F.softplus(x, 2.5, 3.0),
    "softplus of negative beta": lambda x: F.softplus(x, -2.5, 3.0),
    "sin": lambda x: torch.where(x.abs() < 2.0**20, x, math.inf).sin(),
    "powers": lambda x: torch.stack([x**e for e in EXPONENTS]),
    "powers of numbers": lambda x: torch.stack([e**x for e in WHOLE]),
    "powers of tensors": lambda x: x ** x[:, None],
    "lerp": lambda x: torch.lerp(x[:, None], torch.tensor([1.0, 2.0], dtype=x.dtype), 1.0),
    "lerp by a tensor": lambda x: torch.lerp(x[2:3], x[2:8], (1 - x[2:8].abs()).abs()),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_special_values_are_pytorchs(name):
    """Infinities, NaN and signs of zeros as PyTorch's own; other values round once."""
    expected = SPECIAL[name](POINTS.double())
    native = SPECIAL[name](POINTS)
    with exact.mode():
        found = SPECIAL[name](POINTS)
    is_right = (found == native) | (found.isnan() & native.isnan())
    error = (found.double() - expected).abs() / expected.abs().clamp(min=2.0**-126)
    assert (is_right | (error <= 2.0**-24 * 1.01)).all()
    zero = (found == 0) & (native == 0)
    assert torch.equal(found[zero].signbit(), native[zero].signbit())


def test_a_layer_norm_has_its_weight_and_its_bias():
    x, weight, bias = torch.randn(3, 7), torch.randn(7), torch.randn(7)
    with exact.mode():
        found = F.layer_norm(x, [7], weight, bias)
    expected = F.layer_norm(x.double(), [7], weight.double(), bias.double())
    assert (found - expected).abs().max() < 1e-5


def test_the_mean_of_a_layer_norm_is_pytorchs_where_it_is_infinite():
    x = torch.tensor([[math.inf, 1.0], [-math.inf, -math.inf], [3.0, 5.0]])
    native = torch.native_layer_norm(x, [2], None, None, 1e-5)
    with exact.mode():
        found = torch.native_layer_norm(x, [2], None, None, 1e-5)
    assert all(
        torch.equal(*pair)
        for pair in zip(map(torch.isnan, found), map(torch.isnan, native), strict=True)
    )
    assert found[1][2] == 4


def test_the_mean_of_a_group_norm_is_infinite():
    """PyTorch's is infinite or NaN: it depends on the number of elements."""
    x = torch.tensor([[[math.inf, 1.0], [3.0, 5.0]]])
    with exact.mode():
        _, mean, _ = torch.native_group_norm(x, None, None, 1, 2, 2, 2, 1e-5)
    assert mean.tolist() == [[math.inf, 4.0]]


def test_softplus_has_its_threshold():
    x = torch.tensor([1.0, 1.6, 30.0], requires_grad=True)
    with exact.mode():
        y = F.softplus(x, 2, 3)
        (slope,) = torch.autograd.grad(y.sum(), x)
    assert y[1:].tolist() == x[1:].tolist()
    assert slope[1:].tolist() == [1.0, 1.0]
    assert y[0] > 1


def test_erfinv_near_one():
    near = 1 - torch.arange(1, 2**12) * 2.0**-24
    x = torch.cat([near, -near, torch.linspace(-1, 1, 2001)[1:-1], torch.logspace(-38, -1, 999)])
    with exact.mode():
        found = torch.erfinv(x)
    expected = torch.erfinv(x.double())
    unit = torch.exp2(expected.abs().clamp(min=2.0**-126).log2().floor() - 23)
    assert ((found.double() - expected).abs() / unit).max() <= 0.51


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sqrt_is_rounded_as_ieee_754_says(dtype):
    """By `math.sqrt` and NumPy, which take the processor's; MKL's is off by one unit at places."""
    tiny, huge = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    special = [
        0.0,
        -0.0,
        math.inf,
        tiny,
        tiny / 8,
        huge,
        4.0,
        1 + torch.finfo(dtype).eps,
        1 / 3,
        2**-200 / 3,
    ]
    drawn = torch.rand(50_000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x = torch.cat([torch.tensor(special, dtype=dtype), drawn * 10, drawn * tiny])
    with exact.mode():
        found = x.sqrt()
        assert torch.tensor([-1.0, math.nan], dtype=dtype).sqrt().isnan().all()
    integers = torch.int32 if dtype == torch.float32 else torch.int64
    assert torch.equal(found.view(integers), torch.from_numpy(np.sqrt(x.numpy())).view(integers))


@pytest.mark.parametrize("towards", [0.0, math.inf])
def test_sqrt_does_not_depend_on_a_librarys_last_bit(monkeypatch, towards):
    x = torch.rand(5_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 10
    expected = torch.from_numpy(np.sqrt(x.numpy()))
    off = expected.nextafter(torch.tensor(towards, dtype=torch.float64))
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda _: off)
    assert torch.equal(sqrt64(x), expected)
    assert torch.equal(in_pieces(lambda _: off, x.float()), expected.float())


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
def test_masks_among_indices():
    """Their True elements are counted before the native operator sees zeros."""
    x, mask = torch.rand(6, 2), torch.tensor([True, False, True, True, False, False])
    calls = {
        "gradient": lambda: torch.func.grad(lambda x: x[mask].square().sum())(x),
        "bytes": lambda: x.index_put((mask.byte(),), torch.ones(3, 2)),
        "sum": lambda: x.index_put((mask,), torch.ones(3, 2), accumulate=True),
        "a mask and places": lambda: x.index_put((mask, torch.tensor([0, 1, 0])), torch.ones(3)),
        "integers": lambda: x.long().index_put((mask,), torch.ones(3, 2).long()),
    }
    for name, call in calls.items():
        expected = call()
        with exact.mode():
            assert torch.equal(call(), expected), name
    with exact.mode(), pytest.raises((RuntimeError, IndexError), match="shape mismatch"):
        x[mask] = torch.ones(4, 2)


def test_sums_in_integers_convert_each_term():
    terms, integers = torch.tensor([0.9, 0.9]), torch.tensor([1, -1])
    with exact.mode():
        assert terms.sum(dtype=torch.int64) == 0
        assert terms.sum(0, dtype=torch.int32) == 0
        assert integers.sum(dtype=torch.bool)
        assert torch.tensor([0.5, -0.5]).sum(dtype=torch.bool)
        with pytest.raises(ConfigError, match="real numbers"):
            terms.sum(dtype=torch.complex64)


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x[1:].add_(x[:-1]),
        lambda x: torch.exp(x[1:], out=x[:-1]),
        lambda x: torch.add(x[1:], 1, out=x[:-1]),
        lambda x: x.index_add_(0, torch.tensor([0, 1]), x[:2]),
        lambda x: x.scatter_add_(0, torch.tensor([0, 1]), x[:2]),
    ],
)
def test_a_write_to_memory_that_is_read_is_refused(write):
    x = torch.arange(4.0)
    with exact.mode(), pytest.raises(RuntimeError, match="a single memory location"):
        write(x)
    assert torch.equal(x, torch.arange(4.0))
    with exact.mode():
        x.add_(x)
        x[:2].add_(x[2:])
    assert x.tolist() == [4.0, 8.0, 4.0, 6.0]


def test_an_index_without_dimensions():
    with exact.mode():
        added = torch.zeros(3, 4).index_add(0, torch.tensor(1), torch.ones(1, 4))
        for shape in ((3, 4), (3,)):
            slope = torch.func.grad(lambda x: x.index_select(0, torch.tensor(1)).sum())(
                torch.zeros(shape)
            )
            assert torch.equal(slope, torch.zeros(shape).index_fill(0, torch.tensor([1]), 1.0))
    assert added.tolist() == [[0.0] * 4, [1.0] * 4, [0.0] * 4]


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.scaled_dot_product_attention(*3 * [x.transpose(1, 2)]),
        lambda x: x.transpose(0, 2).exp(),
        lambda x: F.silu(x.transpose(1, 2)),
        lambda x: F.layer_norm(x.transpose(0, 1), [4]),
        lambda x: x.transpose(1, 3).log_softmax(3),
        lambda x: F.conv2d(x.to(memory_format=torch.channels_last), torch.ones(3, 3, 1, 1)),
        lambda x: F.group_norm(x.to(memory_format=torch.channels_last), 3),
        lambda x: F.mse_loss(x.transpose(1, 2), x.transpose(1, 2), reduction="none"),
        lambda x: x.transpose(1, 2).sum(3, keepdim=True),
    ],
)
def test_strides_are_pytorchs(call):
    """Code may view the results."""
    x = torch.rand(2, 3, 5, 4)
    expected = call(x)
    with exact.mode():
        assert call(x).stride() == expected.stride()


def test_more_empty_operands():
    empty = torch.zeros
    with exact.mode():
        assert torch.func.grad(lambda x: F.mse_loss(x, x * 0).nan_to_num())(empty(0)).shape == (0,)
        attend = F.scaled_dot_product_attention
        assert torch.equal(
            attend(empty(1, 3, 0), empty(1, 5, 0), torch.ones(1, 5, 4)), torch.ones(1, 3, 4)
        )
        nothing = empty(1, 0, 4)
        slope = torch.func.grad(lambda q: attend(q, nothing, nothing).sum())(torch.ones(1, 3, 4))
        assert torch.equal(slope, empty(1, 3, 4))
        of_embedding = torch.func.grad(lambda w: F.embedding(torch.tensor([0, 1]), w).sum())
        assert of_embedding(empty(3, 0)).shape == (3, 0)
        with pytest.raises(ConfigError, match=r"weight has shape \(4, 0, 3, 3\), expected"):
            F.conv2d(empty(2, 0, 5, 5), empty(4, 0, 3, 3))


def test_out_of_another_dtype_is_refused():
    with (
        exact.mode(),
        pytest.raises(ConfigError, match=r"out is torch\.float64, expected torch\.float32"),
    ):
        torch.exp(X, out=torch.empty(0, dtype=torch.float64))


def test_addmm_without_its_product():
    product = torch.full((2, 2), math.inf)
    with exact.mode():
        assert torch.equal(torch.addmm(torch.eye(2), product, product, alpha=0), torch.eye(2))


def test_a_nan_reaches_no_key_that_nobody_may_attend_to():
    q = torch.rand(1, 3, 4)
    k = torch.rand(1, 6, 4).index_fill(1, torch.tensor(1), math.inf)
    v = torch.rand(1, 6, 4)
    with exact.mode():
        slope = torch.func.grad(
            lambda v: F.scaled_dot_product_attention(q, k, v, is_causal=True).sum()
        )(v)
    assert slope[0, :3].isnan().any()
    assert torch.equal(slope[0, 3:], torch.zeros(3, 4))


def test_private_rules_are_those_of_attention():
    assert all("attention" in name for name in PRIVATE)
