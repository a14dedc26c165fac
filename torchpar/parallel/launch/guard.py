# SPDX-License-Identifier: MIT
"""Run a reader's code in a child process, and name the call that ends it or never returns.

A reader's function may end its process, as by os._exit or a fault of compiled code. It may never
return, also where Python cannot stop it: a handler of a signal is called after compiled code has
returned. It may return twice, after os.fork. So a command runs in a child process, which tells this
one when it calls a reader's function, and when the function has returned. This process names a call
in which the child has ended or hangs. Then it starts another child without that call, or ends. Last
the child tells its exit status, which stays, however the process ends then: a handler of atexit may
call os._exit(0).
"""

import faulthandler
import json
import math
import os
import re
import select
import signal
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from threading import enumerate as threads
from threading import main_thread
from typing import IO, Any, NamedTuple, TypeVar

from torchpar.errors import TorchparError
from torchpar.parallel.launch.processes import Terminated, die_with_parent

T = TypeVar("T")
NOTICE = 15.0  # seconds of a call, after which a line says what is waited for
GRACE = 3.0  # seconds to end after a signal; a command outside of a call has four times as many
TICK = 0.5  # seconds after which the child is looked at, although it has told nothing
TOP = "its top level"  # the name of a call that executes a file
CLOSED = 97  # the exit status of a child that cannot tell or print any more
AS_EXIT = "as os._exit does"  # how a child has ended that tells no end
# What to do about a function, or a file's top level, that ends the process.
RETURN = "return the result instead"
BEHIND_MAIN = 'put that behind if __name__ == "__main__"'
PACKAGE = Path(__file__).parents[2]
# Folders of code that is no reader's: a traceback names no line of theirs.
LIBRARIES = (
    *(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    *map(str, (PACKAGE, PACKAGE.parent / "benchmarks")),
)


class Call(NamedTuple):
    """A call of a reader's function, which is given up after ``seconds``.

    Attributes:
        shown: the seconds that the notice names instead of ``seconds``, because the call ends
            itself after them.
    """

    file: str
    name: str
    seconds: float
    shown: float | None = None

    def __str__(self) -> str:
        return f"{Path(self.file).name}: {self.name}"


class Done(NamedTuple):
    """What a child tells last: its exit status, and the threads that its end waits for."""

    status: int
    threads: str


class GivenUp(Exception):
    """A call would not return, or would end the process, as it did in a child before.

    Attributes:
        how: what it did, such as "does not end within 60 s".
        is_endless: it did not return, and did not end the process.
    """

    def __init__(self, how: str, is_endless: bool):
        self.how, self.is_endless = how, is_endless
        super().__init__(f"it {how}{advice(self)}")


class TooSlow(BaseException):
    """A call took longer than its limit. No ``except Exception`` of a reader catches it."""


class Interrupted(KeyboardInterrupt):
    """A child was interrupted, as by Ctrl-C. A reader's code raises plain KeyboardInterrupts."""


def is_readers(error: BaseException) -> bool:
    """Whether an error of a reader's call is the reader's, and no limit and no signal of ours.

    In a process that nobody watches, other errors than Exceptions and SystemExits may be those of
    anybody's handler of a signal.
    """
    # `isinstance` would ask the error, too, whose class may say anything.
    if WATCHED.pipe is None:
        return issubclass(type(error), Exception | SystemExit)
    return not issubclass(type(error), TooSlow | Terminated | Interrupted)


def advice(error: BaseException, at_top: bool = False) -> str:
    """What to do about an error, as "; return the result instead"; "" if the error says that.

    Args:
        at_top: it has ended the top level of a file, and no function.
    """
    kind = type(error)
    if at_top:
        return f"; {BEHIND_MAIN}" if issubclass(kind, TooSlow | GivenUp) else ""
    is_exit = isinstance(error, GivenUp) and error.how.endswith(AS_EXIT)
    return f"; {RETURN}" if is_exit or issubclass(kind, SystemExit) else ""


# The child's side


class Watched:
    """The child's side: it tells its parent of calls.

    Attributes:
        pipe: to the parent, or None where nobody watches.
        given_up: by file and name, the calls that earlier children did not return from.
        call: the innermost one that has not returned, or None.
        limit: seconds of a call that names no others.
        said: the lines that earlier children have printed by `say`.
        progress: such as "3 of 40 rows are done", or "".
        streams: the command's output streams.
        has_called: whether there was a call.
    """

    def __init__(self) -> None:
        self.pipe: int | None = None
        self.given_up: dict[tuple[str, str], GivenUp] = {}
        self.call: Call | None = None
        self.limit = math.inf
        self.said = set[str]()
        self.progress = ""
        self.streams: Streams | None = None
        self.has_called = False

    def say(self, line: str) -> None:
        """Print a line, unless an earlier child has printed it."""
        if line not in self.said:
            print(line, flush=True)
            self.tell(line)

    def tell(self, message: "Message") -> None:
        """Tell that a function is called, that none is called any more, a line, an answer, or the
        end.

        What was printed before is flushed, for it would be lost if this process is killed. If
        stdout or the pipe is closed, this process ends in silence, and its parent names the call.
        """
        if self.pipe is not None:
            try:
                if self.streams is not None and self.streams.stdout is not None:
                    with suppress(OSError):  # the next `print` raises it
                        self.streams.stdout.flush()
                os.write(self.pipe, encoded(message))
            except (OSError, ValueError):  # a reader's call has closed it
                os._exit(CLOSED)

    @contextmanager
    def calling(
        self, file: str, name: str, seconds: float | None = None, shown: float | None = None
    ) -> Iterator[Callable[[bool], None]]:
        """Call a reader's function in the block. A process that the block forks ends with it.

        Args:
            seconds: after which the call is given up; by default ``limit``.
            shown: the seconds that the notice names instead, because the call ends itself.

        Yields:
            a function that takes whether the reader's is being compiled, which may take any time.

        Raises:
            GivenUp: an earlier child did not return from this call.
        """
        if known := self.given_up.get((file, name)):
            raise GivenUp(known.how, known.is_endless)
        process, outer = os.getpid(), self.call
        before = sys.stdout, sys.stderr
        self.has_called = True
        self.call = call = Call(file, name, self.limit if seconds is None else seconds, shown)

        def compiling(has_begun: bool) -> None:
            self.tell(call._replace(seconds=math.inf) if has_begun else call)

        compiling(False)
        try:
            yield compiling
        finally:
            if os.getpid() != process:  # what follows is that process's, too
                os._exit(0)
            self.call = outer
            if self.streams is not None:
                self.streams.restore(*before)
            self.tell(outer)

    def counted(self, items: Sequence[T], what: str, total: int) -> Iterator[T]:
        """The items; ``progress`` says how many of ``total`` are done."""
        for done, item in enumerate(items):
            self.progress = f"{done} of {total} {what} are done"
            yield item
        self.progress = f"{len(items)} of {total} {what} are done"

    def how_far(self) -> str:
        """The progress, and the call, as `torchpar.console.breaking_silence` takes them."""
        return "; ".join(filter(None, (self.progress, str(self.call or ""))))


class Streams:
    """The output streams of a command, whose lines a reader's code must not lose.

    A reader may replace sys.stdout, and redirect or close its file descriptor.
    """

    def __init__(self) -> None:
        self.stdout = sys.stdout
        self._files: dict[int, tuple[int, tuple[int, int]]] = {}  # a copy of each, and its identity
        self._replaced: list[Any] = []  # when such a stream is destroyed, it closes its file
        for number in (1, 2):
            with suppress(OSError):  # it was closed
                self._files[number] = os.dup(number), identity(number)

    def restore(self, stdout: Any, stderr: Any) -> None:
        """Let the streams be those that they were before a call."""
        if sys.stdout is not stdout or sys.stderr is not stderr:
            self._replaced += (sys.stdout, sys.stderr)
            for one in self._replaced[-2:]:
                with suppress(BaseException):  # the reader's class may do anything
                    one.flush()
            sys.stdout, sys.stderr = stdout, stderr
        for number, (copy, before) in self._files.items():
            with suppress(OSError):  # the copy is closed, too
                if identity(number) != before:
                    if number == 1 and self.stdout is not None:
                        self.stdout.flush()  # to where the reader has redirected it
                    os.dup2(copy, number)


def identity(number: int) -> tuple[int, int]:
    """The file of a descriptor; (0, 0) if it is closed."""
    try:
        file = os.fstat(number)
    except OSError:
        return 0, 0
    return file.st_dev, file.st_ino


# What a child tells: the call that it begins, or goes on with; its end; a line that it has printed;
# that no call is left; an answer to its parent.
Message = Call | Done | str | None | dict[str, Any]
WATCHED = Watched()


def encoded(message: Message) -> bytes:
    """A line for the pipe."""
    return encoded_answer(message) if isinstance(message, dict) else encoded_call(message)


def encoded_answer(message: object) -> bytes:
    return json.dumps(message).encode() + b"\n"


# A training tells a few calls a hundred thousand times.
encoded_call = cache(encoded_answer)


def decoded(line: bytes) -> Any:
    """What a child has told. A line that a reader's code has written there is False.

    Lists are the fields of a `Call` or a `Done`.
    """
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return False
    match message:
        case [str(), str(), int() | float(), int() | float() | None]:
            return Call(*message)
        case [int(), str()]:
            return Done(*message)
        case str() | dict() | None:
            return message
    return False


# The parent's side


class Child:
    """The parent's side: a process that runs a command.

    Attributes:
        what: the command, as in "the ladder begins again".
        dump: the file to which faulthandler writes where the child is.
        call: that which it has told last, or None if that has returned.
        done: what it has told of its end, or None.
        asked: the call that this process waits for, also while the child has told none.
        answer: what the child has told of it, or None.
    """

    def __init__(self, pid: int, pipe: int, what: str, dump: IO[bytes]):
        self.pid, self.pipe, self.what, self.dump = pid, pipe, what, dump
        self.call: Call | None = None
        self.done: Done | None = None
        self.asked: Call | None = None
        self.answer: dict[str, Any] | None = None
        self.text = b""
        self.is_open = True  # the pipe

    def wait(self) -> bool:
        """Wait until the child answers or ends; False if its call, or a thread at its end, does
        not."""
        waited, last, is_noted = 0.0, time.monotonic(), False
        while True:
            if self.tells():
                if self.answer is not None:
                    return True
                waited, last, is_noted = 0.0, time.monotonic(), False
                continue
            if self.has_ended():  # although a process of its own may hold the pipe
                return True
            now = time.monotonic()
            waited += min(now - last, 2 * TICK)  # not while this process was stopped, as by Ctrl-Z
            last = now
            # Where no thread is left, a busy machine ends the process late.
            if self.done and waited > (2 if self.done.threads else 10) * GRACE:
                return False
            if self.call is None or waited <= min(self.call.seconds, NOTICE):
                continue
            if waited > self.call.seconds:
                return False
            if not is_noted and self.call.seconds < math.inf:
                is_noted = True
                seconds = self.call.seconds if self.call.shown is None else self.call.shown
                print(
                    f"{self.call} has not ended for {NOTICE:.0f} s; {self.what} gives it up after "
                    f"{seconds:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )

    def tells(self) -> bool:
        """Wait for a moment, and take what the child tells; False if that is nothing."""
        if not self.is_open:  # a reader's call has closed the pipe, or the process is ending
            time.sleep(min(TICK, 0.01))
            return False
        if not select.select([self.pipe], [], [], TICK)[0]:
            return False
        self.is_open = self.hear()
        return self.is_open

    def hear(self) -> bool:
        """Take what the child has told; False at the end of the pipe."""
        read = os.read(self.pipe, 2**16)
        *lines, self.text = (self.text + read).split(b"\n")
        for message in map(decoded, lines):
            if isinstance(message, str):
                WATCHED.said.add(message)
            elif isinstance(message, dict):  # of two answers, one was written by the reader's code
                self.answer = message if self.answer is None else {}
            elif isinstance(message, Done):
                # Of two, one is a reader's: an error that one of them tells stays.
                self.done = max(self.done or message, message)
                self.call = None
            elif message is not False:
                self.call = message or self.asked
        return bool(read)

    def hear_rest(self) -> None:
        """Take what the child has told by now."""
        while self.is_open and select.select([self.pipe], [], [], 0)[0] and self.hear():
            pass

    def has_ended(self) -> bool:
        """Whether the process has ended; its status can still be read."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def status(self) -> tuple[int, str]:
        """The exit status, as a shell has it, and how the child has ended; "" at its own end.

        The status that the child has told stays, whatever its process has done then.
        """
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.hear_rest()
        if self.done:
            return self.done.status, ""
        if code < 0:
            return 128 - code, f"by {signal.Signals(-code).name}{self.place()}"
        if code == CLOSED:
            return code, "by closing sys.stdout, or a file that it has not opened"
        return code, f"with status {code}, {AS_EXIT}"

    def say(self, status: int, how: str) -> int:
        """The status of a child that has ended. If it did not by itself, a line says how."""
        if how:
            who = f"{self.call} has ended {self.what}" if self.call else f"{self.what} was ended"
            print(f"{who} {how}", file=sys.stderr)
        return status or int(bool(how))

    def terminate(self, number: int | None) -> int | None:
        """Let the child end by a signal.

        Args:
            number: of the signal; None after Ctrl-C, which sends it to the child, too.

        Returns:
            the status; None if the child was killed, and has said nothing.
        """
        if number is not None:
            os.kill(self.pid, number)
        if self.ends_within(GRACE):
            return self.say(*self.status())
        self.hear_rest()
        if self.call is None:  # it may take long to end its processes, or knows of no signal
            if not self.done:
                os.kill(self.pid, signal.SIGTERM)
            if self.ends_within(3 * GRACE):
                return self.say(*self.status())
        self.kill()
        return 128 + (number or signal.SIGINT) if self.done else None

    def ends_within(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not self.has_ended() and time.monotonic() < end:
            time.sleep(0.01)
        return self.has_ended()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def ask(self) -> None:
        """Let the child, which hangs, write where it is, and end.

        It must not go on: a signal lets some calls return, such as pause.
        """
        os.kill(self.pid, signal.SIGUSR1)
        end, size = time.monotonic() + 1, 0
        while time.monotonic() < end and not 0 < size == os.fstat(self.dump.fileno()).st_size:
            size = os.fstat(self.dump.fileno()).st_size
            time.sleep(0.05)

    def place(self) -> str:
        """The reader's line where the child was last, as " (my.py, line 7)", or ""."""
        text = os.pread(self.dump.fileno(), 2**16, 0).decode(errors="replace")
        for file, line in re.findall(r'  File "(.+)", line (\d+)', text):
            if not file.startswith(("<", *LIBRARIES)):
                return f" ({Path(file).name}, line {line})"
        return ""


def guarded(main: Callable[[], int], what: str, remedy: str = "") -> int:
    """Run ``main`` in a child process. It returns in the child as here, where the child has ended.

    If the child ends in a reader's call, or does not return from it, another child runs ``main``
    without that call.

    Args:
        what: the command, as in "the ladder begins again without it".
        remedy: what to do about a call that does not return. If it is given, no child begins again.

    Returns:
        the status of the last child; 1 if it ended in a call.
    """
    if sys.platform != "linux":  # where a fork is safe, also with NumPy's threads
        return main()
    while True:
        read, write = os.pipe()
        with TemporaryFile() as dump:
            pid = fork()
            if pid == 0:
                os.close(read)
                return watched(main, what, write, dump)
            os.close(write)
            child = Child(pid, read, what, dump)
            try:
                lost = outcome(child)
            except (Terminated, KeyboardInterrupt) as e:
                status = child.terminate(e.number if isinstance(e, Terminated) else None)
                if status is None:
                    raise
                return status
            finally:
                os.close(read)
        if isinstance(lost, int):
            return lost
        call = child.call
        assert call is not None
        if remedy:
            instead = "; raise an error instead" if advice(lost) else ""
            instead = f"; {remedy}" if lost.is_endless else instead
            print(f"{what}: error: {call} {lost.how}{instead}", file=sys.stderr)
            return 1
        WATCHED.given_up[call.file, call.name] = lost
        if call.name != TOP:  # whose command says it
            print(f"{call} {lost.how}; {what} begins again without it", flush=True)


def fork() -> int:
    """Fork this process, whose stdout is flushed before, so that no line is printed twice."""
    if sys.stdout is not None:
        sys.stdout.flush()
    with warnings.catch_warnings():
        # The threads that are there are of NumPy's and PyTorch's pools, which take no lock of ours.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def watched(main: Callable[[], int], what: str, pipe: int, dump: IO[bytes]) -> int:
    """Run ``main`` in the child, and tell its end."""
    die_with_parent(signal.SIGKILL)
    process, WATCHED.pipe, WATCHED.streams = os.getpid(), pipe, Streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    faulthandler.enable(dump, all_threads=False)
    faulthandler.register(signal.SIGUSR1, dump, all_threads=False, chain=True)
    status = 1  # that of an error
    try:
        status = main()
        return status
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(bool(e.code))
        if not status and WATCHED.has_called:  # it is none of --help, but of a reader's class
            print(f"{what} was ended by sys.exit({e.code!r})", file=sys.stderr)
            status = e.code = 1
        raise
    except TorchparError:
        status = 2  # with which the commands end after they have printed it
        raise
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
        raise
    finally:
        if os.getpid() != process:  # a fork of a reader's, which goes on here
            os._exit(0)
        others = [one.name for one in threads() if one is not main_thread() and not one.daemon]
        WATCHED.tell(Done(status, ", ".join(others)))
        faulthandler.disable()
        faulthandler.unregister(signal.SIGUSR1)  # the file is closed now


def interrupt(*_: object) -> None:
    """Handle SIGINT."""
    raise Interrupted


def outcome(child: Child) -> int | GivenUp:
    """Wait for a child; the status, or what became of the call in which it has ended or hangs.

    A child that has answered goes on, and its status is 0.
    """
    is_over = child.wait()
    if child.answer is not None:
        return 0
    if not is_over:
        if child.done:
            child.kill()
            text = f"{child.what} is done, but its process does not end, and is stopped"
            if child.done.threads:
                text += f": its thread {child.done.threads} has not ended; join it, or start it "
                text += "with daemon=True"
            print(text, file=sys.stderr)
            return child.done.status
        assert child.call is not None
        child.ask()
        child.kill()
        return GivenUp(f"does not end within {child.call.seconds:.0f} s{child.place()}", True)
    status, how = child.status()
    if how and child.call is not None:
        return GivenUp(f"ends the process {how}", False)
    return child.say(status, how)
