# SPDX-License-Identifier: MIT
"""Checks of packages for the Hugging Face Hub, which test_hub.py runs in processes of their own.

python hub_checks.py (importlib | kernels) CHECK[,CHECK…] FOLDER...
"""

import importlib
import importlib.util
import json
import math
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.triton import get_triton_kernels_for_op
from torch.autograd import grad, gradcheck
from torch.library import opcheck
from torch.nn.functional import linear
from torch.testing import assert_close

ROOT = Path(__file__).parents[1]


@cache
def by_importlib(folder: Path) -> ModuleType:
    """Load a package as the library `kernels` does, without it."""
    variant = folder / "build" / "torch-universal"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "torchpar" / "__init__.py")
    package = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package


def by_kernels(folder: Path) -> ModuleType:
    from kernels import get_local_kernel

    return get_local_kernel(folder)


LOAD = {"importlib": by_importlib, "kernels": by_kernels}


def refuse_network(event: str, args: Any) -> None:
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        raise RuntimeError(f"{event}{args}, expected no use of the network")


def module(package: ModuleType, name: str) -> ModuleType:
    return importlib.import_module(f"{package.__name__}.{name}")


def folder_of(module: ModuleType) -> Path:
    return Path(str(module.__file__)).parent.resolve()


def integers(*shape: int) -> Tensor:
    """Floats of which sums of products are exact in float32."""
    return torch.randint(-8, 9, shape).float()


def check_values(load: Any, folder: Path) -> None:
    """The operators' values, and where their kernels and tables come from."""
    sys.modules["torchpar"] = None  # type: ignore[assignment]  # importing it fails
    package = load(folder)
    a, b, weight = integers(129, 127), integers(129, 127), integers(3, 127) / 8
    a64, b64, weight64 = a.double(), b.double(), weight.double()
    for actual, formula in (
        (package.maximum(a, b), torch.maximum(a64, b64)),
        (package.matmul_t(a), a64 @ a64.mT),
        (package.symmetric_matmul(a, a / 2, alpha=3), 1.5 * a64 @ a64.mT),
        (package.exact_matmul(a, b), a64 @ b64.mT),
        (package.exact_matmul_t(a), a64 @ a64.mT),
    ):
        assert torch.equal(actual.double(), formula)
    formula = 1 / (1 + (-(a64 @ weight64.mT)).exp())
    error, of_torch = (
        (y - formula).abs().max() for y in (package.linear_sigmoid(a, weight), linear(a, weight).sigmoid())
    )
    assert error <= 2 * of_torch

    for name in package.__all__:
        kernels = get_triton_kernels_for_op(package._ops.add_op_namespace_prefix(name))
        assert {kernel.fn.__module__.partition(".")[0] for kernel in kernels} == {package.__name__}
    tables = module(package, "kernels.tables")
    assert folder_of(tables) / "tuned" == tables.SHIPPED


def check_derivatives(load: Any, folder: Path) -> None:
    """The gradients of an operator, its registration, and a compiled graph of it."""
    package = load(folder)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(package.matmul_t, x)
    overload = package._ops.ops.matmul_t.default
    assert overload.name() == package._ops.add_op_namespace_prefix("matmul_t")
    opcheck(overload, (x,))
    compiled = torch.compile(package.matmul_t, fullgraph=True, backend="aot_eager")(x)
    assert_close(compiled, x @ x.mT)
    assert_close(*grad(compiled.sum(), x), 2 * x.detach().sum(0).expand(4, 3))


def check_example(load: Any, folder: Path) -> None:
    """The example of the package's README, run in the package's folder."""
    (example,) = re.findall("```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["torchpar"] is load(folder)
    x = names["x"].detach().double()
    assert_close(names["x"].grad.double(), 2 * x.sum(0).expand(512, 256), rtol=1e-4, atol=1e-3)


def check_digest(load: Any, folder: Path) -> None:
    """The digest in metadata.json, by the library's own rule."""
    from kernels._rust import Digest, DigestAlgorithm, Metadata

    variant = folder / "build" / "torch-universal"
    digest = Metadata.read_from_file(variant / "metadata.json").digest
    digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))


def check_versions(load: Any, first: Path, copy: Path, second: Path, clash: Path) -> None:
    """Two versions beside an installed torchpar, and one in the namespace of another."""
    packages = [load(first), load(second)]
    sys.path.append(str(ROOT))
    packages.append(importlib.import_module("torchpar"))
    assert packages[0].__version__ == packages[2].__version__ != packages[1].__version__
    namespaces = {module(package, "ops._library").NAMESPACE for package in packages}
    assert namespaces == {packages[0].__name__, packages[1].__name__, "torchpar"}
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    y, expected = x, x
    for package in packages:
        y, expected = package.matmul_t(y), expected @ expected.mT
    assert_close(y, expected)
    assert_close(grad(y.sum(), x), grad(expected.sum(), x))
    assert load(copy).matmul_t is packages[0].matmul_t
    with pytest.raises(RuntimeError, match="multiple times"):
        load(clash)


def check_launcher(load: Any, folder: Path) -> None:
    """A kernel, run by Triton's interpreter."""
    launch = module(load(folder), "kernels.maximum").maximum
    a, b, out = integers(129, 3), integers(129, 3), torch.full((129, 3), math.nan)
    launch(a, b, out, lambda kernel: kernel)
    assert torch.equal(out, torch.maximum(a, b))


if __name__ == "__main__":
    sys.addaudithook(refuse_network)
    torch.manual_seed(0)
    loader, checks, *folders = sys.argv[1:]
    for check in checks.split(","):
        globals()[f"check_{check}"](LOAD[loader], *map(Path, folders))
