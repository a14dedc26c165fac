# SPDX-License-Identifier: MIT
"""The recipes of docs/speedrun.md: each step of the ladder, and what else was tried.

They were chosen by the last 10,000 training images, on which none of them was trained (``--validate``).
"""

from dataclasses import replace

import torch

from benchmarks.speedrun.customary import CustomaryScript
from benchmarks.speedrun.recipe import Entry, Recipe

CUSTOMARY = CustomaryScript(epochs=10)
IN_MEMORY = Recipe(
    name="in-memory", change="one tensor of images, `torchpar.nn.MLP`; 8 epochs, not 10", epochs=8
)
FORMULAS = replace(IN_MEMORY, name="formulas", change="gradients by formulas, not autograd", fused=True)
DECAY = replace(
    FORMULAS,
    name="falling-rate",
    change="a rate of 0.002 that falls to 0; 5 epochs",
    decay=True,
    lr=0.002,
    epochs=5,
)
MUON = replace(
    DECAY,
    name="muon",
    change="Muon for the weights; batches of 512, 2 epochs",
    optimizer="muon",
    lr=0.1,
    batch_size=512,
    epochs=2,
)
PIXELS = replace(
    MUON,
    name="pixels",
    change="11 × 11 pixels: 3 less on each side, then averages of 2 × 2",
    crop=3,
    pool=2,
)
SMOOTHING = replace(PIXELS, name="smoothing", change="label smoothing of 0.1", label_smoothing=0.1)
LARGE = replace(
    SMOOTHING,
    name="large-batches",
    change="batches of 1536, a rate of 0.3; 320 units, not 512",
    batch_size=1536,
    lr=0.3,
    hidden=(320,),
)
BFLOAT16 = replace(LARGE, name="bfloat16", change="products in bfloat16", dtype=torch.bfloat16)
RECORD_98 = replace(BFLOAT16, name="record-98.0", change="3 iterations of Newton–Schulz, not 5", ns_steps=3)
RECORD_98_7 = replace(
    RECORD_98,
    name="record-98.7",
    change="6 epochs, each with the images at another place; 512 units",
    shift=True,
    hidden=(512,),
    epochs=6,
)
RECORDS: list[Entry] = [RECORD_98, RECORD_98_7]
BEFORE: list[Entry] = [CUSTOMARY, IN_MEMORY, FORMULAS, DECAY, MUON, PIXELS, SMOOTHING, LARGE, BFLOAT16]

# The 98.0% record with another choice.
TRIED: list[Entry] = [
    replace(RECORD_98, name="sigmoid", change="sigmoid layers, a rate of 1", activation="sigmoid", lr=1.0),
    replace(RECORD_98, name="28x28", change="all pixels", crop=0, pool=1),
    replace(RECORD_98, name="14x14", change="14 × 14 pixels: averages of 2 × 2 alone", crop=0),
    replace(RECORD_98, name="10x10", change="10 × 10 pixels: 4 less on each side", crop=4),
    replace(RECORD_98, name="no-smoothing", change="no label smoothing", label_smoothing=0.0),
    replace(RECORD_98, name="two-iterations", change="2 iterations of Newton–Schulz", ns_steps=2),
    replace(RECORD_98, name="two-layers", change="two hidden layers of 256", hidden=(256, 256)),
    replace(RECORD_98, name="one-epoch", change="1 epoch in batches of 768", epochs=1, batch_size=768),
    replace(
        RECORD_98, name="larger-batches", change="batches of 3072, a rate of 0.4", batch_size=3072, lr=0.4
    ),
    replace(RECORD_98, name="warm-up", change="the rate rises in the first fifth of the steps", warmup=0.2),
    replace(RECORD_98, name="averaged", change="an exponential moving average of the weights", average=0.9),
    replace(RECORD_98, name="adam", change="Adam, a rate of 0.01", optimizer="adam", lr=0.01),
    replace(RECORD_98, name="shifted", change="the images are moved in the first epoch", shift=True),
]
GROUPS = {"records": RECORDS, "ladder": [*BEFORE, *RECORDS], "tried": [RECORD_98, *TRIED]}
