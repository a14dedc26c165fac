# SPDX-License-Identifier: MIT
"""The process of a candidate: calls it on the emulated GPU, and writes what it computed and did.

It is run by its path, whose folder Python's -P leaves out. Nothing of the judge can be imported
here: neither the reference, nor the generator of inputs, nor the comparison.
"""

from __future__ import annotations

import json
import runpy
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nogpu.judge.facts import Facts, Launched

sys.modules["nogpu.judge"] = None  # type: ignore[assignment]  # to import it raises an error

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map  # noqa: E402

import nogpu  # noqa: E402
from nogpu.machine.gpu_state import SCHEDULES  # noqa: E402
from nogpu.record.operator_work import OperatorWork  # noqa: E402
from nogpu.triton.host_memory import storage_of  # noqa: E402

# The candidate must leave the functions of these modules as they are, a timer's among them.
WATCHED = (
    *("nogpu", "torch.cuda", "torch.utils", "torch.nn.functional", "torch", "time", "builtins"),
    "__main__",
)
CLASSES = (torch.Tensor, torch.nn.Module)
Functions = list[tuple[str, Mapping[str, Any], str, Any]]
# The candidate may replace those of torch.
save, load = torch.save, torch.load


def functions() -> Functions:
    """Return the functions of watched modules and classes: where each is, and what it is."""
    found: Functions = []
    for name, module in list(sys.modules.items()):
        is_watched = name in WATCHED or name.startswith(("nogpu.", "torch.cuda.", "torch.utils._"))
        if module is None or not is_watched:
            continue
        found.append(("sys.modules", sys.modules, name, module))
        for attribute, value in list(vars(module).items()):
            if callable(value):
                found.append((name, vars(module), attribute, value))
            if isinstance(value, type) and (value in CLASSES or value.__module__ == name):
                for inner, one in list(vars(value).items()):
                    if callable(one):
                        found.append((f"{name}.{attribute}", vars(value), inner, one))
    return found


def is_replaced(before: object, after: object, folder: Path) -> bool:
    """Whether another function in a place is a candidate's: PyTorch itself wraps some when they are
    first called."""
    code = getattr(after, "__code__", None)
    is_own = code is None or Path(code.co_filename).is_relative_to(folder)
    return is_own or getattr(after, "__wrapped__", None) is not before


class Candidate:
    """A candidate that is called on an emulated GPU, and what it has done since the last call."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], sample: int | None):
        self.folder, self.settings = folder, settings
        self.stack = ExitStack()
        self.gpu = self.stack.enter_context(nogpu.emulate(settings["arch"], sample=sample))
        self.stack.enter_context(nogpu.cuda_is_cpu(self.gpu))
        self.streams = torch.cuda.current_stream()._streams  # type: ignore[attr-defined]
        self.work: list[tuple[tuple[int, int], str]] = []
        self.models: dict[str, torch.nn.Module] = {}
        self.seen = 0, 0
        self.threads, self.children = set(threading.enumerate()), set(_children())
        self.has_weights = True
        run = self.gpu.run

        def noted(launch: Any, *args: Any, **kwargs: Any) -> None:
            self.work.append((self.streams.work(), launch.kernel))
            run(launch, *args, **kwargs)

        self.gpu.run = noted  # type: ignore[method-assign]
        self.before = functions()

    def import_it(self) -> Facts:
        with OperatorWork() as operators:
            self.names = runpy.run_path(
                str(self.folder / self.settings["file"]), run_name="candidate"
            )
        if self.settings["entry"] not in self.names:
            raise NameError(f"it has no {self.settings['entry']}")
        return self.done(operators)

    def function(self, case: Mapping[str, Any]) -> Callable[..., Any]:
        """Return what is called; of a model the one with the case's arguments and weights."""
        entry = self.names[self.settings["entry"]]
        if self.settings["form"] == "function":
            return entry  # type: ignore[no-any-return]
        key = case["model"]
        if key not in self.models:
            held = load(self.folder / key, weights_only=False)
            torch.manual_seed(held["seed"])
            model = entry(*held["init"])
            own = model.state_dict()
            if {n: one.shape for n, one in own.items()} == {
                n: one.shape for n, one in held["state"].items()
            }:
                model.load_state_dict(held["state"])
            else:
                self.has_weights = False
            self.models[key] = model.cuda().eval()
        return self.models[key]

    def call(self, number: int, case: Mapping[str, Any], held: list[Any]) -> Facts:
        """Call it once.

        Args:
            held: the inputs of the call before, whose memory this one takes if the case says so.
        """
        inputs = load(self.folder / f"inputs_{number}.pt", weights_only=False)
        if case["again"]:
            for mine, new in zip(tree_leaves(held[0]), tree_leaves(inputs), strict=True):
                if isinstance(mine, Tensor):
                    mine.copy_(new)
        else:
            held[:] = [tree_map(_on_device, inputs)]
        self.gpu.schedules = SCHEDULES if case["schedules"] == "all" else SCHEDULES[:1]
        self.work.clear()
        with torch.no_grad(), OperatorWork() as operators:
            try:
                function = self.function(case)
                made = self.done(operators)
                operators.operations.clear()
                if self.settings["form"] == "model":
                    result = function(*held[0])
                else:
                    result = function(held[0])
            except Exception as e:
                facts = self.done(operators)
                facts["error"] = [type(e).__name__, str(e).strip().partition("\n")[0]]
                return facts
        facts = self.done(operators)
        facts["made"], facts["weights"] = made, self.has_weights
        leaves, _ = tree_flatten(result)
        facts["types"] = sorted({type(one).__name__ for one in leaves if isinstance(one, Tensor)})
        facts["unwritten"] = sum(map(self.unwritten, leaves))
        after = [one.cpu() if isinstance(one, Tensor) else one for one in tree_leaves(held[0])]
        written = None
        if any(one["executed"] for one in facts["launches"]):
            written = self.written_by_sample(facts, leaves)
            facts["is_compared"] = written is not None
        if facts.get("is_compared", True):
            kept = [_kept(one) for one in leaves]
            file = self.folder / f"result_{number}.pt"
            save({"outputs": kept, "inputs": after, "written": written}, file)
        return facts

    def written_by_sample(self, facts: Facts, leaves: list[Any]) -> list[Any] | None:
        """Return which numbers of a result the executed programs of a launch have computed.

        Returns:
            None if that is unknown, since more than one kernel may have computed them.
        """
        if len(facts["launches"]) > 1 or any(one[0].endswith("_") for one in facts["operations"]):
            return None
        plain = [one for one in leaves if type(one) is Tensor]
        found = [self.gpu.host_memory.written_by_launch(one) for one in plain]
        is_known = len(plain) == len(leaves) and all(one is not None for one in found)
        return found if is_known else None

    def unwritten(self, one: object) -> int:
        """Return how many bytes of a result nobody has written."""
        if type(one) is not Tensor:
            return 0
        entry = self.gpu.host_memory.unwritten.get(storage_of(one))
        if entry is None:
            return 0
        size = one.element_size()
        strides = (*(size * stride for stride in one.stride()), 1)
        written = torch.from_numpy(entry.written).as_strided(
            (*one.shape, size), strides, entry.first + size * one.storage_offset()
        )
        return int((~written).sum())

    def done(self, operators: OperatorWork) -> Facts:
        """Return what was done since the last call."""
        launches, faults = self.gpu.launches[self.seen[0] :], self.gpu.faults[self.seen[1] :]
        self.seen = len(self.gpu.launches), len(self.gpu.faults)
        unordered = sorted({name for work, name in self.work if not self.streams.is_ordered(work)})
        return {
            "launches": [_of_launch(one) for one in launches],
            "faults": [
                [one.kind, one.name, one.in_one_line()] for one in faults if one.kind != "note"
            ],
            "operations": list(operators.operations),
            "operator_microseconds": sum(
                one.microseconds(self.settings["gpu"]) for one in operators.operations
            ),
            "unordered": unordered,
            "threads": len(set(threading.enumerate()) - self.threads),
            "children": len(set(_children()) - self.children),
            "changed": [
                f"{where}.{name}"
                for where, attributes, name, one in self.before
                if (now := attributes.get(name)) is not one  # most are: spare them the call
                and is_replaced(one, now, self.folder)
            ],
        }


def _kept(one: Any) -> Any:
    """Return a result as it travels: of another class, which may compute, its name alone."""
    if type(one) in (Tensor, torch.nn.Parameter):
        return one.detach().cpu()
    return one if isinstance(one, (int, float, NoneType)) else type(one).__name__


def _children() -> list[str]:
    """Return the processes that this one has started, and that have not ended."""
    found: list[str] = []
    for task in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended
            found += task.read_text("utf-8").split()
    return found


def _on_device(one: Any) -> Any:
    """Return a tensor on "cuda" with its strides, and anything else as it is."""
    if not isinstance(one, Tensor):
        return one
    found = torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="cuda")
    return found.copy_(one) if one.numel() else found


def _of_launch(launch: Any) -> Launched:
    total = launch.counters.total
    memory = launch.counters.sums("global")
    return {
        "kernel": launch.kernel,
        "flops": sum(total.flops.values()) + sum(total.tensor_flops.values()),
        "bytes": 32 * (launch.counters.distinct_read + launch.counters.distinct_written),
        "sectors": memory.transactions,
        "resources": str(launch.resources or ""),
        "microseconds": {gpu: one.microseconds for gpu, one in launch.time.items()},
        "executed": launch.executed,
        "tf32": "tf32" in total.tensor_flops,
    }


def main(folder: Path) -> None:
    """Make the calls of a folder, and write what each did, with the token of the judge."""
    token = sys.stdin.read()
    settings = json.loads((folder / "request.json").read_text("utf-8"))
    candidate = Candidate(folder, settings, None)
    held: list[Any] = []
    facts: list[Facts] = []

    def write() -> None:
        text = json.dumps({"token": token, "facts": facts})
        (folder / "facts.json").write_text(text, "utf-8")

    try:
        facts.append(candidate.import_it())
    except BaseException as e:
        facts.append({"error": [type(e).__name__, str(e).strip().partition("\n")[0]]})
        write()
        return
    for number, case in enumerate(settings["calls"]):
        if case["sample"]:
            candidate.stack.close()
            names = candidate.names
            candidate = Candidate(folder, settings, case["sample"])
            candidate.names = names
            held.clear()
        facts.append(candidate.call(number, case, held))
        write()
    candidate.stack.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
