# SPDX-License-Identifier: MIT
"""Call a student's functions in a process of their own, which returns plain data.

The process executes the file, and calls a function, or makes an epoch of a training, when it is
asked. Arguments and results are `plain_data`. So a result is judged by functions that no code of
the file can have replaced, in a process that goes on where the file's process ends or hangs. Where
no process is forked, as on Windows, the functions are called in this one.
"""

import os
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from threading import enumerate as threads
from threading import main_thread
from typing import Any, NoReturn, Self

import numpy as np
from numpy import errstate

from torchpar.baselines import grader
from torchpar.baselines.grader import (
    Compilation,
    Function,
    Wrong,
    calling,
    describing,
    modules_beside,
    watching,
)
from torchpar.baselines.plain_data import Packed, Unreadable, pack, unpack, writable
from torchpar.errors import ConfigError, first_line
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
IN_TRAINING = " in the training"  # behind the name of a function that a training calls

Take = Callable[[Any], Any]  # makes arrays of what a function returns
# Yields plain data after each epoch. Its first argument returns the function of a name, whose
# results are taken; the others are the training's data.
Training = Callable[..., Iterator[Any]]


class StudentsFile:
    """The functions of a student's file.

    Attributes:
        names: of the functions.
        error: the error that has ended the file's execution, or "".

    Args:
        names: of the functions that are taken from the file.
        others: the names of functions that other commands take, by command.
        training: through the functions, for `epochs`.

    Raises:
        ConfigError: the file cannot be used.
    """

    def __init__(
        self,
        path: Path,
        names: Collection[str],
        others: Mapping[str, Collection[str]],
        training: Training,
    ):
        self._path, self._file = path, str(path.resolve())
        find = partial(grader.find_functions, path, names, others)
        self._executed = _Executed(find, self._file, training)  # here, where no process is forked
        self._process: _Process | None = None
        self._ended_in: Call | None = None  # where a process has ended, or hangs
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
            limit = Call(self._file, name, grader.LIMIT + grader.PATIENCE)
            try:
                result, after = self._answer(["call", name, [*arguments]], limit)
            except GivenUp as e:
                print(f"{limit} {e.how}; {COMMAND} begins again without it", flush=True)
                raise Wrong(str(e)) from None
            write_back(arguments, after)
            return result

        return call

    def epochs(self, *data: Any) -> Iterator[Any]:
        """What a training through the functions yields, which takes these data.

        Raises:
            Wrong: an error of a function; or a call has ended the process, or has not returned.
        """
        limit = Call(self._file, "the training", grader.LIMIT + grader.PATIENCE)  # between calls
        question: list[Any] = ["begin", data]
        while True:
            try:
                result, _ = self._answer(question, limit)
            except GivenUp as e:
                name = self._ended_in.name.removesuffix(IN_TRAINING) if self._ended_in else ""
                raise Wrong(f"{name}: {e}" if name in self.names else str(e)) from None
            yield result
            question = ["go on"]

    def _execute(self) -> tuple[list[str], str]:
        """Execute the file; the names of its functions, and an error."""
        if sys.platform != "linux":
            error = self._executed.execute()
            return list(self._executed.functions), error
        self._process = _Process(partial(serve, self._executed))
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

    def _answer(self, question: object, call: Call) -> tuple[Any, object]:
        """The result that a question has, and what a call has left of its arguments.

        Args:
            call: that is waited for while the process tells of none.

        Raises:
            GivenUp: the process has ended, or does not answer.
            TooSlow, Wrong: what it answers.
        """
        if sys.platform != "linux":
            answer = unpack(self._executed.answer(pack(question)))
        else:
            if self._process is None:  # it has ended in another call
                self._execute()
            assert self._process is not None
            try:
                answer = self._process.answer(call, pack(question))
            except GivenUp:
                self._ended_in, self._process = self._process.call, None
                raise
        match answer:
            case ["result", result, after]:
                return result, after
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
        self._is_closed = False
        self._child = Child(pid, read, COMMAND, self._dump)

    @property
    def call(self) -> Call | None:
        """The call that the process has told last."""
        return self._child.call

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
        """Let the process end, and its threads; or kill it, if it is lost. Once is enough."""
        if self._is_closed:  # as after Ctrl-C, while it was asked
            return
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
        self._is_closed = True
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


class _Executed:
    """A file in the process that executes it."""

    def __init__(self, find: Callable[[], grader.Loaded], file: str, training: Training):
        self._find, self.file, self._training = find, file, training
        self.functions: Mapping[str, Function] = {}
        self._epochs: Iterator[Any] = iter(())

    def execute(self) -> str:
        """Execute the file; the error that has ended that, or ""."""
        self.functions, error = self._find()
        return error

    def answer(self, question: bytes) -> bytes:
        """Call a function, or make an epoch of a training."""
        try:
            match writable(unpack(question)):
                case ["call", name, arguments]:
                    return pack(["result", self._called(name, arguments), arguments])
                case ["begin", data]:
                    self._epochs = self._training(self._in_training, *data)
            return pack(["result", self._epoch(), None])
        except Wrong as e:
            return pack(["wrong", str(e)])
        except TooSlow as e:
            return pack(["slow", str(e)])
        except Interrupted:
            return pack(["interrupted"])

    def _function(self, name: str) -> Function:
        if name not in self.functions:
            raise Wrong("it is missing when the file is executed once more")
        return self.functions[name]

    def _called(self, name: str, arguments: Sequence[Any]) -> Packed:
        function = self._function(name)
        with errstate(all="ignore"), calling(self.file, name, grader.LIMIT, function):
            # In the block, since to pack a result calls methods of its class.
            return Packed(function(*arguments))

    def _epoch(self) -> Any:
        """What the training yields next."""
        with errstate(all="ignore"), describing(self.file):
            try:
                return next(self._epochs)
            except Wrong:
                raise
            except Exception as e:  # of results of any kind
                raise Wrong(f"results do not fit: {first_line(e)}") from None

    def _in_training(self, name: str, take: Take) -> Function:
        """A function that calls the student's, and tells the parent so, which may give it up.

        A training makes ten thousands of calls, and sets no timer for any of them.
        """
        function, label = self._function(name), name + IN_TRAINING

        def call(*arguments: Any) -> Any:
            with (
                watching(self.file, label, grader.LIMIT) as tell,
                Compilation(tell).watched(),
                describing(self.file, function),
            ):
                # In the block, since to take a result calls methods of its class.
                return take(function(*arguments))

        return call


def serve(executed: _Executed, ends: _Ends) -> int:
    """Execute a file, and answer questions, until none can follow."""
    try:
        error = executed.execute()
        ends.answer(pack(["functions", list(executed.functions), error]))
    except ConfigError as e:
        ends.answer(pack(["refused", str(e)]))
    except Interrupted:
        ends.answer(pack(["interrupted"]))
    with modules_beside(executed.file):
        for question in ends.questions():
            ends.answer(executed.answer(question))
    return 0
