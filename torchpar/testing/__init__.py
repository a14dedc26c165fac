# SPDX-License-Identifier: MIT
"""A conformance kit for optimizers: many situations, each compared with whole matrices on one process."""

from torchpar.testing.optimizers import Conformance, Row, check_optimizer
from torchpar.testing.situations import SITUATIONS

__all__ = ["SITUATIONS", "Conformance", "Row", "check_optimizer"]
