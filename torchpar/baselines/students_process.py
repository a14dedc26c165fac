# SPDX-License-Identifier: MIT
"""Call a student's functions in a process of their own, which returns plain data.

The process executes the file, and calls a function when it is asked. Arguments and results are
`plain_data`. So a result is judged by functions that no code of the file can have replaced, in a
process that goes on where the file's process ends or hangs. Where no process is forked, as on
Windows, the functions are called in this one.
"""

import math
import os
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from threading import enumerate as threads
from threading import main_thread
from typing import Any, NoReturn, Self

import numpy as np
from numpy import errstate

from torchpar.baselines import grader
from torchpar.baselines.grader import Function, Wrong, calling, describing, modules_beside
from torchpar.baselines.plain_data import Packed, Unreadable, pack, unpack, writable
from torchpar.errors import ConfigError
from torchpar.parallel.launch.guard import (
    CLOSED,
    TOP,
    WATCHED,
    Call,
    Child,
    GivenUp,
    Interrupted,
    TooSlow,
    advice,
    fork,
    outcome,
    watched,
)

COMMAND = "the check"  # whose process it is, in messages of the guard
UNREADABLE = "its process sends what cannot be read"


class StudentsFile:
    """The functions of a student's file.

    Attributes:
        names: of the functions.
        error: the error that has ended the file's execution, or "".

    Args:
        names: of the functions that are taken from the file.
        others: the names of functions that other commands take, by command.

    Raises:
        ConfigError: the file cannot be used.
    """

    def __init__(self, path: Path, names: Collection[str], others: Mapping[str, Collection[str]]):
        self._path, self._file = path, str(path.resolve())
        self._find = partial(grader.find_functions, path, names, others)
        self._process: _Process | None = None
        self._own: Mapping[str, Function] = {}  # where no process is forked
        self.names, self.error = self._execute()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._process is not None:
            self._process.close(is_lost=kind is not None)

    def function(self, name: str) -> Function:
        """A function that calls the student's. What that changes in its arguments is changed here.

        Raises:
            TooSlow: it takes longer than the grader's limit.
            Wrong: an error of the function, with its line; or the call has ended its process, or
                has not returned.
        """

        def call(*arguments: Any) -> Any:
            (result,), after = self._results([(name, *arguments)], in_training=False)
            write_back(arguments, after)
            return result

        return call

    def together(self, *calls: tuple[Any, ...]) -> list[Any]:
        """The results of several calls in a training, each of a name and arguments.

        They may take longer than single calls, and what they change stays there.

        Raises:
            Wrong: an error of a function.
        """
        return self._results(calls, in_training=True)[0]

    def _execute(self) -> tuple[list[str], str]:
        """Execute the file; the names of its functions, and an error."""
        if sys.platform != "linux":
            self._own, error = self._find()
            return list(self._own), error
        self._process = _Process(partial(serve, self._find, self._file))
        try:
            seconds = grader.TOP_LEVEL + grader.PATIENCE
            answer = self._process.answer(Call(self._file, TOP, seconds))
        except GivenUp as e:
            self._process = None
            how = f"its top level {e.how}{advice(e, at_top=True)}"
            raise ConfigError(f"--with {self._path}: {how}") from None
        match answer:
            case ["functions", [*names], str() as error]:
                return list(map(str, names)), in_a_line(error)
        self._process.close(is_lost=True)
        self._process = None
        match answer:
            case ["refused", str() as reason]:
                raise ConfigError(in_a_line(reason))
            case ["interrupted"]:
                raise KeyboardInterrupt
        raise ConfigError(f"--with {self._path}: {UNREADABLE}")

    def _results(
        self, calls: Sequence[tuple[Any, ...]], in_training: bool
    ) -> tuple[list[Any], object]:
        """The results of calls, and what they have left of the arguments of the last one."""
        names = [name for name, *_ in calls]
        question = pack([in_training, [[name, arguments] for name, *arguments in calls]])
        if sys.platform != "linux":
            answer = unpack(answered(self._own, self._file, question))
        else:
            if self._process is None:  # it has ended in another call
                self._execute()
            assert self._process is not None
            call = call_of(self._file, names, in_training)
            try:
                answer = self._process.answer(call, question)
            except GivenUp as e:
                at, self._process = self._process.place, None
                if in_training:
                    name = names[at if at < len(names) else 0]
                    raise Wrong(f"{name}: {e}") from None
                print(f"{call} {e.how}; {COMMAND} begins again without it", flush=True)
                raise Wrong(str(e)) from None
        match answer:
            case ["results", [*results], after] if len(results) == len(calls):
                return results, after
            case ["wrong", str() as reason]:
                raise Wrong(in_a_line(reason))
            case ["slow", str() as reason]:
                raise TooSlow(in_a_line(reason))
            case ["interrupted"]:
                raise KeyboardInterrupt
        raise Wrong(UNREADABLE)


def in_a_line(text: str) -> str:
    """A text of another process, which is to be printed."""
    return "".join(one if one.isprintable() else " " for one in text)


def write_back(arguments: Sequence[Any], after: object) -> None:
    """Let arguments be what a call has left of its copies.

    Raises:
        Wrong: an array has another shape, or an argument is none any more.
    """
    if not isinstance(after, list) or len(after) != len(arguments):
        raise Wrong(UNREADABLE)
    for i, (one, changed) in enumerate(zip(arguments, after, strict=True), 1):
        if isinstance(one, list) and isinstance(changed, list):
            one[:] = changed
        elif isinstance(one, np.ndarray):
            if not isinstance(changed, np.ndarray) or changed.shape != one.shape:
                raise Wrong(f"it changes the shape of its argument {i}; write to a new array")
            one[...] = changed


class _Process:
    """A process that answers questions by the function ``serve`` of the two pipes' ends and of the
    files, in which questions and answers lie."""

    def __init__(self, serve: Callable[["_Ends"], int]):
        self._dump = TemporaryFile()  # noqa: SIM115  # until the process ends
        questions, answers = (os.memfd_create(name) for name in ("questions", "answers"))
        read, write = os.pipe()
        asked, self._ask = os.pipe()
        pid = fork()
        if pid == 0:
            os.close(read)
            os.close(self._ask)
            run(partial(serve, _Ends(asked, questions, answers)), write, self._dump)
        os.close(write)
        os.close(asked)
        self._questions, self._answers = questions, answers
        self.place = 0  # of the call in which the process has ended, among those of the question
        self._child = Child(pid, read, COMMAND, self._dump)

    def answer(self, call: Call, question: bytes | None = None) -> Any:
        """The answer to a question, or without one, what the process tells first.

        Raises:
            GivenUp: the process ends before, does not answer, or answers something else. It is
                lost then.
        """
        child = self._child
        child.answer, child.done, child.asked, child.call = None, None, call, call
        if question is not None:
            write_whole(self._questions, question)
            with suppress(BrokenPipeError):  # the process has ended
                os.write(self._ask, b"%d\n" % len(question))
        try:
            lost = outcome(child)
        except BaseException:
            self.close(is_lost=True)
            raise
        if child.answer is None:
            self._free()
            raise lost if isinstance(lost, GivenUp) else GivenUp("ends its process", False)
        try:
            return unpack(read_whole(self._answers, child.answer.get("size")))
        except Unreadable:
            self.close(is_lost=True)
            raise GivenUp("writes to a file that it has not opened", False) from None

    def close(self, is_lost: bool) -> None:
        """Let the process end, and its threads; or kill it, if it is lost."""
        child = self._child
        child.answer = child.asked = child.call = None
        if is_lost:
            child.kill()
        else:
            os.close(self._ask)
            self._ask = -1
            outcome(child)
        self._free()

    def _free(self) -> None:
        self.place = int.from_bytes(os.pread(self._answers, 1, 0))
        for number in (self._child.pipe, self._questions, self._answers, self._ask):
            if number >= 0:
                os.close(number)
        self._dump.close()


class _Ends:
    """The child's ends: the pipe by which it is asked, and the files of questions and answers."""

    def __init__(self, asked: int, questions: int, answers: int):
        self._asked, self._questions, self._answers = asked, questions, answers

    def questions(self) -> Iterator[bytes]:
        while line := os.read(self._asked, 100):
            yield bytes(read_whole(self._questions, int(line)))

    def begin(self, place: int) -> None:
        """Say which of a question's calls begins, for the case that it ends this process."""
        os.pwrite(self._answers, bytes([place]), 0)

    def answer(self, data: bytes) -> None:
        write_whole(self._answers, data)
        WATCHED.tell({"size": len(data)})


def write_whole(number: int, data: bytes) -> None:
    """Write a file from its start."""
    view, done = memoryview(data), 0
    while done < len(data):
        done += os.pwrite(number, view[done:], done)


def read_whole(number: int, size: object) -> bytearray:
    """The first bytes of a file.

    Raises:
        Unreadable: it does not have so many.
    """
    if type(size) is not int or not 0 <= size <= os.fstat(number).st_size:
        raise Unreadable(f"{size!r} bytes that cannot be read")
    data, done = bytearray(size), 0
    while done < size:
        done += os.preadv(number, [memoryview(data)[done:]], done)
    return data


def run(serve: Callable[[], int], pipe: int, dump: Any) -> NoReturn:
    """Serve in a child, and end it when its threads have ended."""
    status = 1
    try:
        status = watched(serve, COMMAND, pipe, dump)
        for one in threads():
            if one is not main_thread() and not one.daemon:
                one.join()
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:  # a reader's call has closed a file of ours
        status = CLOSED
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)


def serve(find: Callable[[], grader.Loaded], file: str, ends: _Ends) -> int:
    """Execute a file, and call its functions, until no question can follow."""
    functions: Mapping[str, Function] = {}
    try:
        functions, error = find()
        ends.answer(pack(["functions", list(functions), error]))
    except ConfigError as e:
        ends.answer(pack(["refused", str(e)]))
    except Interrupted:
        ends.answer(pack(["interrupted"]))
    with modules_beside(file):
        for question in ends.questions():
            ends.answer(answered(functions, file, question, ends.begin))
    return 0


def answered(
    functions: Mapping[str, Function],
    file: str,
    question: bytes,
    begin: Callable[[int], None] = lambda place: None,
) -> bytes:
    """Call the functions that a question names; the answer."""
    in_training, calls = writable(unpack(question))
    limited = watched_by_parent if in_training else watched_here
    results: list[Any] = []
    try:
        for place, (name, arguments) in enumerate(calls):
            if name not in functions:
                raise Wrong("it is missing when the file is executed once more")
            begin(place)
            with errstate(all="ignore"), limited(file, name, functions[name]):
                # In the block, since to pack a result calls methods of its class.
                results.append(Packed(functions[name](*arguments)))
        return pack(["results", results, None if in_training else arguments])
    except Wrong as e:
        return pack(["wrong", str(e)])
    except TooSlow as e:
        return pack(["slow", str(e)])
    except Interrupted:
        return pack(["interrupted"])


@contextmanager
def watched_here(file: str, name: str, function: Function) -> Iterator[None]:
    """Call a function in the block, for a limited time."""
    with calling(file, name, grader.LIMIT, function):
        yield


@contextmanager
def watched_by_parent(file: str, name: str, function: Function) -> Iterator[None]:
    """Call a function in the block, of which the parent is told nothing but compilations.

    A training makes ten thousands of calls. The parent knows each, and gives it up.
    """
    process, call = os.getpid(), call_of(file, [name], in_training=True)

    def tell(has_begun: bool) -> None:
        WATCHED.tell(call._replace(seconds=math.inf) if has_begun else call)

    try:
        with grader.Compilation(tell).watched(), describing(file, function):
            yield
    finally:
        if os.getpid() != process:  # a fork of the function's, which must not answer
            os._exit(0)


def call_of(file: str, names: Sequence[str], in_training: bool) -> Call:
    """A call, or several, which are given up some time after the limit of one."""
    label = " and ".join(names) + " in the training" * in_training
    return Call(file, label, grader.LIMIT + grader.PATIENCE)
