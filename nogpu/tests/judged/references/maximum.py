# SPDX-License-Identifier: MIT
import torch


class Model(torch.nn.Module):
    def forward(self, a, b):
        return torch.maximum(a, b)


def get_inputs():
    return [torch.randn(24, 40), torch.randn(24, 40)]


def get_init_inputs():
    return []
