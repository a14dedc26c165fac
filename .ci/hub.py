# SPDX-License-Identifier: MIT
"""Write the operators as a package for the Hugging Face Hub's library `kernels`.

    python .ci/hub.py DIR

The library loads ``DIR/build/torch-universal/torchpar`` from outside the import path, beside other
versions and an installed torchpar. So the package imports its own files by relative names only, and
registers its operators in a namespace with a hash of its files, which is also its ``id``.
"""

import argparse
import ast
import hashlib
import json
import re
import sys
from base64 import b64encode
from pathlib import Path

ROOT = Path(__file__).parents[1]
VARIANT = "build/torch-universal"
ALLOWED = {"torch", "triton", *sys.stdlib_module_names}  # the Hub's kernels import nothing else
HEADER = "# SPDX-License-Identifier: MIT\n"
NAMESPACE = 'NAMESPACE = "torchpar"\n'  # a line of ops/_operator.py
INIT = '''"""Triton operators that work with all of PyTorch."""

from . import _ops
from .ops import {names}

__version__ = "{version}"
__all__ = {all}
'''
OPS = '''"""The operators of this version, and their namespace."""

import torch

ops = torch.ops.{id}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{id}::{{op_name}}"
'''
CARD = """---
license: mit
tags:
- kernels
---
# torchpar

Triton operators for NVIDIA GPUs, which run on CPUs too. They support autograd, torch.func,
torch.compile, autocast and DTensor. They need Python 3.11 and torch 2.11, or newer versions, and
`pip install kernels`.

| operator | result |
|---|---|
{rows}

```python
from pathlib import Path

import torch
from kernels import get_local_kernel

torchpar = get_local_kernel(Path("."))  # the folder of this file
x = torch.randn(512, 256, requires_grad=True)
torchpar.matmul_t(x).sum().backward()
```

A copy on the Hub is loaded by
`get_kernel("OWNER/torchpar", version={major}, trust_remote_code=True)`.
"""


def relative(source: str, name: str) -> str:
    """The source of the file ``name`` with relative imports; a ValueError says what could not be
    changed."""
    dots = "." * len(Path(name).parts)
    source = re.sub(r"^(\s*from )torchpar\.", rf"\1{dots}", source, flags=re.MULTILINE)
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                used = [alias.name for alias in names]
            case ast.ImportFrom(module=str(module), level=0):
                used = [module]
            case ast.Attribute(attr="torchpar"):
                used = ["torchpar"]  # torch.ops.torchpar
            case ast.Constant(value=str(text)) if re.match(r"torchpar\.", text):
                used = [text]  # an argument of import_module
            case _:
                continue
        for module in used:
            if module.partition(".")[0] not in ALLOWED:
                expected = (
                    "torch, triton, the standard library, `from torchpar.a import b` or `ops`"
                )
                raise ValueError(
                    f"torchpar/{name}, line {node.lineno}: uses {module}, expected {expected}"
                )
    return source


def imported(source: str, folder: tuple[str, ...]) -> set[str]:
    """What a file in ``folder`` imports by relative names, at any depth: modules, and names in
    them."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            module = ".".join(
                [*folder[: len(folder) + 1 - node.level], *filter(None, [node.module])]
            )
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def sources() -> dict[str, str]:
    """The files of the operators and all that they import, with relative imports, by name."""
    files: dict[str, str] = {}
    queue = ["ops"]
    while queue:
        module = queue.pop()
        path = ROOT.joinpath("torchpar", *module.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        name = path.relative_to(ROOT / "torchpar").as_posix()
        if module and name not in files and path.exists():
            files[name] = relative(path.read_text(), name)
            queue += [module.rpartition(".")[0], *imported(files[name], Path(name).parts[:-1])]
    return files


def summaries(files: dict[str, str]) -> dict[str, str]:
    """The first lines of the operators' docstrings, by name."""
    found = {}
    for node in ast.walk(ast.parse(files["ops/__init__.py"])):
        if isinstance(node, ast.ImportFrom) and node.level:
            names = {alias.name for alias in node.names}
            for one in ast.parse(files[f"{str(node.module).replace('.', '/')}.py"]).body:
                if isinstance(one, ast.FunctionDef) and one.name in names:
                    found[one.name] = (ast.get_docstring(one) or "").partition("\n")[0]
    return found


def package() -> tuple[str, dict[str, str]]:
    """The package's ``id``, and its files by name."""
    files = sources()
    (names,) = (
        sorted(ast.literal_eval(node.value))
        for node in ast.parse(files["ops/__init__.py"]).body
        if isinstance(node, ast.Assign)  # to __all__
    )
    init = (ROOT / "torchpar" / "__init__.py").read_text()
    version = re.findall(r'^__version__ = "(.+)"$', init, re.MULTILINE)[0]
    files["__init__.py"] = HEADER + INIT.format(names=", ".join(names), version=version, all=names)

    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    identifier = f"_torchpar_{digest[:12]}"
    library = files["ops/_operator.py"]
    if library.count(NAMESPACE) != 1:
        raise ValueError(f"torchpar/ops/_operator.py: expected one line {NAMESPACE.strip()}")
    files["ops/_operator.py"] = library.replace(NAMESPACE, f'NAMESPACE = "{identifier}"\n')
    files["_ops.py"] = HEADER + OPS.format(id=identifier)

    major = int(version.partition(".")[0])  # the Hub's 0 too means that the interface may change
    digests = {
        f"torchpar/{name}": hashlib.sha256(text.encode()).digest() for name, text in files.items()
    }
    metadata = {
        "id": identifier,
        "name": "torchpar",
        "version": major,
        "license": "MIT",
        "python-depends": [],
        "backend": {"type": "cuda"},
        "digest": {
            "algorithm": "sha256",
            "files": {name: b64encode(value).decode() for name, value in digests.items()},
        },
    }
    of_operators = summaries(files)
    rows = [f"| `{name}` | {of_operators[name]} |" for name in names if name in of_operators]
    card = CARD.format(rows="\n".join(rows), major=major)
    return identifier, {
        "README.md": card,
        "LICENSE": (ROOT / "LICENSE").read_text(),
        f"{VARIANT}/metadata.json": json.dumps(metadata, indent=2, sort_keys=True) + "\n",
        **{f"{VARIANT}/torchpar/{name}": text for name, text in files.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write the operators as a package for the Hugging Face Hub."
    )
    parser.add_argument("dir", type=Path, help="a folder that is empty or does not exist")
    folder = parser.parse_args().dir
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        parser.exit(
            2, f"{folder} is not an empty folder, give one that is empty or does not exist\n"
        )
    try:
        identifier, files = package()
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    try:
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
    except OSError as error:
        parser.exit(2, f"{folder} cannot be written ({error}), give another folder\n")
    print(f"{folder}: {identifier}")


if __name__ == "__main__":
    main()
