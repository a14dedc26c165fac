# SPDX-License-Identifier: MIT
"""Steps of Muon: the benchmark, and the Muons of other packages."""
