# SPDX-License-Identifier: MIT
import torch


class Model(torch.nn.Module):
    def forward(self, x):
        return torch.softmax(x, -1)


def get_inputs():
    return [torch.randn(33, 40)]


def get_init_inputs():
    return []
