# SPDX-License-Identifier: MIT
"""Run a script's Triton kernels without a GPU: ``python -m nogpu SCRIPT``."""

import argparse
import concurrent.futures.thread
import os
import runpy
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from types import FrameType, TracebackType
from typing import TextIO

import torch

from nogpu.console import breaking_silence
from nogpu.cuda.advice import (
    NEEDS_CUDA,
    advise,
    advise_numba,
    fault_of_numba,
    is_of_cpp,
    says_cuda,
    why_simulated,
)
from nogpu.cuda.stand_in import cuda_is_cpu
from nogpu.data_sheets import ARCHITECTURES
from nogpu.machine.program_sample import LEAST
from nogpu.report import replay_page
from nogpu.report.findings import findings_of, merged
from nogpu.report.github import annotations
from nogpu.report.launch_recording import PROGRAMS, NotRecorded, as_json
from nogpu.report.report import Report
from nogpu.report.sarif import as_sarif
from nogpu.triton.driver import how_far
from nogpu.triton.emulate import OPERATORS, emulate, why_not_compiled
from nogpu.triton.emulator import Emulator
from nogpu.version import __version__

WITHIN = "only kernels that the script's own process launches are executed"
INNER = "the script's own emulate or check_kernel reports its launches"

# What a file of the report is, and how its name ends; others are not overwritten.
FILES = {
    "report": ("page", ".html", ".htm"),
    "replay": ("page", ".html", ".htm"),
    "json": ("file of JSON", ".json"),
    "sarif": ("file of SARIF", ".sarif", ".json"),
}


def main(arguments: Sequence[str]) -> int:
    """Run a script, and print what its kernels do wrong.

    Returns:
        1 if there is an error, and 0 for warnings and notes.
    """
    parser = argparse.ArgumentParser(
        "python -m nogpu",
        description="Run a script whose kernels, in Triton, CUDA C++ or numba.cuda, are compiled "
        "for a GPU and executed here. With a .cu file instead, say how its kernels are launched.",
        epilog="python -m nogpu judge --help: judge kernels of others against a reference",
    )
    parser.add_argument("--version", action="version", version=f"nogpu {__version__}")
    _add_ways(parser)
    _add_outputs(parser)
    parser.add_argument("script", type=Path, help="a file of Python")
    flags = parser.add_argument("flags", nargs=argparse.REMAINDER, help="the script's own")
    flags.required = False  # or a message says that it is
    options = parser.parse_args(arguments)
    if arguments[-len(options.flags) - 1] == "--":  # behind the script, argparse drops it
        options.flags.insert(0, "--")
    options.arguments = list(arguments)
    if fault := _fault_of(options):
        parser.error(fault)
    for name in FILES:
        if (file := getattr(options, name)) is not None:
            setattr(options, name, file.absolute())  # the script may change the folder
    _note_flags_behind(parser, options.flags)
    # The script may set another stdout, or close it.
    before, process, stdout = (sys.argv, list(sys.path)), os.getpid(), sys.stdout
    others = set(threading.enumerate())
    with (
        _terminable(),
        emulate(
            options.arch,
            options.schedules,
            traces=PROGRAMS if options.replay is not None else int(options.report is not None),
            configurations=options.configurations,
            sample=options.sample,
            operators=options.operators,
        ) as gpu,
    ):
        try:
            sys.argv = [str(options.script), *options.flags]
            sys.path.insert(0, str(options.script.resolve().parent))
            with (
                breaking_silence(how_far),
                cuda_is_cpu(gpu) if options.cuda_is_cpu else nullcontext(),
            ):
                try:
                    runpy.run_path(str(options.script.absolute()), run_name="__main__")
                finally:
                    _join_threads(others)
        except BaseException as e:
            if os.getpid() != process:  # a fork of the script, which has no report
                raise
            if not isinstance(e, SystemExit) or e.code:
                status = _end_early(e, gpu, options, stdout)
                if status is not None:
                    return status
                raise
        finally:
            sys.argv, sys.path[:] = before
    if os.getpid() != process:
        return 0
    report = gpu.report()
    _show(report, options, stdout, _why_nothing(gpu, options))
    return int(bool(report.errors))


def _add_ways(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how kernels and operators are executed."""
    parser.add_argument("--arch", choices=ARCHITECTURES, default="sm_90", help="by default sm_90")
    parser.add_argument(
        "--schedules",
        choices=("one", "all"),
        default="one",
        help="all: execute each launch three times, in other orders",
    )
    parser.add_argument(
        "--configurations",
        choices=("first", "all"),
        default="first",
        help="all: execute every configuration of autotuned kernels",
    )
    parser.add_argument(
        "--operators",
        choices=OPERATORS,
        default="cpu",
        help="float32: let PyTorch's operators on bfloat16 and float16 round once",
    )
    parser.add_argument("--cuda-is-cpu", action="store_true", help='let device="cuda" mean the CPU')
    parser.add_argument(
        "--sample",
        type=_size_of_sample,
        metavar="N",
        help="execute at most N programs of a launch, and scale what is counted",
    )


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is printed and written."""
    parser.add_argument(
        "--counters", action="store_true", help="print what each kernel's first launch does"
    )
    parser.add_argument(
        "--time", action="store_true", help="estimate the time of each kernel's first launch"
    )
    parser.add_argument("--launches", action="store_true", help="list each launch, too")
    parser.add_argument("--report", type=_file, metavar="FILE", help="write the report as a page")
    parser.add_argument(
        "--replay",
        type=_file,
        metavar="FILE",
        help="write a page that plays the first launch with an error, or the first one",
    )
    parser.add_argument("--json", type=_file, metavar="FILE", help="write the report for machines")
    parser.add_argument("--sarif", type=_file, metavar="FILE", help="write the faults as SARIF")
    parser.add_argument(
        "--annotate", choices=("github",), help="print each fault as an annotation of its line"
    )


def _end_early(
    error: BaseException, gpu: Emulator, options: argparse.Namespace, stdout: TextIO
) -> int | None:
    """Show the report of a script that an error has ended.

    Returns:
        The exit status, or None where the traceback of the error ends the process.
    """
    of_numba = advise_numba(error, options.cuda_is_cpu)
    if of_numba and not torch.cuda.is_available():
        fault = fault_of_numba(error, of_numba)
        gpu.note(fault, (fault.name, fault.source))
        _show(gpu.report(), options, stdout, "")
        print(f"python -m nogpu: error: {of_numba}", file=sys.stderr)
        return 1
    advice = advise(error) if _lacks_cuda(error, options, gpu) else ""
    _show(gpu.report(), options, stdout, advice)
    if isinstance(error, KeyboardInterrupt):
        return 130
    _begin_in_script(error, str(options.script.absolute()))
    return None


def _note_flags_behind(parser: argparse.ArgumentParser, flags: Sequence[str]) -> None:
    """Say that a flag of this command is the script's if it stands behind the script."""
    own = {one for action in parser._actions for one in action.option_strings} - {
        "-h",
        "--help",
        "--version",
    }
    if behind := [one for one in flags if one.partition("=")[0] in own]:
        print(
            f"{behind[0]} stands behind the script, which takes it; a flag of {parser.prog} stands "
            "before the script",
            file=sys.stderr,
        )


def _begin_in_script(error: BaseException, script: str) -> None:
    """Let the traceback that ends the process begin in the script, as when Python runs it.

    The frames before are those of this command and of `runpy`. Where the script cannot be parsed,
    there are no others.
    """
    if isinstance(error, SystemExit):  # it has no traceback
        return
    hook = sys.excepthook

    def show(kind: type[BaseException], e: BaseException, trace: TracebackType | None) -> None:
        sys.excepthook, found = hook, trace
        while found is not None and found.tb_frame.f_code.co_filename != script:
            found = found.tb_next
        is_not_parsed = isinstance(e, SyntaxError) and e.filename == script
        if e is error and (found is not None or is_not_parsed):
            hook(kind, e.with_traceback(found), found)
        else:
            hook(kind, e, trace)

    sys.excepthook = show


def _size_of_sample(text: str) -> int:
    if not text.isdecimal() or int(text) < LEAST:
        raise argparse.ArgumentTypeError(f"is {text}, expected an integer from {LEAST} on")
    return int(text)


def _file(text: str) -> Path:
    if text == "-":
        raise argparse.ArgumentTypeError(
            "is -, the standard output, where the script prints, too; name a file"
        )
    return Path(text)


def _why_nothing(gpu: Emulator, options: argparse.Namespace) -> str:
    """Say why a script has launched no program, as far as is known."""
    if gpu.empty:
        return f"{gpu.empty[0]}; give the number of programs in each dimension"
    if gpu.has_inner:
        return INNER
    if _is_simulated():
        return why_simulated()
    return WITHIN if options.cuda_is_cpu else NEEDS_CUDA


def _is_simulated() -> bool:
    """Whether Numba's simulator executes the script's kernels of numba.cuda."""
    return bool(getattr(sys.modules.get("numba.core.config"), "ENABLE_CUDASIM", False))


def _lacks_cuda(error: BaseException, options: argparse.Namespace, gpu: Emulator) -> bool:
    """Whether a script has ended because it says "cuda", and the flag is missing."""
    if options.cuda_is_cpu or torch.cuda.is_available() or isinstance(error, SyntaxError):
        return False
    if is_of_cpp(error):
        return False
    if says_cuda(error):
        return True
    if _is_simulated():
        return False
    # or it ends for another reason
    has_launched = bool(gpu.launches or gpu.graphs or gpu.empty)
    text = options.script.read_text("utf-8", errors="replace")
    return not has_launched and "cuda" in text.replace("nogpu.cuda", "")


def _join_threads(others: set[threading.Thread]) -> None:
    """Wait for the script's threads, as Python does at its end: they may launch kernels.

    ``others`` were there before the script. The threads of pools wait for work until Python ends.
    """
    of_pools = getattr(concurrent.futures.thread, "_threads_queues", {})
    for thread in threading.enumerate():
        if not (thread in others or thread.daemon or thread in of_pools):
            thread.join()


def _fault_of(options: argparse.Namespace) -> str:
    """Return what is wrong with the arguments, and what to do; "" if nothing is."""
    if not options.script.is_file():
        return f"{options.script} is no file; name a Python script, or a file of CUDA C++"
    if reason := why_not_compiled():
        return reason
    return _fault_of_files(options)


def _fault_of_files(options: argparse.Namespace) -> str:
    """Return what is wrong with the files that are to be written; "" if nothing is."""
    given = {name: file for name in FILES if (file := getattr(options, name)) is not None}
    if options.replay is not None and options.replay.suffix.lower() == ".json":
        return (
            f"--replay {options.replay} would be the page and its recording, which ends in .json; "
            "name a file that ends in .html"
        )
    written = {f"--{name}": file for name, file in given.items()}
    if options.replay is not None:
        written["the recording of --replay"] = options.replay.with_suffix(".json")
    for one, other in combinations(written, 2):
        if written[one].resolve() == written[other].resolve():
            return f"{one} and {other} both name {written[other]}; name two files"
    for name, file in given.items():
        what, *endings = FILES[name]
        beside = file.with_suffix(".json") if name == "replay" else file
        if file.is_dir() or beside.is_dir() or not file.resolve().parent.is_dir():
            return f"--{name} {file} cannot be written; name a file in a folder"
        if file.is_file() and file.suffix.lower() not in endings:
            return (
                f"--{name} {file} exists, and is no {what}; name a file that ends in {endings[0]}"
            )
    return ""


class _Ended(SystemExit):
    """SIGTERM was received."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the script as an exception does, so that the report is shown."""
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:
            raise _Ended(128 + number)
        signal.signal(number, signal.SIG_DFL)  # a fork of the script, which has no report
        os.kill(os.getpid(), number)

    def again_if_lost(raised: "sys.UnraisableHookArgs") -> None:
        """Let it come once more after a destructor, since Python drops what that raises."""
        if not isinstance(raised.exc_value, _Ended):
            hook(raised)
            return
        main, number = threading.main_thread().ident, signal.SIGTERM
        threading.Timer(0.1, signal.pthread_kill, (main, number)).start()  # after this function

    is_main = threading.current_thread() is threading.main_thread()  # others may set no handler
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    hook, sys.unraisablehook = sys.unraisablehook, again_if_lost
    try:
        yield
    finally:
        if sys.unraisablehook is again_if_lost:
            sys.unraisablehook = hook
        if signal.getsignal(signal.SIGTERM) is end:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _show(report: Report, options: argparse.Namespace, stdout: TextIO, advice: str) -> None:
    """Print the report, and write its files, also if nobody reads what is printed.

    Args:
        advice: where the script has ended without a launch.
    """
    is_empty = not (report.launches or report.graphs or report.faults)
    try:
        sys.stdout = sys.stderr if stdout.closed else stdout
        if options.counters and report.launches:
            print(report.counted(), end="\n\n")
        if options.time and report.launches:
            print(report.timed(), end="\n\n")
        print(report.as_text(options.launches))
        if advice and is_empty:
            print(f"no kernel was launched{' here' if advice is INNER else ''}; {advice}")
        for line in annotations(merged(findings_of(report.faults))) if options.annotate else ():
            print(line)
    finally:
        _write_files(report, options, is_empty)


def _write_files(report: Report, options: argparse.Namespace, is_empty: bool) -> None:
    """Write the files of the report; of an empty one, some are left out, with a word on it."""
    if options.json is not None:
        _write(options.json, report.as_json())
    if options.sarif is not None:
        _write(options.sarif, as_sarif(merged(findings_of(report.faults))))
    if options.report is not None and is_empty:
        print(f"{options.report} is not written: no kernel was launched", file=sys.stderr)
    elif options.report is not None:
        if find_spec("matplotlib") is None:
            lacks = "has no pictures: matplotlib is not installed; pip install matplotlib"
            print(f"{options.report} {lacks}", file=sys.stderr)
        _write(options.report, report.as_html(str(options.script)))
    if options.replay is not None:
        _write_replay(report, options)


def _write_replay(report: Report, options: argparse.Namespace) -> None:
    """Write the page of a launch, and beside it the recording for Perfetto."""
    command = shlex.join(["python", "-m", "nogpu", *options.arguments])
    try:
        made = report.recording(str(options.script), command)
    except NotRecorded:
        reason = "no program was executed" if report.launches else "no kernel was launched"
        print(f"{options.replay} is not written: {reason}", file=sys.stderr)
        return
    _write(options.replay.with_suffix(".json"), as_json(made))
    _write(options.replay, replay_page.page([made]))


def _write(path: Path, text: str) -> None:
    """Write a file; an earlier one stays as it is if that fails."""
    is_whole = path.is_file() or not path.exists()  # and not a device or a pipe
    file = path.resolve() if is_whole else path  # a link stays one, and a pipe has no other name
    written = file.with_name(f"{file.name}.{os.getpid()}") if is_whole else file
    try:
        try:
            written.write_text(text, "utf-8", errors="replace")  # names may be no UTF-8
            if is_whole:
                written.replace(file)
        finally:
            if is_whole:
                written.unlink(missing_ok=True)
    except OSError as e:
        reason = f"{path} cannot be written ({e.strerror}); name another file"
        sys.exit(f"python -m nogpu: error: {reason}")
