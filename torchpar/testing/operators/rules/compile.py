# SPDX-License-Identifier: MIT
"""Rules of graphs that hold an operator: traced, compiled, exported, or captured on a GPU."""

import copy
import io
import os
import shutil
from collections.abc import Callable
from functools import partial

import torch
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from torchpar.testing.operators.attempts import Attempts, AttemptsAndRemark, OutcomeException
from torchpar.testing.operators.case import Case
from torchpar.testing.operators.compare import close, same_metadata
from torchpar.testing.operators.gradients import pulled_back
from torchpar.testing.operators.layouts import LAYOUTS
from torchpar.testing.operators.tensors import Tensors, rolled


def functionalize_and_a_copied_graph(case: Case) -> None:
    expected = case.op(*case.operands)
    close(functionalize(case.op)(*case.operands), expected)
    graph = make_fx(functionalize(case.op))(*case.operands)
    close(copy.deepcopy(graph)(*case.operands), expected)


def compiled_by(case: Case, backend: str, dynamic: bool | None = None) -> Attempts:
    def call(*args: object, **kwargs: object) -> object:
        return case.callable(*args, **kwargs)

    def values(operands: Tensors) -> None:
        expected, actual = case.takes(operands), compiled(*operands)
        close(actual, expected)
        same_metadata(actual, expected)

    def pulled() -> None:
        transform = partial(pulled_back, case=case, layout=LAYOUTS["permuted"])
        expected = transform(case.oracle)
        case.close(
            transform(case.smooth(compiled)),
            expected,
            lambda: transform(case.wide.oracle, case=case.wide),
        )

    torch._dynamo.reset()
    compiled = case.bind(torch.compile(call, fullgraph=True, backend=backend, dynamic=dynamic))
    yield "values", partial(values, case.operands)
    if case.floating:
        yield "gradients", pulled
    for name, operands in case.resized(lambda t, dim: torch.cat([t, t], dim)) if dynamic else ():
        yield f"twice {name}", partial(values, operands)
    torch._dynamo.reset()


def compiled_by_inductor(case: Case) -> Attempts:
    if not any(map(shutil.which, filter(None, [os.environ.get("CXX"), "g++", "clang++"]))):
        raise OutcomeException("not run", "no C++ compiler")
    from torch._inductor import config

    # Processes for compiling would take longer to start. The caches on disk do not depend on an
    # operator's rules.
    with config.patch(compile_threads=1, force_disable_caches=True):
        yield from compiled_by(case, backend="inductor")


def export_save_and_load(case: Case) -> AttemptsAndRemark:
    class Module(torch.nn.Module):
        def forward(self, *args: object, **kwargs: object) -> object:
            return case.callable(*args, **kwargs)

    def reloaded() -> torch.export.ExportedProgram:
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        return torch.export.load(file)

    def check(stage: Callable[[], torch.export.ExportedProgram]) -> None:
        close(case.bind(stage().module())(*case.operands), case.op(*case.operands))

    program = torch.export.export(Module(), *case.arguments(case.operands))
    yield "exported", partial(check, lambda: program)
    yield "loaded", partial(check, reloaded)
    yield "decomposed", partial(check, program.run_decompositions)
    is_kept = any(node.target is case.overload for node in program.graph.nodes)
    return "the graph holds the operator" if is_kept else "the graph holds other operators"


def cuda_graph(case: Case) -> None:
    """Capture a call on another stream, and replay it with other operands in the same memory."""
    if not torch.cuda.is_available():
        raise OutcomeException("not run", "no GPU")
    operands = [t.cuda() for t in case.operands]
    others = [rolled(t, 1).cuda() for t in case.operands]
    case.takes(operands)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = case.op(*operands)
    for t, changed in zip(operands, others, strict=True):
        t.copy_(changed)
    graph.replay()
    close(actual, case.op(*others))
