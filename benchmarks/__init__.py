# SPDX-License-Identifier: MIT
"""Measurements: one timer (`timing`), one row and one table (`report`), one file per benchmark."""
