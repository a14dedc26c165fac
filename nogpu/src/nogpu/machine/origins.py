# SPDX-License-Identifier: MIT
"""Origins of addresses: the parameters of a kernel to which its accesses add offsets.

An address that is far from its tensor says nothing about which one was meant. The registers that it
is computed from do.
"""

from nogpu.machine.parse import Address, Instruction, Kernel, Register, Symbol, flat

# By the beginning of an opcode, the operands from which a sum has its origins.
SUMS = {
    "add": slice(1, 3),
    "sub": slice(1, 2),
    "mad": slice(3, 4),
    "mov": slice(1, 2),
    "selp": slice(1, 3),
    "cvta": slice(1, 2),
}


def origins(kernel: Kernel) -> dict[int, set[str]]:
    """Return by the lines of accesses the names of the parameters that they begin at.

    A number that is added without a factor is one, too. An address that was loaded from memory has
    none, and boxes of TMA have none, since a descriptor holds their address.
    """
    if kernel.origins is None:
        kernel.origins = _origins(kernel)
    return kernel.origins


def _origins(kernel: Kernel) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}  # by registers
    sums: list[tuple[int, list[int]]] = []
    for i in kernel.instructions:
        to = flat(i.operands[0])[0] if i.operands else None
        if not isinstance(to, Register):
            continue
        if i.opcode.startswith("ld.param") and isinstance(i.operands[1], Address):
            base = i.operands[1].base
            if isinstance(base, Symbol):
                found.setdefault(to.index, set()).add(base.name)
        elif i.parts[0] in SUMS:
            sources = i.operands[SUMS[i.parts[0]]]
            sums.append((to.index, [one.index for one in sources if isinstance(one, Register)]))
    has_changed = True
    while has_changed:  # a loop adds to an address that is computed behind it
        has_changed = False
        for index, added in sums:
            names = found.setdefault(index, set())
            before = len(names)
            names.update(*(found.get(one, ()) for one in added))
            has_changed |= len(names) > before
    by_line: dict[int, set[str]] = {}
    for i in kernel.instructions:
        for base in _bases(i):
            by_line.setdefault(i.line, set()).update(found.get(base.index, ()))
    return by_line


def _bases(i: Instruction) -> list[Register]:
    """Return the registers to which an access adds its offsets."""
    if "tensor" in i.parts:
        return []
    bases = [one.base for one in i.operands if isinstance(one, Address)]
    return [one for one in bases if isinstance(one, Register)]
