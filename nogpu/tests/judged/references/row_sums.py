# SPDX-License-Identifier: MIT
import torch


def generate_input(rows=24, columns=56, seed=0):
    torch.manual_seed(seed)
    return torch.rand(rows, columns)


def ref_kernel(data):
    return data.sum(-1)
