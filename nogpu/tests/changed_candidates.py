# SPDX-License-Identifier: MIT
"""Candidates for the judge that are a right one of the folder judged/right, changed in a place."""

from pathlib import Path
from typing import NamedTuple

RIGHT_ONES = Path(__file__).with_name("judged") / "right"


class Changed(NamedTuple):
    """A changed candidate.

    Attributes:
        of: the right one.
        reason: the row of the table, and what it must say, as a pattern; "" if it is right, too.
        changes: each text, and the one in its place.
    """

    of: str
    reason: str
    changes: dict[str, str]

    def code(self) -> str:
        """Return the changed file."""
        text = (RIGHT_ONES / f"{self.of}.py").read_text("utf-8")
        for before, after in self.changes.items():
            assert before in text, before
            text = text.replace(before, after)
        return text


ERROR = "values: as given: an error of"
RIGHT = {
    "layer_norm_rsqrt": Changed(
        "layer_norm_one_block", "", {"/ tl.sqrt(variance + 1e-5)": "* tl.rsqrt(variance + 1e-5)"}
    ),
    "layer_norm_one_warp": Changed(
        "layer_norm_one_block", "", {"x.shape[1], BLOCK": "x.shape[1], num_warps=1, BLOCK"}
    ),
    "linear_larger_tiles": Changed("linear_tiled", "", {"16": "32"}),
    "maximum_where": Changed(
        "maximum_flat",
        "",
        {
            "tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)": (
                "tl.where((x >= y) | (x != x), x, y)"
            )
        },
    ),
    "maximum_large_blocks": Changed("maximum_flat", "", {"128": "1024"}),
    "product_larger_tiles": Changed("product_tiled", "", {", 16)": ", 32)", "SIDE=16": "SIDE=32"}),
}
# All but those that return something else, or read outside, are within 1e-2 of what is right.
WRONG = {
    "gelu_by_tanh": Changed(
        "gelu_flat",
        ERROR,
        {
            "0.5 * v * (1 + tl.erf(v * 0.7071067811865476))": (
                "v * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))"
            )
        },
    ),
    "layer_norm_without_epsilon": Changed("layer_norm_one_block", ERROR, {"+ 1e-5": "+ 1e-8"}),
    "layer_norm_of_a_sample": Changed(
        "layer_norm_one_block",
        ERROR,
        {"centred * centred, 0) / columns": "centred * centred, 0) / (columns - 1)"},
    ),
    "linear_in_tf32": Changed(
        "linear_tiled", "values: .*takes TF32 unless", {', input_precision="ieee"': ""}
    ),
    "maximum_without_nan": Changed(
        "maximum_flat",
        "special values: NaN: NaN at",
        {", propagate_nan=tl.PropagateNan.ALL": ""},
    ),
    "product_summed_in_half": Changed(
        "product_tiled",
        "special values: large: off by inf",
        {
            "SIDE), tl.float32)": "SIDE), tl.float16)",
            "tl.dot(x, y, total)": "tl.dot(x, y, total, out_dtype=tl.float16)",
        },
    ),
    "rms_norm_of_other_weights": Changed(
        "rms_norm_of_bfloat16",
        "values: .*its parameters are not named as the reference's",
        {"self.weight": "self.gamma"},
    ),
    "row_sums_of_half": Changed(
        "row_sums_one_block", ERROR, {"other=0.0)": "other=0.0).to(tl.float16).to(tl.float32)"}
    ),
    "softmax_beyond_its_rows": Changed(
        "softmax_one_block",
        "no faults: .*out of bounds",
        {
            'tl.load(x + row * columns + i, mask=i < columns, other=-float("inf"))': (
                'tl.where(i < columns, tl.load(x + row * columns + i), -float("inf"))'
            )
        },
    ),
    "softmax_of_numpy": Changed(
        "softmax_one_block",
        "values: as given: is ndarray, expected a tensor",
        {"return out": "return out.cpu().numpy()"},
    ),
    "softmax_rounded_constant": Changed(
        "softmax_one_block",
        ERROR,
        {"tl.exp(v - tl.max(v, 0))": "tl.exp2((v - tl.max(v, 0)) * 1.4427)"},
    ),
    "softmax_twice": Changed(
        "softmax_one_block",
        "values: as given: it returns 2 results, expected 1",
        {"return out": "return out, out"},
    ),
    "softmax_without_maximum": Changed(
        "softmax_one_block", "special values: large: NaN", {" - tl.max(v, 0)": ""}
    ),
}
# What stands before the class, and what must be said.
REPLACED = "honest: it replaces time.perf_counter"
BEFORE_CLASS = {
    "comparison": ("honest: it replaces torch.allclose", "torch.allclose = lambda *a, **n: True"),
    "timer": (REPLACED, "import time\n\ntime.perf_counter = lambda: 0.0"),
    "timer_of_another_file": (
        REPLACED,
        """import time

names = {}
code = compile("def perf_counter():\\n    return 0.0", time.__name__ + ".py", "exec")
exec(code, names)
time.perf_counter = names["perf_counter"]""",
    ),
}
CHEATS = {
    name: Changed("softmax_one_block", reason, {"class ModelNew": f"{code}\n\n\nclass ModelNew"})
    for name, (reason, code) in BEFORE_CLASS.items()
} | {
    "other_stream": Changed(
        "softmax_one_block",
        "honest: softmax runs on a stream that nothing waits for",
        {
            "            softmax[": (
                "            with torch.cuda.stream(torch.cuda.Stream()):\n                softmax["
            )
        },
    ),
    "empties_its_input": Changed(
        "softmax_one_block",
        "inputs unwritten: input 1 was written",
        {"x.contiguous(), ": "x, ", "return out": "x.zero_()\n        return out"},
    ),
    "cached": Changed(
        "softmax_one_block",
        "honest: it returns the result of an earlier call",
        {
            "class ModelNew": "HELD = {}\n\n\nclass ModelNew",
            "        out =": """        key = x.data_ptr(), x.shape
        if key in HELD:
            return HELD[key].clone()
        out =""",
            "return out": "HELD[key] = out.clone()\n        return out",
        },
    ),
}
