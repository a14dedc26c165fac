# SPDX-License-Identifier: MIT
"""Ranks on this machine: each runs the function, an error comes back, and the ranks live on."""

import pytest
import torch
from ranks import fork_context

from torchpar.parallel.launch.local import current_world, start_ranks


def sum_of_ranks(factor: int) -> tuple[int, int, float]:
    world = current_world()
    return world.rank, torch.get_num_threads(), world.sum(torch.tensor(float(factor * world.rank))).item()


def fail_on_rank_1() -> None:
    if current_world().rank == 1:
        raise ValueError("rank 1 has had enough")


def test_functions_run_on_all_ranks():
    fork_context()
    with start_ranks(2, threads=1) as ranks:
        assert ranks.run(sum_of_ranks, 3) == [(0, 1, 3.0), (1, 1, 3.0)]
        with pytest.raises(ValueError, match="rank 1 has had enough"):
            ranks.run(fail_on_rank_1)
        assert ranks.run(sum_of_ranks, 5) == [(0, 1, 5.0), (1, 1, 5.0)]


def test_this_process_is_no_rank():
    with pytest.raises(RuntimeError, match="this process is no rank of start_ranks"):
        current_world()
