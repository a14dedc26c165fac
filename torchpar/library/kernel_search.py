# SPDX-License-Identifier: MIT
"""Search for the Triton kernels of a function."""

import dis
from collections.abc import Iterator
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch

from torchpar.library.private import triton_ops_to_kernels

_LOADS_VARIABLE = frozenset(("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF"))
_LOADS_ATTRIBUTE = frozenset(("LOAD_ATTR", "LOAD_METHOD"))
_NOT_SEARCHED = frozenset(("torch", "triton"))
_Packet: Any = type(torch.ops.aten.mm)


class TritonKernels:
    """The Triton kernels that a function names, also through the functions that it names.

    The search begins when the kernels are asked for, because kernels may be defined after the
    function, and because the search needs Triton. The kernels of operators that the function names
    belong to the function's kernels. A variable within a function is not followed.
    """

    def __init__(self, function: object):
        self.function = function

    def __iter__(self) -> Iterator[object]:
        from triton import JITFunction

        rest, seen = [self.function], set[int]()
        while rest:
            value = rest.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, partial):
                rest += [value.func, *value.args, *value.keywords.values()]
            elif isinstance(value, JITFunction):
                yield value
            elif isinstance(value, FunctionType):
                if (value.__module__ or "").partition(".")[0] not in _NOT_SEARCHED:
                    rest += [*_named(value), getattr(value, "__wrapped__", None)]
            elif isinstance(value, torch.library.CustomOpDef):  # type: ignore[attr-defined]
                rest += _of_operator(value._qualname)
            elif isinstance(value, _Packet):
                rest += _of_operator(value._qualified_op_name)
            elif type(value).__module__.partition(".")[0] == "triton":  # Autotuner, Heuristics
                rest.append(getattr(value, "fn", None))


def _of_operator(name: str) -> list[object]:
    """The kernels of an operator, or the function that names them: it may name the operator."""
    kernels: Any = triton_ops_to_kernels.get(name, ())
    return [kernels.function] if isinstance(kernels, TritonKernels) else list(kernels)


def _named(function: FunctionType) -> Iterator[object]:
    """The values of the function's global variables, closure and defaults, and of attributes."""
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    variables = dict(function.__globals__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            variables[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [one for one in code.co_consts if isinstance(one, CodeType)]
        value: Any = None
        for instruction in dis.get_instructions(code):
            if instruction.opname in _LOADS_VARIABLE:
                value = variables.get(instruction.argval)
            elif instruction.opname in _LOADS_ATTRIBUTE:
                try:
                    value = getattr(value, instruction.argval, None)
                except Exception:  # a property raised it
                    value = None
            else:
                value = None
            yield value.__func__ if isinstance(value, MethodType) else value
