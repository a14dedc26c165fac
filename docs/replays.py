# SPDX-License-Identifier: MIT
"""Record the pages of parallel.md that play a step: ``python docs/replays.py``.

It takes a minute or two on an idle machine. With names it records some of them: ``python
docs/replays.py data mesh``.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / "replays"
# Large batches and layers, so that passes take longer than Python between them.
WIDE = "--hidden 1024 1024 1024 --batch-size 1024 --epochs 1 --samples 20480"
PAGES = {
    "data": f"2 train_ddp.py --plain {WIDE}",
    "tensor": "2 train_tensor_parallel.py --hidden 2048 --batch-size 1024 --epochs 1",
    "gpipe": f"2 train_pipeline.py --pipeline gpipe {WIDE}",
    "1f1b": f"2 train_pipeline.py --pipeline 1f1b {WIDE}",
    "mesh": "8 train_parallel.py --tp 2 --pp 2 --optimizer muon "
    "--hidden 512 512 512 --batch-size 1024 --epochs 1 --samples 20480",
}


def record(name: str) -> None:
    """Write a page, without the recording beside it."""
    ranks, script, *flags = PAGES[name].split()
    page = FOLDER / f"{name}.html"
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    # Paths on the page are those of a reader's checkout.
    command = [*torchrun, f"examples/{script}", *flags, "--replay", str(page.relative_to(ROOT))]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    page.with_suffix(".json").unlink()


if __name__ == "__main__":
    for chosen in sys.argv[1:] or PAGES:
        record(chosen)
