# SPDX-License-Identifier: MIT
# it takes more than .* GiB of memory
import torch


class ModelNew(torch.nn.Module):
    def forward(self, x):
        held = []
        while True:
            held.append(b"1" * 2**26)
