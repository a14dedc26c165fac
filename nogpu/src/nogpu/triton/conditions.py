# SPDX-License-Identifier: MIT
"""Assumptions, of ``tl.assume``, that are conditions on a kernel's scalar arguments alone.

They are read from the kernel's first stage, and evaluated for the arguments of each launch. So a
kernel needs no assertions as long as its assumptions are true.
"""

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Value = int | float  # an integer by its bits, without a sign

NAME = r"%[\w.$-]+"
FUNCTION = re.compile(r"^\s*tt\.func public @\S+?\((.*)$", re.MULTILINE)
ARGUMENT = re.compile(rf'({NAME}): (i\d+|f32|f64)(?: \{{[^}}]*\}})? loc\("(\w+)"')
ASSUME = re.compile(rf"^\s*llvm\.intr\.assume ({NAME}) : i1")
CONSTANT = re.compile(
    rf"^\s*({NAME}) = arith\.constant (?:(true|false)|(\S+) : (i\d+|f32|f64))(?: loc\(.*)?$"
)
OPERATION = re.compile(
    rf"^\s*({NAME}) = arith\.(cmpi|cmpf|\w+) (?:(\w+), )?({NAME}(?:, {NAME})*)"
    r"(?: overflow<[\w, ]+>)? : (i\d+|f32|f64)(?: to (i\d+))?(?: loc\(.*)?$"
)
# Names that a line defines: results, and the variables of loops and blocks.
RESULT = re.compile(rf"({NAME})(?::\d+)? = ")
VARIABLE = re.compile(rf"({NAME}): ")


def _signed(x: int, bits: int) -> int:
    return x - (x >> bits - 1 << bits)


def _quotient(x: int, y: int) -> int:
    """Towards zero, as C does."""
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


COMPARISONS = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
OF_SIGNED: dict[str, Callable[[int, int], int]] = {
    "divsi": _quotient,
    "remsi": lambda x, y: x - y * _quotient(x, y),
    "minsi": min,
    "maxsi": max,
}
OF_BITS: dict[str, Callable[[int, int], int]] = {
    "addi": operator.add,
    "subi": operator.sub,
    "muli": operator.mul,
    "divui": operator.floordiv,
    "remui": operator.mod,
    "minui": min,
    "maxui": max,
    "andi": operator.and_,
    "ori": operator.or_,
    "xori": operator.xor,
}


class Argument(NamedTuple):
    """A scalar argument: its place among the launch's, and its type."""

    place: int
    kind: str


class Step(NamedTuple):
    """An operation, and the numbers of its operands among all terms."""

    function: Callable[..., Value]
    operands: Sequence[int]


Term = Value | Argument | Step


class Conditions(NamedTuple):
    """All assumptions of a kernel.

    Attributes:
        terms: that the assumptions depend on, by their numbers; operands come first.
        assumed: the numbers of those that must be true.
    """

    terms: Mapping[int, Term]
    assumed: Sequence[int]

    def hold(self, arguments: Sequence[Any]) -> bool:
        """Whether all are true for the arguments of a launch, whatever its programs execute."""
        values: dict[int, Value] = {}
        try:
            for number, term in self.terms.items():
                if isinstance(term, Step):
                    values[number] = term.function(*[values[one] for one in term.operands])
                elif isinstance(term, Argument):
                    values[number] = _value(arguments[term.place], term.kind)
                else:
                    values[number] = term
        except ZeroDivisionError:
            return False
        return all(values[one] for one in self.assumed)


def conditions_of(text: str, names: Sequence[str]) -> Conditions | None:
    """Return a kernel's assumptions; None if one is no condition on scalar arguments alone.

    Args:
        text: of its first stage.
        names: of all its arguments.
    """
    if "llvm.intr.assume" not in text:
        return Conditions({}, [])
    head = FUNCTION.search(text)
    if head is None or text.count("tt.func ") > 1 or "ttg.warp_specialize" in text:
        return None  # functions, and the regions of specialized warps, have names of their own
    given = {
        name: Argument(names.index(source), kind)
        for name, kind, source in ARGUMENT.findall(head[1])
        if source in names
    }
    return _conditions(text[head.end() :].splitlines(), given)


def _conditions(lines: Iterable[str], given: Mapping[str, Term]) -> Conditions | None:
    terms = list(given.values())
    # A name is used again after its block, so that its last definition counts.
    known = {name: number for number, name in enumerate(given)}
    assumed: list[int] = []
    for line in lines:
        if match := ASSUME.match(line):
            if match[1] not in known:
                return None
            assumed.append(known[match[1]])
            continue
        term: Term | None = None
        if match := CONSTANT.match(line):
            term = _constant(match[2] or match[3], match[4] or "i1")
        elif match := OPERATION.match(line):
            term = _step(match, known)
        for name in RESULT.findall(line) + (VARIABLE.findall(line) if "^bb" in line else []):
            known.pop(name, None)
        if match is not None and term is not None:
            known[match[1]] = len(terms)
            terms.append(term)
    return Conditions(_needed(terms, assumed), assumed)


def _needed(terms: Sequence[Term], assumed: Iterable[int]) -> dict[int, Term]:
    """Return the terms that others depend on, by their numbers."""
    needed = set(assumed)
    for number in reversed(range(len(terms))):
        term = terms[number]
        if number in needed and isinstance(term, Step):
            needed.update(term.operands)
    return {number: terms[number] for number in sorted(needed)}


def _value(argument: Value, kind: str) -> Value:
    if kind[0] == "f":
        return float(np.float32(argument) if kind == "f32" else argument)
    bits: int = int(argument) % 2 ** int(kind[1:])
    return bits


def _constant(text: str, kind: str) -> Value:
    if text in ("true", "false"):
        return int(text == "true")
    if kind[0] == "i":
        return _value(int(text), kind)
    if text.startswith("0x"):
        size = int(kind[1:]) // 8
        return float(np.array(int(text, 16), f"u{size}").view(f"f{size}"))
    return float(np.float32(text)) if kind == "f32" else float(text)


def _step(match: re.Match[str], known: Mapping[str, int]) -> Step | None:
    """Return what an operation does with operands; None if that, or one of them, is not known."""
    _, what, how, given, kind, to = match.groups()
    operands = given.split(", ")
    if not set(operands) <= set(known):
        return None
    function = _of_floats(what, how) if kind[0] == "f" else _of_integers(what, how, kind, to)
    return None if function is None else Step(function, [known[one] for one in operands])


def _of_floats(what: str, how: str | None) -> Callable[..., Value] | None:
    """Of NaN only "une" is true, as in Python; the other comparisons are not what Python writes."""
    is_known = what == "cmpf" and how in ("oeq", "une", "olt", "ole", "ogt", "oge")
    return COMPARISONS[how[1:]] if is_known and how else None


def _of_integers(
    what: str, how: str | None, kind: str, to: str | None
) -> Callable[..., Value] | None:
    bits = int(kind[1:])
    if what == "cmpi" and how is not None:
        is_signed = how not in ("eq", "ne") and how[0] == "s"
        compare = COMPARISONS[how if how in ("eq", "ne") else how[1:]]
        return _with_signs(compare, bits) if is_signed else compare
    if what in OF_BITS or what in OF_SIGNED:
        function = OF_BITS[what] if what in OF_BITS else _with_signs(OF_SIGNED[what], bits)
        return lambda x, y: function(x, y) % 2**bits
    if what in ("extsi", "extui", "trunci") and to is not None:
        most = 2 ** int(to[1:])
        return lambda x: (_signed(x, bits) if what == "extsi" else x) % most
    return None


def _with_signs(function: Callable[[int, int], int], bits: int) -> Callable[[int, int], int]:
    return lambda x, y: function(_signed(x, bits), _signed(y, bits))
