# SPDX-License-Identifier: MIT
"""The instructions that C executes, and whole CTAs."""
