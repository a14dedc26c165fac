# SPDX-License-Identifier: MIT
"""Declarations of kernels in CUDA C++: the names and the types of their parameters.

PTX has the sizes of parameters, and no names. The declarations improve messages, and let an array
of another type than its pointer's be refused. Limitation: only macros that name types are expanded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
ATTRIBUTE = re.compile(
    r"__(?:launch_bounds|cluster_dims|maxnreg|block_size)__\s*\((?:[^()]|\([^()]*\))*\)"
    r"|__attribute__\s*\(\((?:[^()]|\([^()]*\))*\)\)"
)
ALIGNMENT = re.compile(r"\b(?:__align__|alignas)\s*\([^()]*\)")
QUALIFIERS = ("const", "volatile", "__restrict__", "__restrict", "struct", "__grid_constant__")
SPACES = ("static", "extern", "__constant__", "__device__")  # before the type of a variable
# Types of NumPy, by those of C++
DTYPES = {
    "float": "float32",
    "double": "float64",
    "int": "int32",
    "signed": "int32",
    "unsigned": "uint32",
    "unsigned int": "uint32",
    "uint": "uint32",
    "short": "int16",
    "unsigned short": "uint16",
    "short int": "int16",
    "unsigned short int": "uint16",
    "long int": "int64",
    "unsigned long int": "uint64",
    "long long": "int64",
    "long long int": "int64",
    "unsigned long long": "uint64",
    "unsigned long long int": "uint64",
    "long": "int64",
    "unsigned long": "uint64",
    "size_t": "uint64",
    "char": "int8",
    "signed char": "int8",
    "unsigned char": "uint8",
    "bool": "bool",
    "half": "float16",
    "__half": "float16",
    "__nv_bfloat16": "bfloat16",
    "nv_bfloat16": "bfloat16",
    **{f"{kind}{bits}_t": f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
}


def blank(text: str | re.Match[str]) -> str:
    """Return as many spaces, with the text's ends of lines, so that other code keeps its place."""
    return re.sub(r"[^\n]", " ", text if isinstance(text, str) else text[0])


class Declared(NamedTuple):
    """A parameter as the source has it.

    Attributes:
        name: "" if the source gives none.
        type: in C++ without qualifiers, such as "float*".
    """

    name: str
    type: str

    @property
    def is_pointer(self) -> bool:
        return self.type.endswith("*")

    @property
    def dtype(self) -> str:
        """The elements' type in NumPy, or that of a number; "" if it is not known."""
        return DTYPES.get(self.type.rstrip("* "), "")


class Declaration(NamedTuple):
    """A kernel as the source has it.

    Attributes:
        template: its template parameters as text; "" if it is not a template.
    """

    name: str
    parameters: list[Declared]
    line: int
    template: str

    @property
    def instance(self) -> str:
        """A name expression of the kernel; of a template one of its instances, as an example."""
        if not self.template:
            return self.name
        given = [
            "float" if re.match(r"\s*(?:typename|class)\b", one) else "16"
            for one in self.template.split(",")
        ]
        return f"{self.name}<{', '.join(given)}>"


def declarations(source: str) -> list[Declaration]:
    """Return the kernels of a source, in its order."""
    text = COMMENT.sub(blank, source)
    text = ATTRIBUTE.sub(lambda m: " " * len(m[0]), text)
    found = []
    for match in re.finditer(r"__global__[^;{}()]*?\b(\w+)\s*\(", text):
        inside, end = [""], match.end()
        depth = 1
        while depth and end < len(text):
            sign = text[end]
            depth += {"(": 1, "<": 1, "[": 1, ")": -1, ">": -1, "]": -1}.get(sign, 0)
            if sign == "," and depth == 1:
                inside.append("")
            elif depth:
                inside[-1] += sign
            end += 1
        parameters = [_declared(one) for one in inside if one.strip() not in ("", "void")]
        before = text[: match.start()].rstrip()
        template = re.search(r"template\s*<([^;{}]*)>\s*(?:static\s*|inline\s*)*$", before)
        line = text.count("\n", 0, match.start(1)) + 1
        found.append(
            Declaration(
                match[1], parameters, line, " ".join(template[1].split()) if template else ""
            )
        )
    return found


@lru_cache(64)
def own_types(source: str) -> dict[str, str]:
    """Return what the source's own names of types stand for: by typedef, using and #define.

    A name that the source gives two meanings, as by #ifdef, is omitted.
    """
    text, kind = COMMENT.sub(blank, source), r"((?:[A-Za-z_][\w:]*[ \t]*)+?)"
    found: dict[str, set[str]] = {}
    pairs = [(name, of) for of, name in re.findall(rf"\btypedef\s+{kind}\s+(\w+)\s*;", text)]
    pairs += re.findall(rf"\busing\s+(\w+)\s*=\s*{kind}\s*;", text)
    macro = rf"#[ \t]*define[ \t]+(\w+)[ \t]+{kind}[ \t]*$"
    pairs += re.findall(macro, text, re.MULTILINE)
    for name, of in pairs:
        found.setdefault(name, set()).add(" ".join(of.split()))
    return {name: kinds.pop() for name, kinds in found.items() if len(kinds) == 1}


def parameters_of(declared: Declaration, instance: str, types: Mapping[str, str]) -> list[Declared]:
    """Return a kernel's parameters with the types that its instance gives them.

    Args:
        instance: such as "scale<float, 3>"; the name alone if the kernel is no template.
        types: what other names of types stand for, as `own_types` returns it.
    """
    types = dict(types)
    given = _declarators(instance.partition("<")[2].rpartition(">")[0])
    for i, one in enumerate(declared.template.split(",") if declared.template else ()):
        if match := re.match(r"\s*(?:typename|class)\s+(\w+)\s*(?:=\s*(.+))?$", one):
            value = given[i] if i < len(given) and given[i] else match[2] or ""
            types[match[1]] = " ".join(value.split())

    def resolved(one: Declared) -> Declared:
        kind, stars = one.type.rstrip("*"), one.type.count("*")
        for _ in types:  # a name may stand for another one
            kind = " ".join(w for w in types.get(kind, kind).split() if w not in QUALIFIERS)
        return Declared(one.name, kind + "*" * stars)

    return [resolved(one) for one in declared.parameters]


def _declared(text: str) -> Declared:
    text = text.partition("=")[0]
    arrays = text.count("[")
    text = re.sub(r"\[[^\]]*\]", "", text).replace("*", " * ")
    words = [one for one in text.split() if one not in QUALIFIERS]
    name = ""
    is_name = len(words) > 1 and re.match(r"[A-Za-z_]\w*$", words[-1])
    if is_name and words[-1] not in ("int", "char", "long", "short", "double", "float"):
        name = words.pop()
    stars = words.count("*") + arrays
    return Declared(name, " ".join(one for one in words if one != "*") + "*" * stars)


SIZES = {"bool": 1, "bfloat16": 2}  # bytes, of types that NumPy's names do not tell


def itemsize(dtype: str) -> int:
    """Return the bytes of a number of a type of NumPy, or of bfloat16."""
    return SIZES.get(dtype) or int(re.sub(r"\D", "", dtype)) // 8


def kind_of_number(dtype: str) -> str:
    """Return the type in PTX of a parameter that is a number of a type of NumPy."""
    if dtype in ("float16", "bfloat16"):
        return "b8"  # a structure of two bytes
    return f"{'f' if dtype in ('float32', 'float64') else 'u'}{8 * itemsize(dtype)}"


class Field(NamedTuple):
    """A field of a structure: where it begins, its bytes, and its type in PTX."""

    declared: Declared
    offset: int
    size: int
    kind: str


class Structure(tuple[Field, ...]):
    """The fields of a structure, as C++ places them."""

    __slots__ = ()

    @property
    def size(self) -> int:
        """The bytes of the structure."""
        most = max((one.size for one in self), default=1)
        end = max((one.offset + one.size for one in self), default=0)
        return -(-end // most) * most


@lru_cache(64)
def structures(source: str) -> dict[str, Structure]:
    """Return the structures of a source by name.

    Those with other fields than numbers and pointers are omitted, and so are names that have
    several structures.
    """
    text = COMMENT.sub("", source)
    found: dict[str, Structure | None] = {}
    for match in re.finditer(r"\bstruct\s*(\w*)\s*\{([^{}]*)\}\s*(\w*)", text):
        # "struct Name {...}" and "typedef struct {...} Name"
        for name in {match[1], match[3]} - {""}:
            fields = _fields(match[2])
            found[name] = fields if found.get(name, fields) == fields else None
    return {name: fields for name, fields in found.items() if fields is not None}


def _fields(inside: str) -> Structure | None:
    found: list[Field] = []
    end = 0
    for line in filter(str.strip, inside.split(";")):
        first, *others = line.split(",")
        one = _declared(first)
        kind = one.type.rstrip("*")
        for declared in (one, *(_declared(f"{kind} {text}") for text in others)):
            known = declared.is_pointer or declared.dtype
            if not declared.name or not known or re.search(r"[\[\](:]", line):
                return None
            size = 8 if declared.is_pointer else itemsize(declared.dtype)
            end = -(-end // size) * size
            kind_of_ptx = "u64" if declared.is_pointer else kind_of_number(declared.dtype)
            found.append(Field(declared, end, size, kind_of_ptx))
            end += size
    return Structure(found)


Sizes = tuple[int, ...]


@lru_cache(64)
def shared_arrays(
    source: str, bytes_of: tuple[tuple[str, int], ...]
) -> dict[str, tuple[int, Sizes]]:
    """Return the bytes of an element and the sizes of a kernel's arrays in shared memory, by name.

    Arrays are omitted whose sizes are not known, or do not make the array's bytes. So are those of
    which several declarations do.

    Args:
        bytes_of: the names and the bytes of the kernel's arrays.
    """
    found: dict[str, set[tuple[int, Sizes]]] = {}
    for name, kind, given in _variables(source, "shared"):
        sizes = [_size(one, source) for one in given]
        if None not in sizes:
            one = itemsize(DTYPES[kind]), tuple(size or 0 for size in sizes)
            if one[0] * math.prod(one[1]) == dict(bytes_of).get(name):
                found.setdefault(name, set()).add(one)
    return {name: kinds.pop() for name, kinds in found.items() if len(kinds) == 1}


def _size(text: str, source: str) -> int | None:
    """Return a sum of products of numbers, and of names that the source gives one number each."""
    source = COMMENT.sub("", source)

    def number_of(name: re.Match[str]) -> str:
        word, number = re.escape(name[0]), r"(\d+)[uUlL]*"
        macro = rf"#[ \t]*define[ \t]+{word}[ \t]+\(?{number}\)?[ \t]*$"
        given = re.findall(macro, source, re.MULTILINE)
        constant = rf"\b(?:const|constexpr)\b[^;(){{}}]*?\b{word}\s*=\s*{number}\s*[;,]"
        given += re.findall(constant, source)
        return given[0] if len(set(given)) == 1 else name[0]

    text = re.sub(r"[A-Za-z_]\w*", number_of, text)
    if re.fullmatch(r"\s*\d+(?:\s*[+*]\s*\d+)*\s*", text) is None:
        return None
    return sum(math.prod(int(n) for n in one.split("*")) for one in text.split("+"))


@lru_cache(64)
def variable_types(source: str) -> dict[str, str]:
    """Return the types, in C++, of the elements of variables in constant and global memory.

    They are by the variables' names without namespaces. Those whose elements are no numbers are
    omitted, and so are those that several namespaces have with different types.
    """
    found: dict[str, set[str]] = {}
    for name, kind, _ in _variables(source, "constant|device"):
        found.setdefault(name, set()).add(kind)
    return {name: kinds.pop() for name, kinds in found.items() if len(kinds) == 1}


def _variables(source: str, spaces: str) -> Iterator[tuple[str, str, list[str]]]:
    """Yield the name, the type in C++ and the sizes of each variable whose elements are numbers.

    Args:
        spaces: where the variables are, such as "constant|device".
    """
    for match in re.finditer(rf"\b__(?:{spaces})__\s+(?=([^;]*);)", COMMENT.sub("", source)):
        first, *others = _declarators(ALIGNMENT.sub("", match[1]))
        words = re.fullmatch(r"([^()]*?)(\b[A-Za-z_]\w*\s*(?:\[[^\]]*\]\s*)*)", first)
        if words is None:
            continue
        kind = " ".join(one for one in words[1].split() if one not in (*QUALIFIERS, *SPACES))
        for one in (words[2], *others):
            name = re.fullmatch(r"(\w+)\s*((?:\[[^\]]*\]\s*)*)", one)
            if name is not None and kind in DTYPES:
                yield name[1], kind, re.findall(r"\[\s*([^\]]*?)\s*\]", name[2])


def _declarators(text: str) -> list[str]:
    """Return the parts of a declaration between its commas, without their initial values."""
    parts, depth = [""], 0
    for sign in text:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(sign, 0)
        if sign == "," and not depth:
            parts.append("")
        else:
            parts[-1] += sign
    return [re.split("[={]", one)[0].strip() for one in parts]
