# SPDX-License-Identifier: MIT
"""What training would cost on GPUs that nobody here has."""
