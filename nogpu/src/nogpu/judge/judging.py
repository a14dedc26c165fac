# SPDX-License-Identifier: MIT
"""``python -m nogpu judge REFERENCE CANDIDATE …``: a verdict on each candidate, and its reason."""

import argparse
import json
import os
import random
import secrets
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import nogpu
from nogpu.check.compare import farthest
from nogpu.data_sheets import DATA_SHEETS
from nogpu.judge import variants
from nogpu.judge.confined import Limits, confined
from nogpu.judge.facts import Facts
from nogpu.judge.problem import Inputs, Needed, Problem, ProblemError, Right, same
from nogpu.judge.verdict import Verdict, unwritten_inputs, wrong
from nogpu.record.time import ESTIMATE_ACCURACY, shown

NOT_RUN = "it ended before all its results were there"
SAMPLE = 64  # programs of a launch at the whole size
MOST_FLOPS = (
    1e12  # of a reference that is computed at the whole size; a core does some 1e10 a second
)
PLAIN = ("Tensor", "Parameter")  # classes of tensors that compute nothing when they are read
# ATen may compute this share of the reference's arithmetic, and own kernels must compute so much of
# what takes floating-point instructions, which depends on how the reference is written.
OWN, LEAST_OWN = 0.5, 0.1


@dataclass
class Case:
    """A call of a candidate, and what is right.

    Attributes:
        kind: the row of the table: "values", "shapes", "special values" or "layouts"; "size" is the
            whole size, of which a sample is executed.
        near: the exact result of inputs that differ by a rounding.
        again: whether the call takes the memory of the call before.
    """

    kind: str
    name: str
    inputs: Inputs
    seed: int
    native: Right | None
    exact: Right | None
    near: Right | None = None
    schedules: str = "one"
    again: bool = False

    @property
    def is_degenerate(self) -> bool:
        """Whether so little is computed that it does not say by what."""
        return self.name.endswith(("→ 1", "→ 0"))


class Judge:
    """The judge of candidates for one reference.

    Args:
        gpu: of `DATA_SHEETS`, for the estimates.
    """

    def __init__(self, problem: Problem, gpu: str, limits: Limits):
        self.problem, self.gpu, self.limits = problem, gpu, limits
        self.error = ""  # the reference's last one

    def judge(self, path: Path) -> Verdict:
        """Return the verdict on a candidate. Each time it gets other inputs."""
        verdict, token = Verdict(path.name), secrets.token_hex()
        with nogpu.emulate(self.arch) as emulator, nogpu.cuda_is_cpu(emulator):
            cases, whole = self.cases(random.SystemRandom().randrange(2**31))
            needed = [self.needed(one) for one in (*cases, whole)]
        with tempfile.TemporaryDirectory(prefix="nogpu-judge-") as name:
            folder = Path(name)
            self.write(folder, path, [*cases, whole])
            ended = confined(
                [sys.executable, "-P", str(Path(__file__).with_name("candidate_process.py")), name],
                folder,
                self.limits,
                {**os.environ, "HOME": os.environ.get("HOME", name), "TMPDIR": name},
                token.encode(),
            )
            facts = _facts(folder / "facts.json", token)
            *results, of_whole = [_result(folder / f"result_{n}.pt") for n in range(len(cases) + 1)]
        if not facts:
            return verdict.end("stopped", ended.why or "it ended before it had a result")
        try:
            self._judge(verdict, cases, whole, facts, results, of_whole, needed, ended.why)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
            said = f"{type(e).__name__}: {e}"
            return verdict.end("stopped", f"what it wrote cannot be read ({said})")
        return verdict

    def _judge(
        self,
        verdict: Verdict,
        cases: list[Case],
        whole: Case,
        facts: list[Facts],
        results: list[Any],
        of_whole: Any,
        needed: list[Needed],
        stopped: str,
    ) -> None:
        latest = facts[1] if len(facts) > 1 else facts[0]  # the first call, or the import
        if "error" in latest:
            verdict.end("does not run", _asks(latest["error"], self.problem))
            return
        if stopped or len(facts) < 2 + len(cases) or results[0] is None:
            verdict.end("stopped", stopped or NOT_RUN)
            return
        calls = facts[1:]
        self.values(verdict, cases, calls, results)
        self.given_size(verdict, whole, calls[-1], of_whole, needed[-1])
        self.faults(verdict, calls)
        self.same_twice(verdict, cases, results)
        self.memory(verdict, cases, calls, results)
        self.honesty(verdict, facts[0], calls, results, [*cases, whole], needed)
        self.figures(verdict, whole, calls[-1], needed[-1])

    @property
    def arch(self) -> str:
        return f"sm_{DATA_SHEETS[self.gpu].capability}"

    def cases(self, seed: int) -> tuple[list[Case], Case]:
        """Return the calls that are executed as a whole, and the one of the given size."""
        problem = self.problem
        given, other = (problem.inputs(seed + n) for n in range(2))
        sizes = variants.smaller(given, partial(self.accepts, seed=seed))
        base, changed = (variants.resized(one, sizes) if sizes else one for one in (given, other))
        if self.right(base, seed) is None:
            raise ProblemError(self.error)
        found = [
            self.case("values", "as given", base, seed, schedules="all"),
            self.case("values", "other numbers", changed, seed, again=True),
            self.case("values", "the first again", base, seed, again=True),
        ]
        for kind, made in (
            ("shapes", variants.shapes(base)),
            ("special values", variants.values(base)),
            ("layouts", variants.layouts(base)),
        ):
            found += [self.case(kind, name, one, seed) for name, one in made]
        whole = Case("size", "whole", given, seed, None, None)
        return [one for one in found if one is not None], whole

    def accepts(self, inputs: Inputs, seed: int) -> bool:
        """Whether the reference takes inputs; large ones are tried by their shapes alone."""
        if variants.elements(inputs) <= 8 * variants.ELEMENTS:
            return self.right(inputs, seed) is not None
        try:
            self.problem.needed(inputs, seed, "meta")
        except Exception:
            return False
        return True

    def case(self, kind: str, name: str, inputs: Inputs, seed: int, **options: Any) -> Case | None:
        """Return a case, or None if the reference does not take it."""
        native = self.right(inputs, seed)
        if native is None:
            return None
        exact, near = (
            self.right(one, seed, torch.float64) for one in (inputs, variants.rounded(inputs))
        )
        return Case(kind, name, inputs, seed, native, exact, near, **options)

    def needed(self, case: Case) -> Needed:
        """Return the reference's work: by shapes alone, if it can be called so."""
        try:
            return self.problem.needed(case.inputs, case.seed, "meta")
        except Exception:  # such as one that reads a number
            return self.problem.needed(case.inputs, case.seed, "cpu")

    def right(self, inputs: Inputs, seed: int, dtype: torch.dtype | None = None) -> Right | None:
        try:
            return self.problem.right(inputs, seed, dtype)
        except Exception as e:
            said = f"{e}".strip().partition("\n")[0]
            self.error = f"{self.problem.path.name} ends with {type(e).__name__}: {said}"
            return None

    def write(self, folder: Path, path: Path, cases: Sequence[Case]) -> None:
        """Write what the candidate's process reads: the candidate, its inputs, and settings."""
        shutil.copy(path, folder / path.name)
        models: dict[str, str] = {}
        calls = []
        for n, case in enumerate(cases):
            torch.save(case.inputs.data, folder / f"inputs_{n}.pt")
            key = str(list(case.inputs.init))
            if self.problem.form == "model" and key not in models:
                models[key] = f"model_{len(models)}.pt"
                state = self.problem.model(case.inputs.init, case.seed).state_dict()
                init = list(case.inputs.init)
                torch.save({"init": init, "seed": case.seed, "state": state}, folder / models[key])
            calls.append(
                {
                    "model": models.get(key, ""),
                    "again": case.again,
                    "schedules": case.schedules,
                    "sample": SAMPLE if case.kind == "size" else None,
                }
            )
        settings = {
            "file": path.name,
            "entry": self.problem.entry,
            "form": self.problem.form,
            "arch": self.arch,
            "gpu": self.gpu,
            "calls": calls,
        }
        (folder / "request.json").write_text(json.dumps(settings), "utf-8")

    def values(
        self,
        verdict: Verdict,
        cases: Sequence[Case],
        calls: Sequence[Facts],
        results: Sequence[Any],
    ) -> None:
        for kind in ("values", "shapes", "special values", "layouts"):
            mine = [n for n, one in enumerate(cases) if one.kind == kind]
            refused = [
                f"{cases[n].name} ({calls[n]['error'][1]})" for n in mine if "error" in calls[n]
            ]
            for n in mine:
                case, result = cases[n], results[n]
                if result is None or case.native is None:
                    continue
                given = tree_leaves(case.inputs.data)
                if found := wrong(result["outputs"], case.native, case.exact, case.near, given):
                    why = _by_tf32(calls[n], found) or _by_weights(calls[n])
                    verdict.add(kind, "wrong", f"{case.name}: {found}{why}")
                    break
            else:
                names = ", ".join(cases[n].name for n in mine if "error" not in calls[n])
                if refused:
                    verdict.add(kind, "refuses", f"{refused[0]}; right: {names or 'none'}")
                elif mine:
                    verdict.add(kind, "works", names)
                else:
                    verdict.add(kind, "not run", "the reference takes no others")

    def given_size(
        self, verdict: Verdict, whole: Case, call: Facts, result: Any, needed: Needed
    ) -> None:
        """Compare the results of the programs that were executed at the given size."""
        if "error" in call:
            kind, said = call["error"]
            is_large = kind == "TooLarge"
            verdict.add("given size", "not run" if is_large else "wrong", f"{kind}: {said}")
            return
        if result is None:
            verdict.add("given size", "not run", "several kernels, of which a sample was executed")
            return
        if needed.operators.flops > MOST_FLOPS:
            verdict.add("given size", "not run", "the reference takes too long here")
            return
        native, exact = (
            self.right(whole.inputs, whole.seed, dtype) for dtype in (None, torch.float64)
        )
        if native is None:
            verdict.add("given size", "not run", self.error)
            return
        outputs, written = result["outputs"], result["written"]
        count = sum(one.numel() for one in outputs if isinstance(one, Tensor))
        if written is not None and [_kind(one) for one in outputs] == [
            _kind(one) for one in native.outputs
        ]:
            count = sum(int(one.sum()) for one in written)
            outputs = list(map(torch.where, written, outputs, native.outputs))
        given = tree_leaves(whole.inputs.data)
        found = wrong(outputs, native, exact, None, given)
        if found:  # a rounding of the inputs may explain it
            near = self.right(variants.rounded(whole.inputs), whole.seed, torch.float64)
            found = wrong(outputs, native, exact, near, given)
        why = found and found + (_by_tf32(call, found) or _by_weights(call))
        verdict.add("given size", "wrong" if why else "works", why or f"{count:,} numbers")

    def faults(self, verdict: Verdict, calls: Sequence[Facts]) -> None:
        found = [one for call in calls for one in call["faults"]]
        errors = [one for one in found if one[0] == "error"]
        if errors:
            verdict.add("no faults", "wrong", errors[0][2])
        else:
            verdict.add(
                "no faults", "works", f"warning: {found[0][2]}" if found else "three schedules"
            )

    def same_twice(self, verdict: Verdict, cases: Sequence[Case], results: Sequence[Any]) -> None:
        names = [one.name for one in cases[:3]]
        if names[-1] != "the first again" or results[0] is None or results[2] is None:
            verdict.add("same result twice", "not run", "it was called once")
            return
        first, second = (one["outputs"] for one in (results[0], results[2]))
        if [_kind(one) for one in first] != [_kind(one) for one in second]:
            verdict.add("same result twice", "wrong", "the second one is of another kind")
            return
        for one, other in zip(first, second, strict=True):
            if isinstance(one, Tensor) and not same(one, other):
                verdict.add(
                    "same result twice",
                    "wrong",
                    f"other bits, called again: {farthest(other, one)}",
                )
                return
        verdict.add("same result twice", "works", "bit for bit, in two orders of its warps")

    def memory(
        self,
        verdict: Verdict,
        cases: Sequence[Case],
        calls: Sequence[Facts],
        results: Sequence[Any],
    ) -> None:
        found = ""
        for case, result in zip(cases, results, strict=True):
            if result is not None and case.native is not None and not found:
                given = tree_leaves(case.inputs.data)
                found = unwritten_inputs(given, result["inputs"], case.native.changed)
        verdict.add("inputs unwritten", "wrong" if found else "works", found)
        missing = next(
            (
                f"{case.name}: {call['unwritten']:,} bytes of the result were never written"
                for case, call in zip(cases, calls, strict=False)
                if call.get("unwritten")
            ),
            "",
        )
        verdict.add("outputs complete", "wrong" if missing else "works", missing)

    def honesty(
        self,
        verdict: Verdict,
        imported: Facts,
        calls: Sequence[Facts],
        results: Sequence[Any],
        cases: Sequence[Case],
        needed: Sequence[Needed],
    ) -> None:
        """Ask whether the candidate's own kernels compute, when they are called, and no trick."""
        reason = next(
            (
                f"{case.name}: {said}" if n else said
                for n, (case, call, work) in enumerate(zip(cases, calls, needed, strict=True))
                if "error" not in call
                and not case.is_degenerate
                and (said := _by_others(call, work))
            ),
            "",
        )
        verdict.add("own kernels", "cheats" if reason else "works", reason or _shares(calls[0]))
        tricks = (
            _replaced([imported, *calls]),
            _beforehand(imported, needed[0], "imported"),
            *(
                _beforehand(call["made"], work, "made")
                for case, call, work in zip(cases, calls, needed, strict=True)
                if "made" in call and not case.is_degenerate
            ),
            *map(_put_off, calls),
            _earlier(cases, results),
        )
        reason = next(filter(None, tricks), "")
        nothing = "nothing cached, replaced, put off or done beforehand"
        verdict.add("honest", "cheats" if reason else "works", reason or nothing)

    def figures(self, verdict: Verdict, whole: Case, call: Facts, needed: Needed) -> None:
        """Add counters, what the problem must take, and estimates, at the given size."""
        sheet, gpu = DATA_SHEETS[self.gpu], self.gpu
        tensors = [one for one in tree_leaves(whole.inputs.data) if isinstance(one, Tensor)]
        shape = ", ".join(str(tuple(one.shape)) for one in tensors)
        if "error" in call:
            verdict.figures["size"] = f"{shape}: not run: {call['error'][1]}"
            return
        launches = call["launches"]
        sampled = [one for one in launches if one["executed"]]
        note = f"; at most {SAMPLE} programs of a launch were executed" if sampled else ""
        verdict.figures["size"] = f"{shape}{note}"
        for one in launches[:8]:
            verdict.figures[one["kernel"]] = (
                f"{one['flops']:,.0f} operations, {one['sectors']:,} sectors, {one['resources']}"
            )
        operations, flops = needed.operators.operations, needed.operators.flops
        least_bytes = sum(one.nbytes for one in tensors) + needed.weights + needed.results
        has_tensor_cores = any(one.is_product and one.bits == 16 for one in operations)
        peak = sheet.tensor["f16"] if has_tensor_cores else sheet.flops["f32"]
        least = max(least_bytes / (sheet.memory * 1e6), flops / (peak * 1e6))
        verdict.figures["least"] = (
            f"{least_bytes:,} bytes, {flops:,.0f} operations: at least {least:.2g} µs on one {gpu}"
        )
        own = (
            sum(one["microseconds"].get(gpu, 0.0) for one in launches)
            + call["operator_microseconds"]
        )
        theirs = sum(one.microseconds(gpu) for one in operations)
        verdict.figures["estimate"] = (
            f"about {shown(own)} on one {gpu}; the reference by PyTorch's kernels about "
            f"{shown(theirs)}"
        )


def _replaced(calls: Sequence[Facts]) -> str:
    names = [name for call in calls for name in call["changed"]]
    return f"it replaces {names[0]}" if names else ""


def _beforehand(facts: Facts, needed: Needed, when: str) -> str:
    """Say what was computed before a call; "" if nothing was."""
    if facts["launches"]:
        return f"it launches {facts['launches'][0]['kernel']} when it is {when}"
    before = sum(one[1] for one in facts["operations"])
    if before > (1 - OWN) * needed.operators.flops > 0:
        return f"it computes {before:,.0f} operations when it is {when}"
    return ""


def _shares(call: Facts) -> str:
    own, aten = call["launches"], call["operations"]
    return (
        f"own kernels: {sum(one['flops'] for one in own):,.0f} operations, "
        f"{sum(one['bytes'] for one in own):,} bytes; ATen: {sum(one[1] for one in aten):,.0f}, "
        f"{sum(one[2] + one[3] for one in aten):,} bytes"
    )


def _by_others(call: Facts, needed: Needed) -> str:
    """Say that others than the candidate's own kernels compute; "" if these do."""
    own = sum(one["flops"] for one in call["launches"])
    aten = sum(one[1] for one in call["operations"])
    flops, floating = needed.operators.flops, needed.operators.floating
    most = max(call["operations"], key=lambda one: one[1], default=None)
    if not call["launches"]:
        if not needed.operators.operations or not needed.results:
            return ""
        return f"it launches no kernel{f'; {most[0]} computes' if most else ''}"
    if most and aten > (1 - OWN) * flops > 0:
        return f"ATen computes {min(aten / flops, 1):.0%} of what the reference does, by {most[0]}"
    if own < LEAST_OWN * floating:
        return f"own kernels compute {own:,.0f} operations, and the reference {floating:,.0f}"
    return ""


def _put_off(call: Facts) -> str:
    """Say what a call leaves for later; "" if nothing."""
    if call["children"]:
        return "it leaves a process that goes on after the call"
    if call["threads"]:
        return "it leaves a thread that goes on after the call"
    if call["unordered"]:
        return f"{call['unordered'][0]} runs on a stream that nothing waits for"
    kinds = [one for one in call.get("types", ()) if one not in PLAIN]
    if kinds:
        return f"its result is {kinds[0]}, which may compute when it is read; expected a tensor"
    return ""


def _earlier(cases: Sequence[Case], results: Sequence[Any]) -> str:
    """Say whether a call returned what an earlier one had, for other numbers in its memory."""
    if not (cases[1].again and results[1] is not None):
        return ""
    found = [one["outputs"] for one in results[:2]]
    wanted = [one.native.outputs for one in cases[:2] if one.native is not None]
    for mine, later, one, other in zip(*found, *wanted, strict=False):
        if same(mine, later) and not same(one, other):
            return "it returns the result of an earlier call for other numbers"
    return ""


def _by_tf32(call: Facts, found: str) -> str:
    has = any(one.get("tf32") for one in call["launches"])
    return "; tl.dot takes TF32 unless input_precision='ieee'" * (has and "error of" in found)


def _asks(error: Sequence[str], problem: Problem) -> str:
    kind, said = error
    if kind == "ModuleNotFoundError" and problem.path.stem in said:
        return f"it imports the reference ({said}), which is not there"
    return f"{kind}: {said}"


def _kind(one: object) -> object:
    return (one.shape, one.dtype) if isinstance(one, Tensor) else type(one)


def _by_weights(call: Facts) -> str:
    has_none = call.get("weights") is False
    return (
        "; its parameters are not named as the reference's, so they keep their own values"
        * has_none
    )


def _is_file(path: Path) -> bool:
    """Whether a path is a file that ends: no link, pipe or device."""
    return path.is_file() and not path.is_symlink()


def _facts(path: Path, token: str) -> list[Facts]:
    """Return what the candidate's process noted, if it knows the token that it was given."""
    try:
        written = json.loads(path.read_text("utf-8")) if _is_file(path) else {}
    except (OSError, ValueError):
        return []
    if not (isinstance(written, dict) and written.get("token") == token):
        return []
    facts = written.get("facts")
    return facts if isinstance(facts, list) else []


def _result(path: Path) -> Any:
    """Return what the candidate's process wrote, if it is tensors: a file may hold anything."""
    try:
        return torch.load(path, weights_only=True) if _is_file(path) else None
    except Exception:
        return None


def main(arguments: Sequence[str]) -> int:
    """Judge candidates, and print a table for each.

    Returns:
        0 if all are right, 1 if one is not, and 2 if the reference cannot be used.
    """
    parser = argparse.ArgumentParser(
        "python -m nogpu judge",
        description="Say whether kernels are right, honest and how fast, beside a reference.",
    )
    parser.add_argument("reference", type=Path, help="a file with Model, or with ref_kernel")
    parser.add_argument(
        "candidates", type=Path, nargs="+", help="files with ModelNew, or custom_kernel"
    )
    parser.add_argument("--gpu", choices=[*DATA_SHEETS], default="H100", help="by default H100")
    parser.add_argument(
        "--sizes", nargs="*", default=[], metavar="NAME=N", help="arguments of generate_input"
    )
    parser.add_argument("--seconds", type=float, default=Limits().seconds, help="of a candidate")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB of a candidate")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the verdicts for machines")
    options = parser.parse_intermixed_args(arguments)
    for path in (options.reference, *options.candidates):
        if not path.is_file():
            parser.error(f"{path} is no file")
    sizes = {}
    for one in options.sizes:
        name, _, value = one.partition("=")
        if not (name.isidentifier() and value.lstrip("-").isdecimal()):
            parser.error(f"--sizes {one}: expected NAME=N, such as size=1024")
        sizes[name] = int(value)
    limits = Limits(seconds=options.seconds, memory=int(options.memory * 2**30))
    verdicts = []
    try:
        with nogpu.emulate() as emulator, nogpu.cuda_is_cpu(emulator):
            problem = Problem(options.reference, sizes)
        judge = Judge(problem, options.gpu, limits)
        for path in options.candidates:
            verdicts.append(judge.judge(path))
            print(verdicts[-1], end="\n\n")
    except ProblemError as e:
        print(f"python -m nogpu judge: error: {e}", file=sys.stderr)
        return 2
    print(f"Times are estimates. {ESTIMATE_ACCURACY.partition('. ')[2]}")
    if options.json is not None:
        options.json.write_text(json.dumps([one.as_json() for one in verdicts], indent=1), "utf-8")
    return int(not all(one.ok for one in verdicts))
