# SPDX-License-Identifier: MIT
"""The version, which is read without importing the rest."""

__version__ = "0.1.0"
