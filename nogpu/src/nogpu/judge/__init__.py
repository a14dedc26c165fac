# SPDX-License-Identifier: MIT
"""``python -m nogpu judge``: whether an unknown kernel is right, honest, and how fast.

`judging` is the command. `problem` has a reference and its inputs, of which `variants` makes
others: other shapes, values and layouts. `confined` starts the candidate's process, in which
`candidate_process` calls it on the emulated GPU; inputs and results travel as files, and so do its
notes, the `facts`. `verdict` compares the results, and is the table.
"""
