# SPDX-License-Identifier: MIT
"""Train an MLP on MNIST to 98.0% and to 98.7% in as few seconds as two CPU cores need."""
