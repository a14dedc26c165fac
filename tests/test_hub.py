# SPDX-License-Identifier: MIT
"""Tests of the package for the Hugging Face Hub's library `kernels`.

As a script, ``python test_hub.py FOLDER`` loads the package there and compares its operators.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]  # `commands` imports torchpar, which is not to be there


def module_of(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package as the Hub's cache holds it: each file is a link to one with another name and
    folder."""
    written, folder = (tmp_path_factory.mktemp(name) for name in ("written", "snapshot"))
    subprocess.run([sys.executable, str(ROOT / ".ci" / "hub.py"), str(written)], check=True)
    for number, file in enumerate([path for path in written.rglob("*") if path.is_file()]):
        link = folder / file.relative_to(written)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file.rename(written / str(number)))
    return folder


def test_the_card_has_the_first_line_of_each_operator(package: Path) -> None:
    from torchpar import ops  # not where this file is a script

    card = (package / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", card, re.MULTILINE)
    functions = {name: getattr(ops, name) for name in ops.__all__ if name != "fp32_products"}
    assert dict(rows) == {name: one.__doc__.partition("\n")[0] for name, one in functions.items()}


@pytest.mark.slow
def test_the_package_loads_and_its_operators_give_the_values(package: Path) -> None:
    path = [
        part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part != str(ROOT)
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-B", __file__]
    result = subprocess.run(
        command, cwd=package, env=environment, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, "right\n"), result.stderr


# In a process whose path does not have this repository, with the package's folder as the current
# one.


def load() -> ModuleType:
    """Load the package as its README does, or without the library `kernels` by the same rule."""
    variant = Path("build/torch-universal").absolute()
    metadata = json.loads((variant / "metadata.json").read_text())
    if not any(importlib.metadata.distributions(name="kernels")):
        return module_of(metadata["id"], variant / "torchpar" / "__init__.py")
    from kernels._rust import Digest, DigestAlgorithm, Metadata

    digest = Metadata.read_from_file(variant / "metadata.json").digest
    digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
    (example,) = re.findall("```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    return names["torchpar"]


def main() -> None:
    sys.modules["torchpar"] = None  # type: ignore[assignment]  # importing it fails
    package = load()
    torch.manual_seed(0)
    a, b, weight = (torch.randn(shape) for shape in ((129, 127), (129, 127), (3, 127)))
    operands = {"linear_sigmoid": (a, weight), "matmul_t": (a,), "exact_matmul_t": (a,)}
    with package.fp32_products("tf32x3"):  # which changes nothing on a CPU
        package.matmul_t(a)
    names = [name for name in package.__all__ if name != "fp32_products"]
    found = {name: getattr(package, name)(*operands.get(name, (a, b))) for name in names}
    assert package.matmul_t(a.to("meta")).shape == (129, 129)

    del sys.modules["torchpar"]
    sys.path.insert(0, str(ROOT))
    import torchpar  # an installed version has a namespace of its own

    assert package.__version__ == torchpar.__version__
    assert set(package.__all__) == set(torchpar.ops.__all__)
    for name, result in found.items():
        function = getattr(torchpar, name)
        assert function is not getattr(package, name)
        assert torch.equal(result, function(*operands.get(name, (a, b)))), name
    print("right")


if __name__ == "__main__":
    main()
