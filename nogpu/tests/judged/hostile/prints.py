# SPDX-License-Identifier: MIT
# it prints more than .* bytes
import torch


class ModelNew(torch.nn.Module):
    def forward(self, x):
        while True:
            print("right" * 1000)
