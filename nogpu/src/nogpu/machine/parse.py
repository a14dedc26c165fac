# SPDX-License-Identifier: MIT
"""Parse the text of a PTX kernel into instructions whose operands are numbered registers."""

import inspect
import itertools
import math
import re
import signal
import struct
import traceback
from bisect import bisect
from collections import ChainMap
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

# Kinds of registers, by their sizes. Instructions take 8 bits from registers of 16 bits, too.
REGISTERS = {"pred": "pred"} | {
    name: kind
    for kind, names in {
        "u16": "b8 u8 s8 b16 u16 s16 f16 bf16",
        "u32": "b32 u32 s32 f32 f16x2 bf16x2",
        "u64": "b64 u64 s64 f64 f32x2",
    }.items()
    for name in names.split()
}
IGNORED = re.compile(r"//.*$|^\s*\.(?:loc|file|pragma|section)\b.*$", re.MULTILINE)
# A brace, a label, or a statement, whose vectors have braces, too.
STATEMENT = re.compile(r"\s*(?:([{}])|([\w$]+):(?!:)|([^;{}]*(?:\{[^}]*\}[^;{}]*)*);)")
STACK = re.compile(r"([\w$]+)\[(\d+)\]")
SHARED_BASE = 1024  # not 0, so that an offset that is taken for an address is noticed
# A variable of the module, or of a function in shared memory: its space, its alignment, the type of
# its elements, its name, how many they are, and its initial value.
VARIABLE = re.compile(
    r"\.(global|const|shared)\s+(?:\.attribute\([^)]*\)\s*)?(?:\.align\s+(\d+)\s+)?\.(\w+)\s+"
    r"([\w$]+)((?:\[\d*\])*)\s*(?:=\s*(\{[^}]*\}|[^;{]+))?;"
)
STATIC_BASE = 2**21  # of variables in shared memory, behind all that a launch can ask for
STATIC_GAP = 2**16  # between them, so that an index beyond one does not find the next one
ORDERS = {"relaxed", "acquire", "release", "acq_rel"}
# What does not change an access to memory: hints for caches, and scopes.
HINTS = {"ca", "cg", "cs", "cv", "lu", "wb", "wt", "nc", "weak", "cta", "gpu", "sys", "noftz"}
DECIMAL = re.compile(r"-?\d+(?:\.\d*(?:[eE][-+]?\d+)?|[eE][-+]?\d+)$")
# A function of the module, up to its body; a sequence that calls one; and the call.
FUNCTION = re.compile(r"\.func\s*(?:\(([^)]*)\)\s*)?([\w$]+)\s*\(([^)]*)\)[^{;]*\{")
SEQUENCE = re.compile(r"\{\s*// callseq.*?\}\s*// callseq|\{\s*@\{.*?\}\s*@\}", re.DOTALL)
MARK = re.compile(r"([{}])\s*// callseq[^\n]*")  # it becomes "{ @{" in the body of a function
PART = re.compile(r"\b(?:st|ld)\.param(?:\.v\d[^;]*?\[\s*([\w$]+)|\b[^;]*?\[\s*([\w$]+)\s*\+)")
CALL = re.compile(r"\bcall(?:\.uni)?\s*(?:\(([\w$]+)\),\s*)?([\w$]+),\s*\(([^)]*)\);")
BYTES = re.compile(r"\.param\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[([1248])\]")
ARRAY = re.compile(r"\.param\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\d+\]")
ANY_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr[^,\n]*?\s)?([\w$]+)(?:\[(\d+)\])?\s*(?=,|$|\))",
    re.MULTILINE,
)
PARAMETER = re.compile(r"\.param\s+\.(\w+)\s+([\w$]+)")
STORE_PARAMETER = re.compile(r"\bst\.param\.(\w+)\s*\[([\w$]+)\],\s*([^;]+);")
LOAD_PARAMETER = re.compile(r"\bld\.param\.(\w+)\s*([^,;]+),\s*\[([\w$]+)\];")
OPERAND = re.compile(r"\[[^\]]*\]|\{[^}]*\}|[^,\s|]+(?:\s*\+\s*\w+)?")
# 4.5.1 of the PTX ISA: hexadecimal, binary, octal and decimal integers
INTEGER = re.compile(r"(-?)(?:0[xX]([\da-fA-F]+)|0[bB]([01]+)|(0[0-7]*)|([1-9]\d*))U?$")
BASES = (16, 2, 8, 10)


@dataclass(frozen=True)
class Register:
    index: int
    kind: str


@dataclass(frozen=True)
class Constant:
    bits: int


@dataclass(frozen=True)
class Symbol:
    """A special register such as %tid.x, the shared memory `global_smem`, a parameter, or a
    label."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Address:
    """``[base + offset]``, or of a tensor ``[base, {coordinates}]``."""

    base: "Register | Constant | Symbol"
    offset: int
    coordinates: list[Any]


Source = tuple[str, int] | None  # a file of the user's Python, and a line
EVERY_THREAD = Constant(-1), Constant(0xFFFFFFFF)  # of a warp, as a mask


def integer(text: str) -> int | None:
    """Return the value of an integer, or None if ``text`` is none."""
    match = INTEGER.match(text.strip())
    if match is None:
        return None
    sign, *digits = match.groups()
    size = next(int(one, base) for one, base in zip(digits, BASES, strict=True) if one)
    return -size if sign else size


def flat(operand: object) -> list[Any]:
    return operand if isinstance(operand, list) else [operand]


@dataclass
class Instruction:
    """``@guard opcode operands``; a guard that must be false is ``negated``. A vector is a list."""

    line: int
    opcode: str
    operands: list[Any]
    guard: Register | None
    negated: bool
    target: int = -1  # of a branch
    table: list[int] = field(default_factory=list)  # targets of a branch by an index
    source: Source = None
    # What `machine` adds: how a warp executes it, whether only as a whole, and what it writes
    run: Callable[..., object] | None = None
    whole: bool = False
    writes: list[int] = field(default_factory=list)

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")

    @property
    def registers(self) -> list[Register]:
        all_of_them = [self.guard, *(one for operand in self.operands for one in flat(operand))]
        return [
            one for each in all_of_them if isinstance(one := getattr(each, "base", each), Register)
        ]


@dataclass(frozen=True)
class Parameter:
    """A parameter of a kernel: its name in PTX, its type there, and its bytes."""

    name: str
    kind: str
    size: int


@dataclass
class Kernel:
    text: str
    threads: int
    parameters: list[str]
    cluster: tuple[int, int, int] = (1, 1, 1)  # of blocks
    instructions: list[Instruction] = field(default_factory=list)
    registers: list[str] = field(default_factory=list)  # their kinds
    constants: dict[str, bytes] = field(default_factory=dict)  # texts, in global memory
    signature: list[Parameter] = field(default_factory=list)
    # Of CUDA C++ the threads of a block in each dimension, whose warps may diverge in any way;
    # None: all threads of a warp take the same way, but for short branches, as Triton's do.
    block: tuple[int, int, int] | None = None
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)  # addresses and sizes
    # It has atomicCAS, whose loops begin with a plain load of what others change by atomics.
    swaps: bool = False
    dynamic_shared: str = ""  # the name of the array whose size a launch gives
    locals: dict[str, int] = field(default_factory=dict)  # offsets in a thread's stack
    local_bytes: int = 0  # of a thread's stack
    program: Any = None  # for the core in C
    slots: Any = None  # of the counters
    # When they are first asked: the origins of addresses, and what writes each register.
    origins: dict[int, set[str]] | None = None
    definitions: dict[int, list[Instruction]] | None = None
    file: str = ""  # of the kernel's source
    controls_grids: bool = False  # by griddepcontrol
    most_threads: int = 0  # of a block, by __launch_bounds__; 0: as many as a GPU takes
    required_block: tuple[int, int, int] | None = None  # by __block_size__ of CUDA C++


def qualifiers(i: Instruction) -> tuple[list[str], str, bool]:
    """Split an access's parts: what is left but hints, its order, and whether it is in `shared`."""
    order, shared, rest = "", False, []
    for part in i.parts[1:]:
        if part in ORDERS or part == "volatile":
            order = part
        elif part.partition("::")[0] in ("L1", "L2", "evict_first") or part in HINTS:
            continue
        elif part.partition("::")[0] == "shared":
            shared = True
        elif part not in ("global", "const"):
            rest.append(part)
    return rest, order, shared


UNKNOWN = "unknown instruction"
BY_POINTER = (
    "pointers to functions, and virtual functions, are not executed here; choose the function by "
    "a condition, or by a template's parameter"
)


class PtxError(Exception):
    """A fault of the program that is executed, with its line, its reason and its name."""

    def __init__(self, line: int, reason: str, name: str = "invalid operation"):
        super().__init__(f"line {line}: {reason}")
        self.line, self.reason, self.name = line, reason, name
        self.program: tuple[int, ...] = ()  # that was executed


def own_error(error: Exception, line: int = 0) -> PtxError:
    """Return the fault for an error of the executor's own, so that no report is without it.

    Raises:
        Exception: ``error`` itself, if a signal handler of the program has raised it.
    """
    if is_of_handler(error):
        raise error
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(last.filename).name}:{last.lineno}"
    reason = f"the executor ends with {type(error).__name__}: {error} ({where})"
    return PtxError(line, reason, "error of the executor")


def is_of_handler(error: Exception) -> bool:
    """Whether a signal handler has raised an error: Python calls it wherever the program is."""
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    callables = [inspect.unwrap(one) for one in handlers if callable(one)]
    callables = [getattr(one, "func", one) for one in callables]  # of functools.partial
    called = [one if hasattr(one, "__code__") else type(one).__call__ for one in callables]
    codes = {code for one in called if (code := getattr(one, "__code__", None)) is not None}
    return any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__))


class Sources:
    """Files and lines of the Python source, by ``.file`` and ``.loc``.

    Where a function of Triton's own package was inlined, the line of its caller counts. LLVM counts
    the lines of inline assembly on from that of its statement, so that these are left out.
    """

    ASSEMBLY = re.compile(r"// begin inline asm.*?// end inline asm", re.DOTALL)

    FILE = re.compile(r'^[ \t]*\.file\s+(\d+)\s+"([^"]*)"', re.MULTILINE)
    LINE = re.compile(
        r"^[ \t]*\.loc\s+(\d+)\s+(\d+)\s+(\d+)(?:.*inlined_at\s+(\d+)\s+(\d+)\s+(\d+))?",
        re.MULTILINE,
    )

    def __init__(self, text: str):
        self.files = {int(number): path for number, path in self.FILE.findall(text)}
        self.callers: dict[tuple[int, ...], tuple[int, ...]] = {}
        self.starts: list[int] = []
        self.found: list[tuple[str, int] | None] = []
        plain = self.ASSEMBLY.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
        for match in self.LINE.finditer(plain):
            numbers = [int(one) for one in match.groups() if one is not None]
            place = tuple(numbers[:3])
            if len(numbers) > 3:
                self.callers[place] = tuple(numbers[3:])
            self.starts.append(match.start())
            self.found.append(self._resolve(place))

    def _resolve(self, place: tuple[int, ...]) -> tuple[str, int] | None:
        seen = set()
        while self._is_of_triton(place) and place in self.callers and place not in seen:
            seen.add(place)
            place = self.callers[place]
        file, line, _ = place
        return (self.files[file], line) if file in self.files and line else None

    def _is_of_triton(self, place: tuple[int, ...]) -> bool:
        path = self.files.get(place[0], "").replace("\\", "/")
        return (
            "/triton/language/" in path
            or "/triton/experimental/" in path
            or "/site-packages/nvidia/" in path
            or path.endswith("/__nv_nvrtc_builtin_header.h")
        )

    @property
    def of_head(self) -> str:
        """The file of the kernel's head, which has the first line."""
        first = self.found[0] if self.found else None
        return "" if first is None else first[0]

    def at(self, position: int) -> tuple[str, int] | None:
        """Return the file and the line of the statement at a position of the text."""
        index = bisect(self.starts, position) - 1
        return self.found[index] if index >= 0 else None


def inline(text: str) -> str:
    """Replace calls of functions that the module has by their bodies; lines keep their numbers.

    Parameters become registers, and structures lie in local memory. Limitation: a function that
    calls itself stays a call.
    """
    text = re.sub(r"(\b(?:st|ld)\.param\b[^;]*?\[\s*[\w$]+)\s*\+\s*0\s*\]", r"\1]", text)
    of_calls = (
        "param",
        "retval",
        "func_",
        *(f"{one[2]}_param_" for one in FUNCTION.finditer(text)),
    )
    # A parameter of so many bytes, as the structures of ConSan are, is one number, unless one is
    # stored or loaded by its parts, under the name that the caller or the function gives it.
    parts = {one for found in PART.findall(text) for one in found if one.startswith(of_calls)}
    if not parts:
        text = BYTES.sub(
            lambda match: (
                f".param .b{8 * int(match[2])} {match[1]}"
                if match[1].startswith(of_calls)
                else match[0]
            ),
            text,
        )
    functions: dict[str, tuple[str, str, str]] = {}
    for match in FUNCTION.finditer(text):
        depth, end = 1, match.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        result, name, parameters = match.groups("")
        marked = MARK.sub(r"\1 @\1", text[match.end() : end - 1])
        body = IGNORED.sub("", marked).replace("\n", " ")
        functions[name] = result, parameters, body

    count = itertools.count()

    def expand(sequence: re.Match[str], callers: tuple[str, ...] = ()) -> str:
        code = sequence[0]
        call = CALL.search(code)
        if call is None or call[2] not in functions or call[2] in callers:
            return code
        inner_callers = *callers, call[2]
        result, parameters, body = functions[call[2]]
        body = SEQUENCE.sub(lambda inner: expand(inner, inner_callers), body)
        body = body.replace("@{", "").replace("@}", "")
        # Structures: the caller's variable is that of the function, too.
        arrays = ARRAY.findall(code)
        given = [one.strip() for one in call[3].split(",") if one.strip()]
        own = [one[2] for one in ANY_PARAMETER.findall(parameters)]
        own_result = [one[2] for one in ANY_PARAMETER.findall(result)]
        pairs = [*zip(own, given, strict=True), *((one, call[1]) for one in own_result)]
        for mine, theirs in pairs:
            if theirs in arrays:
                name = f"{theirs}$in_memory{next(count)}"
                body = _in_memory(body, mine, name)
                code = _in_memory(code, theirs, name)
                result, parameters = (ARRAY.sub("", one) for one in (result, parameters))
        call = CALL.search(code)
        assert call is not None
        moves = [
            f"mov.{kind} {mine}, {theirs};"
            for kind, mine in PARAMETER.findall(parameters)
            for theirs in (dict(pairs)[mine],)
        ]
        declared = PARAMETER.findall(result) + PARAMETER.findall(parameters)
        body = re.sub(r"\bret(?:\.uni)?;", "bra $L_returned;", _moved(body))
        last = [f"mov.{kind} {call[1]}, {name};" for kind, name in PARAMETER.findall(result)]
        registers = [f".reg .{kind} {name};" for kind, name in declared]
        inner = " ".join(["{", *registers, *moves, body, "$L_returned:", *last, "}"])
        return _moved(PARAMETER.sub(r".reg .\1 \2", code.replace(call[0], inner)))

    return SEQUENCE.sub(expand, text) if functions else text


def _in_memory(code: str, name: str, new: str) -> str:
    """Let a parameter be a variable in local memory with another name."""
    mine = re.escape(name)
    code = re.sub(
        rf"\b(st|ld)\.param(\.[^;\[]*\[)\s*{mine}(?![\w$])",
        lambda found: f"{found[1]}.local{found[2]}{new}",
        code,
    )
    return re.sub(
        rf"\.param(\s+\.align\s+\d+\s+\.b8\s+){mine}(?=\[)",
        lambda found: f".local{found[1]}{new}",
        code,
    )


def _moved(code: str) -> str:
    """Let parameters be registers."""
    code = STORE_PARAMETER.sub(r"mov.\1 \2, \3;", code)
    return LOAD_PARAMETER.sub(r"mov.\1 \2, \3;", code)


def _numbers(kind: str, given: str) -> bytes:
    """Return the bytes of a variable's initial value.

    Raises:
        ValueError: it has an address of another variable.
    """
    size = max(int(re.sub(r"\D", "", kind) or 8) // 8, 1)
    found = b""
    for one in given.strip("{} \n\t").split(","):
        text = one.strip()
        if not text:
            continue
        if re.match(r"0[fFdD][0-9A-Fa-f]+$", text):
            number: int | None = int(text[2:], 16)
        else:
            number = integer(text)
        if number is None:
            raise ValueError(text)
        found += (number % 2 ** (8 * size)).to_bytes(size, "little")
    return found


def _take_variables(kernel: Kernel, text: str, used: str) -> None:
    """Note the variables that ``used`` names: their contents, or their places in shared memory."""
    end = STATIC_BASE
    for space, align, kind, name, sizes, given in VARIABLE.findall(text):
        if not re.search(rf"(?<![\w$]){re.escape(name)}(?![\w$])", used):
            continue
        size = _size(kind, sizes)
        if space == "shared":
            if name == "global_smem" or name in kernel.shared:
                continue
            if not size:
                kernel.dynamic_shared = name
                continue
            end = -(-end // max(int(align or 1), 128)) * max(int(align or 1), 128)
            kernel.shared[name] = end, size
            end += size + STATIC_GAP
            continue
        if not (given or kernel.block):
            continue
        try:  # zeros at the end are left out, as in C
            kernel.constants[name] = _numbers(kind, given).ljust(size, b"\0")
        except ValueError:
            continue  # the executor does not know the operand, if it is executed


def variable_sizes(text: str, unset_in: str = "") -> dict[str, int]:
    """Return the bytes of a module's variables in constant and global memory, by name.

    ``unset_in``: only those of this space, "const" or "global", without an initial value.
    """
    return {
        name: _size(kind, sizes)
        for space, _, kind, name, sizes, given in VARIABLE.findall(text)
        if (space == unset_in and not given if unset_in else space != "shared")
    }


def _size(kind: str, sizes: str) -> int:
    counts = [int(one or 0) for one in re.findall(r"\[(\d*)\]", sizes)]
    return max(int(re.sub(r"\D", "", kind) or 8) // 8, 1) * math.prod(counts)


# Of mangled names: the length of a part, what the arguments of a template consist of, and how
# namespaces without a name begin
PART_OF_NAME = re.compile(r"L?(\d+)")
ARGUMENT = re.compile(
    r"L[a-z]n?\d+E|S(?:[0-9A-Z]*_|[a-z])|T\d*_|A\d+_|(\d+)|([INXJF])|(E)|[A-Za-z]"
)
UNNAMED = ("_INTERNAL_", "_GLOBAL__N_")


def source_name(name: str) -> str:
    """Return the name in CUDA C++ of a variable or a function, such as "space::name".

    A mangled name that tells it in another way is returned as it is.
    """
    if name.startswith("_ZZ"):  # a variable of a function
        for found in re.finditer(r"(?=E(\d+)([A-Za-z_]\w*)$)", name):
            length = int(found[1])
            if re.fullmatch(r"(?:_\d*_?)?", found[2][length:]) and length <= len(found[2]):
                return found[2][:length]
        return name
    if (begin := re.match(r"_Z(NK?)?", name)) is None:
        return name
    parts, at = list[str](), begin.end()
    while part := PART_OF_NAME.match(name, at):
        at = part.end() + int(part[1])
        parts.append(name[part.end() : at])
        if not begin[1]:
            break
        if name.startswith("I", at):
            at = _after_arguments(name, at)
    if at > len(name) or (begin[1] and name[at : at + 1] != "E"):
        return name
    return "::".join(one for one in parts if not one.startswith(UNNAMED)) or name


def _after_arguments(name: str, at: int) -> int:
    """Return where the arguments of a template end that begin at a place of a mangled name."""
    depth = 0
    while found := ARGUMENT.match(name, at):
        length, begins, ends = found.groups("")
        at = found.end() + int(length or 0)
        depth += bool(begins) - bool(ends)
        if not depth:
            break
    return at


def why_no_operand(kernel: Kernel, name: str) -> str:
    """Say that a symbol is a function, or a table of virtual functions, whose address the kernel
    takes; "" for another symbol."""
    functions = {one[2] for one in FUNCTION.finditer(kernel.text)}
    return f": {BY_POINTER}" if name.startswith("_ZTV") or name in functions else ""


def entries(text: str) -> list[str]:
    """Return the names of the kernels of a module."""
    return re.findall(r"^\s*(?:\.\w+\s+)*\.entry\s+([\w$]+)", text, re.MULTILINE)


def _head(text: str, entry: str) -> re.Match[str]:
    """Return the name, the parameters and the directives of a kernel, by default the first one."""
    name = re.escape(entry) if entry else r"[\w$]+"
    head = re.search(rf"\.entry\s+{name}\s*\(([^)]*)\)\s*(?:\.\w+(?:\s+[\d, ]+)?\s*)*", text)
    assert head is not None
    return head


def _most_threads(head: str) -> int:
    most = re.search(r"\.maxntid\s+([\d, ]+)", head)
    return math.prod(int(one) for one in most[1].split(",")) if most else 0


@lru_cache(256)
def most_threads(text: str, entry: str) -> int:
    """Return the threads that a kernel promises to have at most in a block; 0: it does not."""
    return _most_threads(_head(text, entry)[0])


def parse(  # noqa: C901, PLR0912, PLR0915  # a case for each kind of statement
    text: str, entry: str = "", block: tuple[int, int, int] | None = None
) -> Kernel:
    """The kernel ``entry`` of ``text``, by default the first one.

    ``block``: the threads of a block of CUDA C++; by default the text has their number.

    Registers and labels of inner blocks ``{ … }``, which inline assembly has, hide those of outer
    ones. Calls of other functions of ``text`` are replaced by their bodies, in the calls' lines.
    """
    whole, text = text, inline(text)
    head = _head(text, entry)
    threads = re.search(r"\.reqntid\s+(\d[\d, ]*)", head[0])
    required = [int(one) for one in threads[1].split(",")] if threads else [0]
    kernel = Kernel(
        whole,
        required[0],
        re.findall(r"([\w$]+)(?:\[\d+\])?\s*(?:,|$)", head[1]),
        _cluster(head[0]),
    )
    kernel.signature = [
        Parameter(name, kind, int(re.sub(r"\D", "", kind) or 8) // 8 * int(count or 1))
        for _, kind, name, count in ANY_PARAMETER.findall(head[1])
    ]
    kernel.most_threads = _most_threads(head[0])
    if block is not None:
        x, y, z = [*required, 1, 1][:3]
        kernel.required_block = (x, y, z) if threads else None
        kernel.block, kernel.threads = block, -(-math.prod(block) // 32) * 32
    _take_variables(kernel, text, text[head.end() : _end_of_body(text, head.end())])
    code = IGNORED.sub(lambda match: " " * len(match[0]), text)
    ends = [match.start() for match in re.finditer("\n", text)]
    sources = Sources(text)
    kernel.file = sources.of_head
    scope: ChainMap[str, Any] = ChainMap()
    for name, (address, _) in kernel.shared.items():
        scope[name] = Constant(address)
    if kernel.dynamic_shared:
        scope[kernel.dynamic_shared] = Constant(SHARED_BASE)
    branches: list[tuple[Instruction, ChainMap[str, Any]]] = []
    for match in STATEMENT.finditer(code, head.end()):
        brace, label, statement = match.groups("")
        if brace == "{":
            scope = scope.new_child()
        elif brace == "}":
            scope = scope.parents
            if len(scope.maps) == 1:
                break
        elif label:
            scope[label] = len(kernel.instructions)
        elif statement.startswith(".reg"):
            _declare(statement, kernel, scope, bisect(ends, match.start(3)) + 1)
        elif statement.startswith(".local"):
            name, size = STACK.findall(statement)[0]
            if name not in kernel.locals:  # or a function is called several times
                kernel.locals[name] = kernel.local_bytes
                kernel.local_bytes += -(-int(size) // 16) * 16
        elif statement.startswith(".shared"):
            continue
        elif statement:
            line = bisect(ends, match.start(3)) + 1
            try:
                instruction = _instruction(statement, scope, line)
            except AssertionError as e:
                raise PtxError(line, f"the executor cannot parse {statement!r}", UNKNOWN) from e
            instruction.source = sources.at(match.start(3))
            if instruction.opcode.startswith("ld.param.v"):
                kernel.instructions += _loads_of_parameter(instruction)
                continue
            kernel.instructions.append(instruction)
            if instruction.parts[0] in ("bra", "brx"):
                branches.append((instruction, scope))
    for branch, scope in branches:
        if branch.parts[0] == "bra":
            branch.target = scope[branch.operands[0].name]
            continue
        table = kernel.instructions[scope[branch.operands[1].name]]
        branch.table = [scope[label.name] for label in table.operands]
    return kernel


def _end_of_body(text: str, start: int) -> int:
    """Return where the braces end that begin behind ``start``."""
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.end()
    return len(text)


def _loads_of_parameter(i: Instruction) -> list[Instruction]:
    """Return a load of a parameter's vector as those of its elements."""
    to, source = i.operands
    kind, made = i.parts[-1], []
    for n, one in enumerate(to):
        address = source.base.name.partition("+")
        offset = int(address[2] or 0) + n * int(re.sub(r"\D", "", kind)) // 8
        place = Address(Symbol(f"{address[0]}+{offset}"), 0, [])
        made.append(replace(i, opcode=f"ld.param.{kind}", operands=[one, place]))
    return made


def _cluster(head: str) -> tuple[int, int, int]:
    """Return how many blocks a cluster has in each dimension."""
    given = re.search(r"\.reqnctapercluster\s+([\d, ]+)", head)
    sizes = [int(one) for one in given[1].split(",")] if given else []
    x, y, z = [*sizes, 1, 1, 1][:3]
    return x, y, z


def _declare(statement: str, kernel: Kernel, scope: ChainMap[str, Any], line: int) -> None:
    _, kind, *names = statement.replace(",", " ").split()
    if kind[1:] not in REGISTERS:
        raise PtxError(line, f"registers of the type {kind} are not modeled")
    for name in names:
        stem, _, count = name.partition("<")
        for one in [f"{stem}{i}" for i in range(int(count[:-1]))] if count else [stem]:
            scope[one] = Register(len(kernel.registers), REGISTERS[kind[1:]])
            kernel.registers.append(REGISTERS[kind[1:]])


def _offset(text: str, line: int) -> int:
    number = integer(text or "0")
    if number is None:
        raise PtxError(line, f"the offset {text.strip()} is no integer", UNKNOWN)
    return number


def _instruction(  # noqa: C901  # a case for each kind of operand
    statement: str, scope: ChainMap[str, Any], line: int
) -> Instruction:
    def operand(text: str) -> Any:  # noqa: PLR0911  # a case for each kind of operand
        text = text.strip()
        if text.startswith("{"):
            return [operand(one) for one in text[1:-1].split(",") if one]
        if text.startswith("["):
            base, _, coordinates = text[1:-1].partition(",")
            base, _, offset = base.partition("+")
            return Address(operand(base), _offset(offset, line), operand(coordinates or "{}"))
        if isinstance(scope.get(text), Register | Constant):
            return scope[text]
        if re.match(r"0[fFdD][0-9A-Fa-f]+$", text):
            return Constant(int(text[2:], 16))
        if (number := integer(text)) is not None:
            return Constant(number)
        if DECIMAL.match(text):  # of 64 bits, but where a float32 is expected
            is_short = opcode.endswith("f32")
            raw = struct.pack("<f" if is_short else "<d", float(text))
            return Constant(int.from_bytes(raw, "little"))
        name, _, offset = text.partition("+")
        if isinstance(scope.get(name.strip()), Constant):  # in shared memory
            return Constant(scope[name.strip()].bits + _offset(offset, line))
        return Symbol(name.strip(), _offset(offset, line))

    match = re.match(r"(?:@(!?)([\w%]+)\s+)?([\w.:]+)\s*(.*)", statement, re.DOTALL)
    assert match is not None, f"cannot parse {statement!r}"
    negated, guard, opcode, operands = match.groups("")
    found = [operand(one) for one in OPERAND.findall(operands)]
    if opcode.startswith("ld.param") and found[1].offset:  # of a structure
        place = Symbol(f"{found[1].base.name}+{found[1].offset}")
        found[1] = Address(place, 0, [])
    if "cache_hint" in opcode:  # the last operand, a policy of caches, changes no result
        found.pop()
    return Instruction(line, opcode, found, operand(guard) if guard else None, negated == "!")
