# SPDX-License-Identifier: MIT
"""A reference that a candidate is compared with, and its inputs: two forms of a file of Python.

A model: a class ``Model``, and functions ``get_inputs()`` and ``get_init_inputs()``; a candidate
has a class ``ModelNew``. A function: ``ref_kernel(data)`` and ``generate_input(seed, …)``; a
candidate has ``custom_kernel(data)``.
"""

import inspect
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from nogpu.record.operator_work import OperatorWork


class ProblemError(Exception):
    """The reference lacks something, or ends with an error."""


class Inputs(NamedTuple):
    """The arguments of one call.

    Attributes:
        data: of a model a list of arguments; of a function its argument.
        init: the arguments of a model's constructor.
    """

    data: Any
    init: Sequence[Any] = ()


class Right(NamedTuple):
    """The leaves of the reference's result.

    Attributes:
        changed: the numbers of the inputs' leaves that the reference itself writes.
    """

    outputs: list[Any]
    changed: list[int]


class Needed(NamedTuple):
    """The work that a call of the reference takes.

    Attributes:
        weights: bytes of a model's parameters and buffers.
        results: bytes of the result.
    """

    operators: OperatorWork
    weights: int
    results: int


class Problem:
    """The reference of a file.

    Args:
        sizes: the arguments of ``generate_input``.

    Raises:
        ProblemError: the file is of neither form, or ends with an error.
    """

    def __init__(self, path: Path, sizes: Mapping[str, int]):
        self.path, self.sizes = path, dict(sizes)
        with self._imported():
            try:
                self.names = runpy.run_path(str(path), run_name="reference")
            except Exception as e:
                raise ProblemError(f"{path.name} ends with {type(e).__name__}: {e}") from e
        if {"Model", "get_inputs"} <= set(self.names):
            self.form, self.entry = "model", "ModelNew"
        elif {"ref_kernel", "generate_input"} <= set(self.names):
            self.form, self.entry = "function", "custom_kernel"
            self._check_sizes()
        else:
            raise ProblemError(
                f"{path.name} has neither Model and get_inputs, nor ref_kernel and generate_input"
            )

    def _check_sizes(self) -> None:
        parameters = inspect.signature(self.names["generate_input"]).parameters
        missing = [
            name
            for name, one in parameters.items()
            if one.default is one.empty
            and name not in self.sizes
            and name != "seed"
            and one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
        ]
        if missing:
            example = " ".join(f"{name}=128" for name in missing)
            raise ProblemError(
                f"generate_input takes {', '.join(missing)}; give them by --sizes {example}"
            )

    @contextmanager
    def _imported(self) -> Iterator[None]:
        """Let modules beside the reference be imported."""
        folder = str(self.path.resolve().parent)
        sys.path.insert(0, folder)
        try:
            yield
        finally:
            with suppress(ValueError):
                sys.path.remove(folder)

    def inputs(self, seed: int) -> Inputs:
        """Return inputs, of which each seed has others."""
        torch.manual_seed(seed)
        with self._imported():
            if self.form == "model":
                init = self.names["get_init_inputs"]() if "get_init_inputs" in self.names else []
                return Inputs(_on_host(list(self.names["get_inputs"]())), list(init))
            given = dict(self.sizes)
            if "seed" in inspect.signature(self.names["generate_input"]).parameters:
                given.setdefault("seed", seed)
            return Inputs(_on_host(self.names["generate_input"](**given)))

    def model(self, init: Sequence[Any], seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        found: torch.nn.Module = self.names["Model"](*init)
        return found.eval()

    def right(self, inputs: Inputs, seed: int, dtype: torch.dtype | None = None) -> Right:
        """Compute the result of inputs; in a dtype of floats, if one is given.

        Args:
            seed: of a model's weights.
        """
        data = tree_map(lambda one: _copy(one, dtype), inputs.data)
        before = [_copy(one, None) for one in tree_leaves(data)]
        with torch.no_grad(), self._imported():
            if self.form == "model":
                model = self.model(inputs.init, seed)
                result = (model.to(dtype) if dtype else model)(*data)
            else:
                result = self.names["ref_kernel"](data)
        changed = [
            n
            for n, (one, other) in enumerate(zip(before, tree_leaves(data), strict=True))
            if isinstance(one, Tensor) and not same(one, other)
        ]
        return Right(_on_host(tree_leaves(result)), changed)

    def needed(self, inputs: Inputs, seed: int, device: str) -> Needed:
        """Return the work of a call on a device: "cpu", or "meta", which computes shapes alone."""
        operators = OperatorWork()
        data = tree_map(_copy, inputs.data)
        data = tree_map(lambda one: one.to(device) if isinstance(one, Tensor) else one, data)
        with torch.no_grad(), self._imported():
            if self.form == "model":
                model = self.model(inputs.init, seed).to(device)
                weights = sum(one.nbytes for one in model.state_dict().values())
                with operators:
                    result = model(*data)
            else:
                weights = 0
                with operators:
                    result = self.names["ref_kernel"](data)
        tensors = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        return Needed(operators, weights, sum(one.nbytes for one in tensors))


def same(one: object, other: object) -> bool:
    """Whether both are tensors of the same bits."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return False
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    left, right = (t.detach().contiguous().flatten() for t in (one, other))
    return not left.numel() or torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def _copy(one: Any, dtype: torch.dtype | None = None) -> Any:
    if not isinstance(one, Tensor):
        return one
    is_float = one.is_floating_point() and dtype is not None
    return one.detach().clone().to(dtype if is_float else one.dtype)


def _on_host(tree: Any) -> Any:
    return tree_map(lambda one: one.detach().cpu() if isinstance(one, Tensor) else one, tree)
