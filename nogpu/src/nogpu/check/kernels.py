# SPDX-License-Identifier: MIT
"""Check Triton kernels without a GPU: they are compiled for one, and executed on this CPU."""

from collections.abc import Callable, Mapping, Sequence
from contextvars import copy_context
from functools import partial
from inspect import signature
from typing import Protocol
from unittest.mock import patch

import torch
import triton
from torch import Tensor

from nogpu.check.compare import OutcomeException, close, outcome_of, same_bits
from nogpu.check.rows import (
    EMPTY_GRID,
    FAULT_ROWS,
    OTHERS,
    RESOURCES,
    fault_rows,
    resource_row,
)
from nogpu.check.table import KernelTable, Row
from nogpu.data_sheets import ARCHITECTURES
from nogpu.record.launch import Launch
from nogpu.triton.emulate import emulate

ATOMICS = (
    "an atomic adds floats, which FpSan does not replace; let each program store its sum instead"
)
NO_LAUNCH = "wrong", "equals launches no kernel"


class JittedKernel(Protocol):
    """A jitted Triton kernel."""

    def __getitem__(self, grid: object, /) -> Callable[..., object]: ...


def check_kernel(
    kernel: JittedKernel,
    grid: object,
    arguments: Sequence[object],
    reference: Callable[..., Mapping[str, Tensor]] | None = None,
    *,
    arch: str = "sm_90",
    equals: JittedKernel | Callable[..., object] | None = None,
    **options: object,
) -> KernelTable:
    """Execute a kernel as compiled for a GPU, and compare what it writes with a reference.

        check_kernel(
            add, (4,), (x, y, torch.empty_like(x), x.numel()),
            lambda x, y, out, n: {"out": x + y}, BLOCK=1024,
        )

    The launch is executed three times, with asynchronous operations that end early, late and at
    random, and warps in other orders.

    Args:
        kernel: a function with `triton.jit`, or an autotuned one, whose first configuration runs.
        grid: as in ``kernel[grid]``.
        arguments: of the launch, in the order of the kernel's signature: CPU tensors, which stay as
            they are, and numbers. A tensor that the reference does not name must not change.
        reference: a function of the same arguments, of PyTorch's operators. For each tensor that
            the kernel writes, it returns by name the content that is right. It is also called with
            tensors of float64, whose results count as exact. The kernel's error may be twice that
            of the reference. What such a tensor holds before must not matter to the kernel, unless
            the reference uses it, or it is one number everywhere, such as 0.
        arch: "sm_80" (A100), "sm_90" (H100) or "sm_100" (B200).
        equals: another kernel, which is launched likewise, or a function of the same arguments that
            launches kernels. The row "formula" says whether both compute the same formula, in any
            order of its sums and products. It compares all bits, with Triton's FpSan: floats become
            integers modulo a power of two, of which sums and products are exact. Formulas that are
            equal only by a root, or by canceling a factor of a quotient, count as two; docs/ptx.md
            lists the equalities. A kernel whose atomics add floats is not compared: FpSan does not
            replace these sums.
        options: constants of the kernel by name, and Triton's options, such as ``num_warps``.

    Returns:
        A table with the rows "values", "formula", "races", "bounds", "uninitialised memory",
        "execution" and "registers and spills". ``ok`` says whether none is wrong.

    Raises:
        ValueError: another architecture; a grid that is no tuple, list or function; a reference
            that returns something else; neither ``reference`` nor ``equals``; ``equals`` that is no
            kernel and no function, or with a Triton that has no FpSan.
    """
    __tracebackhide__ = True  # pytest then shows the line of the test alone
    if arch not in tuple(ARCHITECTURES):
        raise ValueError(f"arch is {arch!r}, expected one of {', '.join(ARCHITECTURES)}")
    if not (callable(grid) or isinstance(grid, tuple | list)):
        given_type = type(grid).__name__
        raise ValueError(f"the grid is an object of type {given_type}, expected a tuple: (4,)")
    if reference is None and equals is None:
        raise ValueError("there is no reference; give one, or equals=another_kernel")
    if equals is not None and not has_fpsan():
        raise ValueError(f"equals needs FpSan of Triton 3.8, and Triton is {triton.__version__}")
    if not (equals is None or hasattr(equals, "fn") or callable(equals)):
        given_type = type(equals).__name__
        raise ValueError(
            f"equals is an object of type {given_type}, expected a kernel or a function"
        )
    names = list(signature(_python_function(kernel)).parameters)
    launched = _copies(arguments)
    given = dict(zip(names, launched, strict=False))
    if reference is not None:
        right = _expected(reference, arguments, given)
        spoiled = _spoil(given, right, partial(_expected, reference, launched, given))
        exact = _expected(reference, arguments, given, torch.float64)
    with emulate(arch, schedules="all") as gpu:
        copy_context().run(_launch_alone, kernel, grid, launched, options)
    written, before = (
        {name: a for name, a in zip(names, one, strict=False) if isinstance(a, Tensor)}
        for one in (launched, arguments)
    )
    rows = []
    if reference is not None:
        rows.append(
            Row(
                "values",
                *outcome_of(partial(_compare_written, written, before, right, exact, spoiled)),
            )
        )
    if equals is not None:
        formula = partial(_same_formula, kernel, equals, grid, arguments, names, arch, options)
        rows.append(Row("formula", *outcome_of(formula)))
    if gpu.launches or gpu.faults:
        rows += [Row(*one) for one in fault_rows(gpu.report().faults)]
        rows.append(Row(*resource_row([gpu])))
    else:  # Triton launches nothing
        rows += [Row(row, "not run", EMPTY_GRID) for row in (*FAULT_ROWS, OTHERS, RESOURCES)]
    return KernelTable(f"{_python_function(kernel).__name__} for {arch}", rows)


def _launch_alone(
    kernel: JittedKernel, grid: object, arguments: Sequence[object], options: Mapping[str, object]
) -> None:
    """Launch a kernel whose descriptors may need an allocator, which its program would set."""
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8))
    kernel[grid](*arguments, **options)


def has_fpsan() -> bool:
    """Whether Triton has its sanitizer of formulas."""
    return tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)


def _same_formula(
    kernel: JittedKernel,
    other: JittedKernel | Callable[..., object],
    grid: object,
    arguments: Sequence[object],
    names: Sequence[str],
    arch: str,
    options: Mapping[str, object],
) -> None:
    """Compare the bits of what both write with FpSan."""
    found = []
    with patch.object(triton.knobs.compilation, "instrumentation_mode", "fpsan"):
        for one, if_empty in ((kernel, ("not run", EMPTY_GRID)), (other, NO_LAUNCH)):
            launched = _copies(arguments)
            launches = _launch_in(arch, one, grid, launched, options)
            if not launches:
                raise OutcomeException(*if_empty)
            if any(map(_adds_by_atomics, launches)):
                raise OutcomeException("not run", ATOMICS)
            found.append(launched)
    has_changed = False
    for name, a, b, given in zip(names, *found, arguments, strict=False):
        if not (isinstance(a, Tensor) and isinstance(b, Tensor) and isinstance(given, Tensor)):
            continue
        left, right, before = map(_bytes, (a, b, given))
        if differs := int((left != right).any(1).sum()):
            raise OutcomeException(
                "wrong", f"{name}: another formula in {differs} of {a.numel()} elements"
            )
        has_changed |= not torch.equal(left, before)
    if not has_changed:
        raise OutcomeException("not run", "neither kernel changes a tensor")


def _launch_in(
    arch: str,
    one: JittedKernel | Callable[..., object],
    grid: object,
    arguments: Sequence[object],
    options: Mapping[str, object],
) -> list[Launch]:
    """Launch a kernel, or what a function launches, and return the launches."""
    with emulate(arch) as gpu:
        if hasattr(one, "fn"):  # a jitted or autotuned kernel
            one[grid](*arguments, **options)  # type: ignore[index]
        else:
            one(*arguments)  # type: ignore[operator]
    if errors := gpu.report().errors:
        raise OutcomeException("wrong", f"with FpSan: {errors[0].in_one_line()}")
    return gpu.launches


def _adds_by_atomics(launch: Launch) -> bool:
    """Whether atomics add floats: FpSan leaves these sums to the rounding of floats."""
    return any(
        i.parts[0] in ("atom", "red") and "add" in i.parts and i.parts[-1].startswith(("f", "bf"))
        for i in launch.counts.kernel.instructions
    )


def _copies(arguments: Sequence[object]) -> list[object]:
    """Copy the arguments' tensors with their strides, and with the memory that they share."""
    storages: dict[int, torch.UntypedStorage] = {}
    found: list[object] = []
    for a in arguments:
        if isinstance(a, Tensor):
            storage = a.untyped_storage()
            if storage.data_ptr() not in storages:
                storages[storage.data_ptr()] = storage.clone()
            copy = torch.empty(0, dtype=a.dtype)
            copy.set_(storages[storage.data_ptr()], a.storage_offset(), a.shape, a.stride())
            found.append(copy)
        else:
            found.append(a)
    return found


def _python_function(kernel: object) -> Callable[..., object]:
    """The Python function of a jitted or autotuned kernel."""
    function = kernel
    while hasattr(function, "fn"):
        function = function.fn
    if function is kernel or not callable(function):
        given = f"the kernel is an object of type {type(kernel).__name__}"
        raise ValueError(f"{given}, expected a function with triton.jit")
    return function


def _expected(
    reference: Callable[..., Mapping[str, Tensor]],
    arguments: Sequence[object],
    written: Mapping[str, object],
    dtype: torch.dtype | None = None,
) -> Mapping[str, Tensor]:
    """What the reference returns for copies of the arguments, whose tensors have ``dtype``."""
    __tracebackhide__ = True
    given = [
        (a.clone() if dtype is None else _cast(a, dtype)) if isinstance(a, Tensor) else a
        for a in arguments
    ]
    with torch.no_grad():
        found = reference(*given)
    if not isinstance(found, Mapping) or not found:
        raise ValueError(
            f"the reference returns an object of type {type(found).__name__}, expected tensors by "
            'the names of arguments, such as {"out": x + y}'
        )
    for name, value in found.items():
        if not isinstance(value, Tensor):
            given_type = type(value).__name__
            raise ValueError(f"the reference's {name!r} is a {given_type}, expected a tensor")
    tensors = {name: a.shape for name, a in written.items() if isinstance(a, Tensor)}
    for name, value in found.items():
        if name not in tensors:
            raise ValueError(f"the reference names {name!r}, expected one of {', '.join(tensors)}")
        if value.shape != tensors[name]:
            raise ValueError(
                f"the reference's {name!r} has shape {tuple(value.shape)}, expected the "
                f"argument's: {tuple(tensors[name])}"
            )
    return found


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Floating numbers as ``dtype``, and complex ones as complex128; others as they are."""
    if t.is_complex():
        return t.to(torch.complex128)
    return t.to(dtype) if t.is_floating_point() else t.clone()


def _spoil(
    given: Mapping[str, object],
    right: Mapping[str, Tensor],
    again: Callable[[], Mapping[str, Tensor]],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Change elements that are right before the launch: a kernel may leave them out, unseen.

    The memory of `torch.empty` can hold an earlier result. It stays as it is if the reference then
    returns something else, or if the tensor is one number everywhere, to which the kernel may add.

    Returns:
        By name, the bytes of a tensor that was changed, and which of its elements were.
    """
    spoiled = {}
    for name, tensor in right.items():
        held = given[name]
        assert isinstance(held, Tensor)
        if not held.is_contiguous() or not held.numel():
            continue
        now, expected = _bytes(held), _bytes(tensor.to(held.dtype))
        is_right = (now == expected).all(1)
        if not is_right.any() or bool((now == now[0]).all()):
            continue
        kept = now.clone()
        now[is_right] ^= 1 if held.dtype == torch.bool else 0x41
        if any(not torch.equal(_bytes(a), _bytes(right[one])) for one, a in again().items()):
            now.copy_(kept)
        else:
            spoiled[name] = now.clone(), is_right
    return spoiled


def _bytes(t: Tensor) -> Tensor:
    """The bytes of each element, a row for each; of a contiguous tensor, its memory."""
    return t.contiguous().flatten().view(torch.uint8).view(-1, t.element_size())


def _compare_written(
    written: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    right: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    spoiled: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    storages = {written[name].untyped_storage().data_ptr() for name in right}
    for name in written.keys() - right.keys():
        if written[name].untyped_storage().data_ptr() in storages:
            continue  # its memory is that of a tensor that the reference names
        try:
            same_bits(written[name], before[name])
        except OutcomeException as e:
            message = f"{name}: has changed, and the reference does not name it"
            raise OutcomeException("wrong", message) from e
    operands = [t for name, t in before.items() if name not in right]
    for name, tensor in right.items():
        held = written[name]

        expected = tensor.to(held.dtype)
        try:
            if held.dtype.is_floating_point or held.dtype.is_complex:
                close(held, expected, exact[name], operands)
            else:
                same_bits(held, expected)
        except OutcomeException as e:
            message = f"{name}: {e.args[1]}"
            if name in spoiled:
                put, where = spoiled[name]
                if left := int(((_bytes(held) == put).all(1) & where).sum()):
                    message += (
                        f"; the kernel leaves out {left} of {held.numel()} elements, which were "
                        "right until the check changed them"
                    )
            raise OutcomeException("wrong", message) from e
