# SPDX-License-Identifier: MIT
"""Print the seconds of CI's stages, and by how much each has grown: python .ci/seconds.py < STAGES

A line of STAGES is the seconds and the name of a stage, with a tab between. The growth is that over
the seconds in .ci/seconds.csv of the same kind of processor. To record the new ones:
`cp build/seconds.csv .ci/seconds.csv`.
"""

import csv
import sys
from pathlib import Path

from torchpar.ops.environment import processor

RECORDED = Path(__file__).parent / "seconds.csv"


def main() -> None:
    kind = processor()
    rows = list(csv.DictReader(RECORDED.open())) if RECORDED.exists() else []
    before = {row["stage"]: int(row["seconds"]) for row in rows if row["processor"] == kind}
    pairs = [line.rstrip("\n").split("\t") for line in sys.stdin]
    stages = {name: int(seconds) for seconds, name in pairs}
    print(f"{kind}\nseconds  growth  stage")
    for name, seconds in stages.items():
        growth = f"{seconds - before[name]:+d}" if name in before else ""
        print(f"{seconds:7d}  {growth:>6}  {name}")
    new = RECORDED.parent.parent / "build" / RECORDED.name
    new.parent.mkdir(exist_ok=True)
    with new.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["processor", "stage", "seconds"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for row in rows if row["processor"] != kind)
        writer.writerows(
            {"processor": kind, "stage": name, "seconds": seconds}
            for name, seconds in stages.items()
        )


if __name__ == "__main__":
    main()
