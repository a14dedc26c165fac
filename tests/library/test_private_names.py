# SPDX-License-Identifier: MIT
"""The private names of PyTorch in torchpar/library: their number, and the gaps they are there for.

When a gap is mended, take the public way that torchpar/library/private.py names, and lower COUNT.
"""

import ast
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import torchpar
from torchpar import library
from torchpar.library import private

COUNT = 15
FOLDER = Path(library.__file__).parent
X = torch.linspace(1, 2, 3)
NAMES = (f"private_names::op{i}" for i in itertools.count())


def private_names(source: str) -> Iterator[str]:
    """The names below ``torch`` that are imported or used, and have a part that is private.

    Names of operators, and types for a checker alone, do not count.
    """
    tree = ast.parse(source)
    of_types = [
        n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)
    ]
    ignored = {id(inner) for one in of_types for inner in ast.walk(one)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{one.name}" for one in node.names]
        elif isinstance(node, ast.Import):
            names = [one.name for one in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        for name in names:
            first, *rest = name.split(".")
            is_private = any(part.startswith("_") and not part.endswith("__") for part in rest)
            if first == "torch" and rest[:1] != ["ops"] and is_private and id(node) not in ignored:
                yield name


def test_private_names_stand_in_one_file_and_are_explained() -> None:
    others = [path for path in FOLDER.glob("*.py") if path.name != "private.py"]
    assert len(others) > 4
    assert {path.name: [*private_names(path.read_text())] for path in others} == {
        path.name: [] for path in others
    }
    assert len(private.__all__) == COUNT
    assert private.__doc__ is not None
    assert [name for name in private.__all__ if f"``{name}``" not in private.__doc__] == []


def test_a_private_name_is_found() -> None:
    source = "import torch._a\nfrom torch.b import _c\nfrom torch._d import e\ntorch._f.g()\n"
    public = (
        "import torch.a\nfrom torch.b import c\ntorch.ops.aten._d\ntorch.__version__\n_x.torch\n"
    )
    found = {"torch._a", "torch.b._c", "torch._d.e", "torch._f.g", "torch._f"}
    assert set(private_names(source + public)) == found


class Square(torch.autograd.Function):
    op: Any

    @staticmethod
    def forward(x: Tensor) -> Any:
        return Square.op(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        return 2 * ctx.saved_tensors[0] * g

    @staticmethod
    def jvp(ctx: Any, t: Any) -> Any:
        return 2 * ctx.saved_tensors[0] * t

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
        return Square.op(x), in_dims[0]


def test_a_function_called_before_the_transforms_loses_forward_over_forward_mode() -> None:
    name = next(NAMES)
    op = torch.library.custom_op(
        name, lambda x: x * x, mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    Square.op = op
    lib = torch.library.Library("private_names", "FRAGMENT")
    lib.impl(name.partition("::")[2], Square.apply, "FuncTorchDynamicLayerFrontMode")
    expected = 2 * torch.eye(3)

    def f(x: Tensor) -> Tensor:
        return op(x).sum()

    assert torch.equal(torch.func.hessian(f)(X), expected)
    forward_over_forward = torch.func.jacfwd(torch.func.jacfwd(f))(X)
    assert not forward_over_forward.any(), "it is right now: no SingleLevelFunction is needed"


def test_forward_mode_is_off_within_a_jvp_and_on_without_inference_mode() -> None:
    seen: list[bool] = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def jvp(ctx: Any, t: Tensor) -> Tensor:
            seen.append(torch._C._is_fwd_grad_enabled())
            with torch.inference_mode(False):
                seen.append(torch._C._is_fwd_grad_enabled())
            return 2 * t

    with forward_ad.dual_level():
        Double.apply(forward_ad.make_dual(X, X))
    assert seen == [False, True], "it is on now: no `_forward_mode` is needed"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec")  # PyTorch's own (2.11)
def test_is_exporting_is_true_where_an_export_looks_into_an_operator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers: list[tuple[bool, bool]] = []

    def ask() -> bool:
        answers.append((private.is_decomposition_disabled(), torch.compiler.is_exporting()))
        return answers[-1][0]

    monkeypatch.setattr("torchpar.library.constructors.is_decomposition_disabled", ask)
    exported = torch.export.export(torchpar.nn.LinearSigmoid(2, 4), (torch.ones(3, 2),))
    exported.run_decompositions()
    exported.run_decompositions(decompose_custom_triton_ops=True)
    assert set(answers) == {(True, True), (False, True)}, "is_exporting may do now"


def gradient_of_a_transform(op: Callable[..., Any]) -> Tensor:
    return torch.func.jacrev(torch.func.grad(lambda x: op(x).sum()))(X)


def test_register_autograd_of_pytorch_fails_under_nested_transforms() -> None:
    """pytorch#168393, #170834, #179652."""
    op: Any = torch.library.custom_op(
        next(NAMES), lambda x: x * x, mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    op.register_autograd(
        lambda ctx, g: 2 * ctx.saved_tensors[0] * g,
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    with pytest.raises(Exception):  # noqa: B017, PT011 - which one is PyTorch's matter
        gradient_of_a_transform(op)
