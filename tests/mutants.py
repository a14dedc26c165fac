# SPDX-License-Identifier: MIT
"""Mutants: copies of a kernel's PTX with one fault each, and whether they are noticed."""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import kernel_cases as cases
from launching import Gpu

from nogpu.machine.gpu_state import SCHEDULES
from nogpu.machine.instruction_counts import Column
from nogpu.machine.parse import PtxError
from torchpar.kernels.rule import Tiles

SEED = 1
OF_A_KIND = 5  # mutants of each kind, over all kernels

TMA, WIDE = Tiles(64, 64, 64, 4, 3, "tma"), Tiles(64, 128, 64, 4, 4, "tma")
SPLIT = Tiles(64, 64, 64, 4, 4, "split_k")
CASES = {
    "matmul_t by TMA": cases.symmetric(72, 328, tiles=TMA, other=True, multiprocessors=1),
    "matmul_t by pointers": cases.symmetric(
        72, 328, tiles=Tiles(64, 64, 64, 4, 3), other=True, c=True
    ),
    "linear_sigmoid by TMA": cases.sigmoid(72, 136, 328, tiles=WIDE, multiprocessors=1),
    "linear_sigmoid, split": cases.sigmoid(40, 40, 584, tiles=SPLIT, multiprocessors=2),
    "exact_matmul": cases.exact((72, 160), tiles=Tiles(64, 64, 32, 4, 3)),
    "sigmoid_backward": cases.sigmoid_gradient(70, 72),
    "half_sum": cases.half_sum(70),
}

Lines = list[str]
# A mutation changes one place of a kernel: it yields the copies that it can make.
Mutation = Callable[[Lines], Iterator[tuple[int, Lines]]]
# Accesses to shared memory.
MEMORY = re.compile(r"\b(ld|st)\.shared|cp\.async\.c|matrix|wgmma|tensormap")


def replaced(lines: Lines, n: int, line: str) -> tuple[int, Lines]:
    return n, [*lines[:n], line, *lines[n + 1 :]]


def substitution(pattern: str, change: str | Callable[[re.Match[str]], str]) -> Mutation:
    """Change what matches ``pattern`` in a line."""

    def mutate(lines: Lines) -> Iterator[tuple[int, Lines]]:
        for n, line in enumerate(lines):
            changed = re.sub(pattern, change, line)
            if changed != line:
                yield replaced(lines, n, changed)

    return mutate


def removal(pattern: str) -> Mutation:
    return substitution(rf"^.*(?:{pattern}).*$", "")


def without_barrier(lines: Lines) -> Iterator[tuple[int, Lines]]:
    """Remove a barrier, and those near it: if no warps access shared memory between, one does for
    all."""
    at = [n for n, line in enumerate(lines) if "bar.sync" in line]
    groups: list[list[int]] = []
    for n in at:
        between = lines[groups[-1][-1] + 1 : n] if groups else []
        if groups and not any(MEMORY.search(line) or line.startswith("$L__BB") for line in between):
            groups[-1].append(n)
        else:
            groups.append([n])
    for group in groups:
        yield group[0], ["" if n in group else line for n, line in enumerate(lines)]


def number(pattern: str, change: Callable[[int], int]) -> Mutation:
    """Change the second group of ``pattern``, a number."""
    return substitution(pattern, lambda match: f"{match[1]}{change(int(match[2]))}{match[3]}")


def one_access_later(match: re.Match[str]) -> str:
    size = int(match[2] or 1) * int(match[3]) // 8
    return f"{match[1]}+{int(match[4] or 0) + size}"


def other_phase(lines: Lines) -> Iterator[tuple[int, Lines]]:
    """Wait for the other phase of an mbarrier: its parity no longer changes, or changes at another
    time."""
    parities = {
        m[1]
        for line in lines
        if (m := re.search(r"try_wait\.parity\S*\s+\w+, \[\S+\], (%\w+);", line))
    }
    for n, line in enumerate(lines):
        match = re.match(r"\s*(xor|mov)\.b32\s+(%\w+),", line)
        if match and match[2] in parities:
            changed = "" if match[1] == "xor" else re.sub(r", \S+;", ", 1;", line)
            yield replaced(lines, n, changed)


KINDS: dict[str, Mutation] = {
    "a barrier removed": without_barrier,
    "a wait removed": removal(r"(cp\.async|bulk|wgmma)\.wait_group|waitLoop;"),
    "a wait too lax": number(r"(wait_group\S*\s+)(\d+)(;| )", lambda n: n + 1),
    "another count of bytes": number(r"(expect_tx\S* _, \S+ )(\d+)(;)", lambda n: n - 16),
    "another swizzle of a tensormap": number(r"(swizzle_mode.*0x)([23])(;)", lambda n: n - 1),
    "another descriptor of a matrix": number(r"(\.b64.*, )(4\d{18})(;)", lambda n: n + 2**62),
    "a fence removed": removal(r"fence\.proxy\.async|wgmma\.fence|fence\.proxy\.tensormap"),
    "a group not committed": removal(r"commit_group"),
    "a predicate inverted": substitution(r"@(%p\d+)", r"@!\1"),
    "a comparison inverted": substitution(r"\bsetp\.lt\b", "setp.ge"),
    "an access off by one": substitution(
        r"((?:ld|st)\.(?:shared|global)\S*?(?:\.v(\d))?\.b(\d+)\s[^\[]*\[\s*%r\w+)(?:\s*\+\s*(\d+))?",
        one_access_later,
    ),
    "a product left out": removal(r"wgmma\.mma_async|mma\.sync"),
    "another step": number(
        r"(add\.s(?:32|64)\s+(?:%\w+), %\w+, )(16|32|64|128)(;)", lambda n: 2 * n
    ),
    "another number of stages": number(
        r"(setp\.gt\.s32\s+%\w+, %\w+, )([1-4])(;)", lambda n: n + 1
    ),
    "another phase": other_phase,
}


# Kinds that change the order of accesses. One warp alone makes the tensormaps, so that waits,
# groups and barriers before the last one is published order nothing: none of these is drawn.
ORDER = ("a barrier removed", "a wait removed", "a wait too lax", "a group not committed")


def end_of_tensormaps(text: str) -> int:
    """The line of the barrier after the last tensormap was published."""
    at = text.rfind("cp_fenceproxy")
    return text.count("\n", 0, text.index("bar.sync", at)) if at >= 0 else 0


@dataclass
class Mutant:
    kernel: str
    kind: str
    line: int
    original: str
    text: str

    def change(self, text: str) -> str:
        return self.text if text == self.original else text

    def describe(self) -> str:
        before = self.original.splitlines()[self.line].strip()
        after = self.text.splitlines()[self.line].strip()
        return (
            f"{self.kernel}, line {self.line + 1}: {self.kind}: {before[:70]} → "
            f"{after[:70] or 'nothing'}"
        )

    def noticed(self) -> bool:
        case = CASES[self.kernel]
        runs = (case.execute(Gpu(schedule, self.change)) for schedule in SCHEDULES)
        try:
            return not all(case.agrees(found, case.expected()) for found in runs)
        except PtxError:
            return True


def draw() -> list[Mutant]:
    """`OF_A_KIND` mutants of each kind, or as many as there are, at lines that some thread
    executes."""
    originals: list[tuple[str, str, set[int]]] = []  # names, texts, and the lines that are executed
    for name, case in CASES.items():
        gpu = Gpu(SCHEDULES[0])
        case.execute(gpu)
        for counts in gpu.counted:
            kernel, times = counts.kernel, counts.table[:, Column.EXECUTIONS]
            executed = zip(kernel.instructions, times, strict=True)
            lines = {i.line - 1 for i, count in executed if count}
            originals.append((name, kernel.text, lines))
    rng, drawn = random.Random(SEED), []
    for kind, mutation in KINDS.items():
        possible = [
            Mutant(name, kind, line, text, "\n".join(lines))
            for name, text, executed in originals
            for line, lines in mutation(text.splitlines())
            if line in executed and not (kind in ORDER and line < end_of_tensormaps(text))
        ]
        by_kernel = [[one for one in possible if one.kernel == name] for name in CASES]
        for _ in range(min(OF_A_KIND, len(possible))):
            own = rng.choice([one for one in by_kernel if one])
            drawn.append(own.pop(rng.randrange(len(own))))
    return drawn
