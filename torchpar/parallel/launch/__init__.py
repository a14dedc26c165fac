# SPDX-License-Identifier: MIT
"""Launch: find the other ranks, connect to them, form the mesh, and compare arguments."""
