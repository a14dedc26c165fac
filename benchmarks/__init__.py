# SPDX-License-Identifier: MIT
"""Measurements: one timer (`timing`), one result and one table (`results`), one file per
benchmark."""
