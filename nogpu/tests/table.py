# SPDX-License-Identifier: MIT
"""Write the table of faults in docs/ptx.md: ``python nogpu/tests/table.py``.

Each fault is executed by the emulator, for sm_90, and by Triton's interpreter.
"""

import re
from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).parent.parent.parent / "docs" / "ptx.md"
HEAD = "| fault | `nogpu` | `TRITON_INTERPRET=1` |\n|---|---|---|\n"
LIMIT = 200_000  # instructions of a warp, after which a loop is endless


def rows() -> dict[str, tuple[str, str]]:
    """What the page's table says of each fault: the emulator's words and the interpreter's."""
    text = PAGE.read_text("utf-8").partition(HEAD)[2].partition("\n\n")[0]
    cells = [line.strip("| ").split(" | ") for line in text.splitlines()]
    return {name: (emulator, interpreter) for name, emulator, interpreter in cells}


def emulated(name: str) -> tuple[Sequence, bool]:
    """The emulator's faults but notes, and whether one of them is at the right line."""
    from faults import FAULTS

    from nogpu import emulate

    fault = FAULTS[name]
    with emulate("sm_90") as gpu:
        gpu.limit = LIMIT
        fault.run()
    found = [one for one in gpu.report().faults if one.kind != "note"]
    # Beyond a tensor another one may lie, as the allocator chooses. Warps or programs race for it.
    if any(one.name == "out of bounds" for one in found):
        found = [one for one in found if one.name not in ("race", "race between programs")]
    return found, bool({one.source for one in found} & set(fault.named()))


def cell(found: Sequence, is_at_line: bool) -> str:
    """What the table says of the emulator's faults."""
    if not found:
        return "nothing"
    names = dict.fromkeys(one.name for one in found)  # in their order, each once
    return f"{', '.join(names)}{'' if is_at_line else ', at another line'}"


def short(said: str) -> str:
    """What the table says of the interpreter."""
    if said.startswith("does not end"):
        return "does not end"
    if said.startswith("the process ends"):
        return "a crash"
    return re.match(r"[^:,]*", said)[0].strip()  # without the text of an error


def main() -> None:
    from faults import FAULTS
    from interpreted import interpret

    lines = []
    for name in FAULTS:
        lines.append(f"| {name} | {cell(*emulated(name))} | {short(interpret(name))} |")
        print(lines[-1], flush=True)
    text = PAGE.read_text("utf-8")
    before, head, rest = text.partition(HEAD)
    PAGE.write_text(before + head + "\n".join(lines) + "\n\n" + rest.partition("\n\n")[2], "utf-8")


if __name__ == "__main__":
    main()
