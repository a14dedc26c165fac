# SPDX-License-Identifier: MIT
# it writes more than .* MiB into its folder
from pathlib import Path

import torch


class ModelNew(torch.nn.Module):
    def forward(self, x):
        for n in range(10**6):
            Path(f"{n}.bin").write_bytes(bytes(2**20))
