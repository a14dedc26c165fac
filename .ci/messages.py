# SPDX-License-Identifier: MIT
"""Print all messages of the package, the kernels, the examples and the benchmarks, to be read as
one text.

``python .ci/messages.py`` prints each error, warning and printed line once, sorted by its words. An
expression in a message is shown as its source in braces.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("torchpar", "kernels", "examples", "benchmarks", "nogpu/src")
LINKED = ("kernels", "benchmarks")  # folders that torchpar has by links
CALLS = ("print", "warn", "error", "exit", "skip", "fail")


def text_of(node: ast.AST) -> str:
    """The text of an expression that makes a string, or "" if it is none."""
    match node:
        case ast.Constant(str(text)):
            return text
        case ast.JoinedStr(parts):
            return "".join(text_of(part) for part in parts)
        case ast.FormattedValue(value):
            return "{" + ast.unparse(value) + "}"
        case ast.BinOp(left, ast.Add(), right):
            return text_of(left) + text_of(right)
    return ""


def messages(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The lines and texts of what a module raises, warns of and prints."""
    for node in ast.walk(tree):
        match node:
            case ast.Raise(ast.Call(_, arguments)):
                yield from ((node.lineno, text_of(argument)) for argument in arguments[:1])
            case ast.Call(ast.Name(name) | ast.Attribute(_, name), arguments) if name in CALLS:
                yield from ((node.lineno, text_of(argument)) for argument in arguments[:1])


def main() -> None:
    places = defaultdict(list)
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not any(path.is_relative_to(ROOT / "torchpar" / name) for name in LINKED):
                for line, text in messages(ast.parse(path.read_text())):
                    places[" ".join(text.split())].append(f"{path.relative_to(ROOT)}:{line}")
    for text, where in sorted(places.items()):
        if any(letter.isalpha() for letter in text):
            print(f"{text}\n    {', '.join(where)}")


if __name__ == "__main__":
    main()
