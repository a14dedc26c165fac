# SPDX-License-Identifier: MIT
"""Measurements: each call that is timed is also checked."""
