# SPDX-License-Identifier: MIT
"""The stand-in for `torch.cuda`, and CUDA graphs."""
