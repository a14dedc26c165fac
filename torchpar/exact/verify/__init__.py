# SPDX-License-Identifier: MIT
"""Trainings in exact arithmetic, whose weights have published bits.

`verify` is the command. `models` holds the models and their trainings, on the data of `drawn`.
`weights` hashes.
"""
