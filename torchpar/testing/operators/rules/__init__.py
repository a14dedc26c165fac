# SPDX-License-Identifier: MIT
"""The rules of an operator's table, in the order of its rows. Each rule tries one part of PyTorch.

`values`, `larger_sizes`, `magnitudes` and `schema` try results, `writes` the memory of operands and
`side_effects` the process, `autograd`, `torch_func` and `vmap` derivatives and batches, `compile`
and `dynamic_sizes` graphs, `dtensor`, `subclasses` and `modes` what intercepts a call.
"""

from collections.abc import Callable, Sequence
from functools import partial

from torch.autograd import gradcheck, gradgradcheck

from torchpar.parallel.launch.guard import WATCHED
from torchpar.testing.operators import differences
from torchpar.testing.operators.attempts import Attempts, outcome_of
from torchpar.testing.operators.case import Case, shapes_of
from torchpar.testing.operators.layouts import in_layouts_and_sizes
from torchpar.testing.operators.process_settings import kept
from torchpar.testing.operators.rules import (
    autograd,
    compile,
    dtensor,
    dynamic_sizes,
    larger_sizes,
    modes,
    schema,
    side_effects,
    subclasses,
    torch_func,
    values,
    vmap,
)
from torchpar.testing.operators.rules.magnitudes import large_and_small_numbers
from torchpar.testing.operators.rules.writes import undeclared_writes
from torchpar.testing.operators.table import worst_of
from torchpar.testing.operators.tensors import Memory
from torchpar.testing.rows import Row

Rule = Callable[[Case], Attempts | str | None]
_as_reference = partial(partial, Case.transformed)
RULES: dict[str, Rule] = {
    "values": values.values,
    "same bits twice": values.same_bits_twice,
    "global settings": modes.global_settings,
    "schema": schema.schema,
    "layouts and sizes": partial(in_layouts_and_sizes, values.same_values),
    "larger sizes": larger_sizes.larger_sizes,
    "fake tensors": schema.fake_tensors,
    "low precision": values.low_precision,
    "gradcheck": partial(autograd.numerically, gradcheck),
    "gradgradcheck": partial(autograd.numerically, gradgradcheck),
    "incoming gradients of any layout": autograd.incoming_gradients_of_any_layout,
    "any of the gradients": autograd.any_of_the_gradients,
    "changes after the call": autograd.changes_after_the_call,
    "undeclared writes": undeclared_writes,
    side_effects.ROW: side_effects.settings_left_as_they_were,
    "forward mode": autograd.forward_mode,
    "batched gradients": _as_reference(transform=autograd.batched_gradients),
    "checkpoint": _as_reference(transform=autograd.checkpointed_gradients),
    "torch.func: vjp": _as_reference(transform=torch_func.of_vjp),
    "torch.func: jvp": _as_reference(
        transform=torch_func.of_jvp, numerical=differences.value_and_difference_of
    ),
    "torch.func: jacrev": _as_reference(transform=torch_func.of_jacrev),
    "torch.func: jacfwd": _as_reference(transform=torch_func.of_jacfwd),
    "torch.func: hessian": _as_reference(transform=torch_func.of_hessian),
    "torch.func: jvp of jvp": _as_reference(
        transform=torch_func.of_jvp_of_jvp, numerical=differences.second_difference_of
    ),
    "NaN": values.nan,
    "infinities": values.infinities,
    "ties and zeros": values.ties_and_zeros,
    "large numbers": partial(large_and_small_numbers, sign=1),
    "small numbers": partial(large_and_small_numbers, sign=-1),
    "vmap over one operand": vmap.over_one_operand,
    "vmap over all operands": vmap.over_all_operands,
    "vmap of vmap": vmap.of_vmap,
    "vmap and gradients": vmap.and_gradients,
    "autocast": modes.autocast,
    "grad modes": modes.grad_modes,
    "functionalize, and a copied graph": compile.functionalize_and_a_copied_graph,
    "tensor subclass": subclasses.tensor_subclass,
    "torch.compile": partial(compile.compiled_by, backend="aot_eager"),
    "torch.compile, dynamic": partial(compile.compiled_by, backend="aot_eager", dynamic=True),
    "torch.compile, each size dynamic": dynamic_sizes.dynamic_sizes,
    "torch.compile, data-dependent sizes": dynamic_sizes.data_dependent_sizes,
    "torch.compile by Inductor": compile.compiled_by_inductor,
    "torch.export, save and load": compile.export_save_and_load,
    "DTensor": dtensor.dtensor,
    "CUDA graph": compile.cuda_graph,
}
"""The rules by name, in the table's order. A new rule is entered here.

A rule returns nothing or a remark, and raises an `OutcomeException` or any error. Or it yields
attempts, each a label and a function that raises likewise, and returns nothing or a remark.
"""
# Those that compare gradients of the operator's own backward.
OF_GRADIENTS = (
    "gradcheck",
    "gradgradcheck",
    "incoming gradients of any layout",
    "any of the gradients",
    "batched gradients",
    "checkpoint",
    "torch.func: vjp",
)
# `check_operator` takes this name for all rules but those of derivatives, for an operator without a
# backward.
WITHOUT_GRADIENTS = "without gradients"
OF_DERIVATIVES = (
    *OF_GRADIENTS,
    "changes after the call",
    "forward mode",
    *(name for name in RULES if name.startswith("torch.func: ")),
    "vmap and gradients",
)
ONCE = ("torch.compile by Inductor", "torch.export, save and load")  # for the first sample only


def try_rule(name: str, cases: Sequence[Case]) -> Row:
    """The worst result of a rule over all cases."""
    return try_cases(name, RULES[name], cases[:1] if name in ONCE else cases)


def try_cases(title: str, rule: Rule, cases: Sequence[Case]) -> Row:
    """The worst result over the cases, in a row of this title.

    An operator may write to its operands, and change settings of the process: each attempt finds
    the operands, and each row the settings, as they were given. The operator may never return, or
    end the process: the command that watches this process gets the title and the sample.
    """
    found = []
    for i, case in enumerate(cases):
        restore = Memory(case.operands).restore
        text = f"{title} on sample {i} of {shapes_of(case.operands)}"
        with WATCHED.calling(case.name, text), kept():
            outcome, detail = outcome_of(partial(rule, case), restore)
        found.append(Row(title, outcome, detail=detail, sample=i))
    return worst_of(found)
