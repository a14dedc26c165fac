# SPDX-License-Identifier: MIT
"""From a launch of Triton to the kernel's memory and parameters: the driver."""
