# SPDX-License-Identifier: MIT
"""The two fastest configurations of X·Xᵀ, launched for Nsight Compute.

    ncu --profile-from-start off --set full python -m benchmarks.ncu

All configurations are timed first, unseen by the profiler. It sees one launch of each of the two fastest.
"""

from collections.abc import Sequence
from statistics import median

import torch

from benchmarks.command import Command, run
from torchpar.errors import ConfigError
from torchpar.tune.command import BY_DEFAULT
from torchpar.tune.measure import Problem, describe, measure, prepare

N = 4096
PROFILED = 2


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("ncu", "Launch the fastest configurations of X·Xᵀ for Nsight Compute.", ["triton"])
    options = command.parse(arguments)
    if not torch.cuda.is_available():
        raise ConfigError("PyTorch finds no GPU, expected one to profile the kernels on")
    n = 256 if options.quick else N
    return profile(Problem("symmetric_product", "bfloat16", n, n, n), torch.device("cuda"))


def profile(problem: Problem, device: torch.device) -> int:
    """Time all configurations, then launch the fastest once more where the profiler sees them."""
    from torchpar.kernels import candidates

    kind, present = candidates.KINDS[problem.kind], candidates.device(torch.empty(0, device="meta"))
    tried = candidates.configurations(problem.kernel, kind.dtype, kind.precision, present.capability)
    tried = [tiles for tiles in tried if tiles.variant in BY_DEFAULT]
    times, errors = measure(problem, tried, device)
    ms = {tiles: median(map(median, rounds)) for tiles, rounds in times.items()}
    ranked = sorted(ms, key=ms.__getitem__)
    print(f"{problem}: {', '.join(f'{describe(tiles)} {ms[tiles]:.4g} ms' for tiles in ranked)}")
    for tiles, error in errors.items():
        print(f"{describe(tiles)}: {error}")
    fastest = [tiles for tiles in ranked if not isinstance(tiles, str)][:PROFILED]
    prepared = prepare(problem, device)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for tiles in fastest:
        prepared.launch(None, tiles=tiles)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    print("profiled, in this order:", ", ".join(map(describe, fastest)), flush=True)
    return 0 if fastest else 1


if __name__ == "__main__":
    run(main)
