# SPDX-License-Identifier: MIT
"""Streams and events of the emulated GPU: they do everything at once, and know what they wait for.

The order of streams is a vector clock: a stream's clock has, for each stream, the number of the
last work there that this stream comes after. Work without an order may run at the same time on a
GPU.
"""

import threading
from bisect import bisect_right
from collections.abc import Callable, MutableMapping
from weakref import WeakKeyDictionary

import torch

from nogpu.cuda import places
from nogpu.record.source import name_in_program, program_line, shown_path

Clock = dict[int, int]  # from streams' numbers to those of their work


def join(clock: Clock, other: Clock) -> None:
    """Let what has ``clock`` come after all that ``other`` comes after."""
    for stream, work in other.items():
        if clock.get(stream, 0) < work:
            clock[stream] = work


class Streams:
    """All streams of a GPU.

    Attributes:
        default: the stream of work that names no other.
        host: the work that the program has waited for.
        refuse: called with the name of what waits for the GPU, before it does; it may raise.
        of_modules: where modules of DistributedDataParallel were made.
        forks: called with a stream, one that it waits for, and whether that one's work is captured.
        is_capturing: whether a stream's work is captured.
    """

    def __init__(self) -> None:
        self.refuse: Callable[[str], None] = lambda what: None
        self.forks: Callable[[Stream, Stream, bool], None] = lambda *streams: None
        self.is_capturing: Callable[[Stream], bool] = lambda stream: False
        self.host: Clock = {}
        self.of_modules: MutableMapping[torch.nn.Module, Stream] = WeakKeyDictionary()
        self._local = threading.local()
        self.Stream: type[Stream] = type("Stream", (Stream,), {"_streams": self})
        self.Event: type[Event] = type("Event", (Event,), {"_streams": self})
        self.all: list[Stream] = []
        self.default = self.Stream()
        self.default.name = "torch.cuda.default_stream()"
        self._numbers: list[int] = [0]  # of the first node of autograd after each change of streams
        self._streams_of_numbers = [self.default]

    @property
    def current(self) -> "Stream":
        found: Stream = getattr(self._local, "stream", self.default)
        return found

    def set(self, stream: "Stream | None") -> None:
        if stream is not None:
            self._local.stream = stream
            self._note_number(stream)

    def _note_number(self, stream: "Stream") -> None:
        """Note the number of autograd's next node, which is made on another stream."""
        if threading.current_thread() is not threading.main_thread():
            return  # each thread counts for itself
        number = torch._C._autograd._get_sequence_nr()
        if number > self._numbers[-1]:
            self._numbers.append(number)
            self._streams_of_numbers.append(stream)
        else:
            self._streams_of_numbers[-1] = stream

    def of_number(self, number: int) -> "Stream":
        """Return the stream on which the main thread has made a node of autograd, by its number."""
        return self._streams_of_numbers[max(0, bisect_right(self._numbers, number) - 1)]

    def entered(self, stream: "Stream | None") -> "Entered":
        """Return a block whose current stream is another one, as `torch.cuda.stream` does."""
        return Entered(self, stream)

    def synchronize(self, device: object = None) -> None:
        """Let the program wait for all streams."""
        self.refuse("torch.cuda.synchronize()")
        self.join_all()

    def join_all(self) -> None:
        for stream in self.all:
            join(self.host, stream.clock)

    def work(self) -> tuple[int, int]:
        """Put work on the current stream; return the stream's number, and the work's."""
        stream = self.current
        join(stream.clock, self.host)
        stream.clock[stream.stream_id] = number = stream.clock.get(stream.stream_id, 0) + 1
        return stream.stream_id, number

    def is_ordered(self, work: tuple[int, int]) -> bool:
        """Whether work that is put on the current stream comes after other work."""
        stream, number = work
        return max(self.current.clock.get(stream, 0), self.host.get(stream, 0)) >= number


class Entered:
    """A block whose current stream is another one."""

    def __init__(self, streams: Streams, stream: "Stream | None"):
        self.streams, self.stream = streams, stream

    def __enter__(self) -> "Stream | None":
        self.before = self.streams.current
        self.streams.set(self.stream)
        if self.stream is not None:
            self.stream.note_line()
        return self.stream

    def __exit__(self, *error: object) -> None:
        self.streams.set(self.before)


class Stream:
    """A stream of a device that does everything at once."""

    _streams: Streams  # of the emulator
    priority = 0
    device = places.CUDA
    device_index, device_type = 0, 1

    def __init__(self, *args: object, **kwargs: object):
        self.clock: Clock = {}
        self.stream_id = self.cuda_stream = len(self._streams.all)
        self.name, self._line = "", program_line()
        self._streams.all.append(self)

    def note_line(self) -> None:
        """Note where the program works on the stream, and its variable there, for messages."""
        self._line = program_line()
        self.name = self.name or name_in_program(self)

    def __str__(self) -> str:
        if self is self._streams.default:
            return "the default stream"
        if self._line is None:
            return "another stream"
        return f"the stream of {shown_path(self._line[0])}:{self._line[1]}"

    def __enter__(self) -> "Stream":
        self._entered = self._streams.entered(self)
        self._entered.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._entered.__exit__(*error)

    def synchronize(self) -> None:
        self._streams.refuse("Stream.synchronize()")
        join(self._streams.host, self.clock)

    def wait_stream(self, stream: "Stream") -> None:
        self._streams.forks(self, stream, stream.is_capturing())
        join(self.clock, stream.clock)

    def wait_event(self, event: "Event") -> None:
        event.wait(self)

    def query(self) -> bool:
        self._streams.refuse("Stream.query()")
        return True

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = self._streams.Event() if event is None else event
        event.record(self)
        return event

    def is_capturing(self) -> bool:
        return self._streams.is_capturing(self)


class Event:
    """An event that has happened; no time passes between two of them."""

    _streams: Streams  # of the emulator
    cuda_event = event_id = 0

    def __init__(self, *args: object, **kwargs: object):
        self.clock: Clock = {}
        self.stream: Stream | None = None
        self.is_captured = False

    def record(self, stream: Stream | None = None) -> None:
        self.stream = self._streams.current if stream is None else stream
        self.clock, self.is_captured = dict(self.stream.clock), self.stream.is_capturing()

    def wait(self, stream: Stream | None = None) -> None:
        stream = self._streams.current if stream is None else stream
        if self.stream is not None:
            self._streams.forks(stream, self.stream, self.is_captured)
        join(stream.clock, self.clock)

    def synchronize(self) -> None:
        self._streams.refuse("Event.synchronize()")
        join(self._streams.host, self.clock)

    def query(self) -> bool:
        self._streams.refuse("Event.query()")
        return True

    def elapsed_time(self, other: "Event") -> float:
        return 1e-3
