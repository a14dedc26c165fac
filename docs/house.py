# SPDX-License-Identifier: MIT
"""Write the picture of the package's rooms, and of who imports whom, to CONTRIBUTING.md.

    python docs/house.py

A room is a folder or a module of `torchpar`. An arrow goes to a room that is imported. Arrows that
follow from others are left out.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- by docs/house.py -->\n", "<!-- end -->\n"


def room(module: str) -> str:
    """The room of a module such as torchpar.ops.maximum; "" for names of the package itself."""
    return [*module.split("."), ""][1]


def modules() -> dict[str, Path]:
    """The package's modules, by their names."""
    folders = [(ROOT / "torchpar", "**/*.py"), (ROOT, "kernels/*.py")]  # to which a link leads
    found = {}
    for folder, pattern in folders:
        for path in sorted(folder.glob(pattern)):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join(("torchpar", *parts)).removesuffix(".__init__")] = path
    return found


def imports(path: Path, module: str) -> set[str]:
    """The modules of the package that a file imports, anywhere in it."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.startswith("torchpar.")}


def arrows() -> dict[str, set[str]]:
    """For each room the rooms that it imports, without those that follow from others."""
    known = modules()
    direct: dict[str, set[str]] = {}
    for module, path in known.items():
        own = room(module)
        if not own or own.startswith("__"):
            continue
        used = {room(name) for name in imports(path, module) if name in known or room(name)}
        rooms = {room(name) for name in known}
        direct.setdefault(own, set()).update((used & rooms) - {own, "", "__main__"})
    return {name: used - reached(direct, used) for name, used in direct.items()}


def reached(direct: dict[str, set[str]], start: set[str]) -> set[str]:
    """The rooms behind those of ``start``."""
    found: set[str] = set()
    queue = [after for name in start for after in direct.get(name, ())]
    while queue:
        name = queue.pop()
        if name not in found:
            found.add(name)
            queue += direct.get(name, ())
    return found


def picture() -> str:
    """The picture as text of Mermaid, which GitHub draws, and a table of what the rooms hold."""
    lines = ["```mermaid", "flowchart TD"]
    found = sorted(arrows().items())
    for name, used in found:
        lines += [f"    {name} --> {other}" for other in sorted(used)] or [f"    {name}"]
    lines += ["```", "", "| room | holds |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {holds(name)} |" for name, _ in found), ""])


def holds(name: str) -> str:
    """The first sentence of a room's docstring."""
    text = ast.get_docstring(ast.parse(modules()[f"torchpar.{name}"].read_text())) or ""
    return " ".join(text.partition("\n\n")[0].split()).rstrip(".")


def page() -> str:
    """CONTRIBUTING.md with the picture of today."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{picture()}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page())
