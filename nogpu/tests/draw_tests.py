# SPDX-License-Identifier: MIT
"""Draw tests of small shapes from a suite, for the table of public suites in docs/nogpu-ci.md.

pytest --nogpu --cuda-is-cpu --collect-only -q | python draw_tests.py > drawn
pytest --nogpu --cuda-is-cpu --nogpu-limit 30 @drawn
"""

import argparse
import random
import re
import sys
from collections import Counter
from collections.abc import Sequence
from math import prod

TEST = re.compile(r"\S+\.py::")
# Numbers in a test's name that are no sizes: those of types and GPUs, and fractions.
OTHER = re.compile(r"b?float\w+|bf16|u?int\d+|fp\d+\w*|sm_?\d+|\d+e-?\d+|\d*\.\d+(e-?\d+)?")
# A list in the parameters of a test, such as [0, 15, 100] of lengths: its last number is its size.
LIST = re.compile(r"[\[(][^\[\]()]*?(\d+)[\])](?=.)")


def size(test: str) -> int:
    """Return the product of the sizes in a test's name: about how much it computes."""
    parameters = LIST.sub(r"\1", OTHER.sub("", test.partition("[")[2]))
    return prod(int(n) for n in re.findall(r"\d+", parameters) if int(n))


def draw(
    tests: Sequence[str], number: int = 150, largest: int = 2**16, most: int = 3, seed: int = 91
) -> list[str]:
    """Return ``number`` tests in a random order, or as many as there are.

    Args:
        largest: the largest `size` of a test.
        most: how many tests of one function there may be.
    """
    small = [test for test in tests if size(test) <= largest]
    random.Random(seed).shuffle(small)
    of_function = Counter[str]()
    drawn = []
    for test in small:
        function = test.partition("[")[0]
        of_function[function] += 1
        if of_function[function] <= most:
            drawn.append(test)
    return drawn[:number]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw tests of small shapes from a suite.")
    parser.add_argument("--number", type=int, default=150)
    parser.add_argument("--largest", type=int, default=2**16)
    parser.add_argument("--most", type=int, default=3)
    parser.add_argument("--seed", type=int, default=91)
    collected = [line.rstrip("\n") for line in sys.stdin if TEST.match(line)]
    print(*draw(collected, **vars(parser.parse_args())), sep="\n")
