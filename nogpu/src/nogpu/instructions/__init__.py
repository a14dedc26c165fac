# SPDX-License-Identifier: MIT
"""The instructions of PTX, in Python."""
