# SPDX-License-Identifier: MIT
"""Records of an emulated GPU's launches: their faults, counters, resources and times."""
