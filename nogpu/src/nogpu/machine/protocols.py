# SPDX-License-Identifier: MIT
"""The GPU, a block and a warp, as the modules see them that these import.

`gpu.Gpu`, `block.Block` and `block.Warp` are the classes. Memory, clusters and the core in C take
them as arguments, and name what they need of them by these protocols. So imports go one way.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from nogpu.machine.parse import Kernel
from nogpu.machine.registers import Cause, Values
from nogpu.native.layout import AllocationStruct, SpaceStruct

if TYPE_CHECKING:
    from random import Random

    from nogpu.machine.allocation import Allocation
    from nogpu.machine.counts import Counts, Progress
    from nogpu.machine.memory import Space
    from nogpu.machine.trace import Trace
    from nogpu.machine.vector_clocks import Events, VectorClocks


class View(Protocol):
    """Events, an allocation or a space for the core in C."""

    def update(self) -> None:
        """Take arrays anew that have been replaced."""


class AllocationView(View, Protocol):
    @property
    def struct(self) -> AllocationStruct: ...

    spare: Values | None


class SpaceView(View, Protocol):
    @property
    def struct(self) -> SpaceStruct: ...

    @property
    def pointer(self) -> int: ...


class Schedule(Protocol):
    @property
    def completion(self) -> str: ...

    @property
    def order(self) -> str: ...


class RegisterFile(Protocol):
    """The registers of a warp: `registers.Registers`, or those of the core in C."""

    def __getitem__(self, index: int, /) -> Any: ...

    def __setitem__(self, index: int, value: object, /) -> None: ...

    def content(self) -> tuple[object, ...]: ...

    def get_many(self, indices: Sequence[int]) -> list[Any]: ...

    def set_many(self, indices: Sequence[int], values: Values) -> None: ...

    def set_same(self, indices: Sequence[int], value: object) -> None: ...

    def stamp(self) -> Any: ...

    def is_unchanged(self, index: int, stamp: Any) -> bool: ...

    def restamp(self, index: int, stamp: Any) -> None: ...


class Gpu(Protocol):
    """The memory, and the present launch, as its blocks see them."""

    changes: int
    executed_instructions: int
    released: dict[int, dict[int, Values]]
    events: "Events"
    space: "Space"
    counts: "Counts"
    random: "Random"
    native: Any  # what the core in C knows of the launch, or None
    progress: "Progress"
    controls: Values | None

    @property
    def kernel(self) -> Kernel: ...

    @property
    def schedule(self) -> Schedule: ...

    @property
    def limit(self) -> int: ...

    @property
    def multiprocessors(self) -> int: ...

    @property
    def shared_bytes(self) -> int: ...

    @property
    def parameters(self) -> dict[str, int]: ...

    @property
    def symbols(self) -> dict[str, int]: ...

    @property
    def grid(self) -> tuple[int, int, int]: ...

    @property
    def programs(self) -> tuple[int, int, int]: ...

    @property
    def printed(self) -> list[str]: ...

    def fault(self, kind: str, name: str, line: int, message: str, warp: "Warp") -> None: ...

    def place_of(self, line: int) -> str: ...


class Block(Protocol):
    """A CTA."""

    @property
    def gpu(self) -> Gpu: ...

    @property
    def native(self) -> Any:
        """What the core in C knows of the block, or None."""

    @property
    def loads(self) -> set[Any]: ...

    @property
    def warps(self) -> Sequence["Warp"]: ...

    @property
    def number(self) -> int: ...

    @property
    def rank(self) -> int: ...

    @property
    def window(self) -> int: ...

    @property
    def suffix(self) -> str: ...

    @property
    def position(self) -> tuple[int, ...]: ...

    @property
    def program(self) -> tuple[int, ...]: ...

    @property
    def memory(self) -> "Allocation": ...

    @property
    def shared(self) -> "Space": ...

    @property
    def local(self) -> "Space": ...

    @property
    def trace(self) -> "Trace | None": ...

    @property
    def at_barrier(self) -> "Mapping[int, Sequence[tuple[Warp, bool]]]": ...

    @property
    def tensor_memory(self) -> "TensorMemory | None":
        """That of sm_100."""

    def end(self) -> None: ...


class Phase(Protocol):
    """A phase of the cluster barrier."""

    @property
    def arrived(self) -> set[int]: ...


class TensorMemory(Protocol):
    cells: Values
    allocated: Values


class Cluster(Protocol):
    """Blocks that run together."""

    @property
    def gpu(self) -> Gpu: ...

    @property
    def blocks(self) -> Sequence[Block]: ...

    @property
    def warps(self) -> Sequence["Warp"]: ...

    @property
    def flying(self) -> "Sequence[Operation]": ...

    @property
    def phase(self) -> Phase: ...


class Arrival(Protocol):
    """An arrival at an mbarrier: of a thread, or of an asynchronous operation."""

    @property
    def agent(self) -> int: ...

    @property
    def time(self) -> int: ...

    @property
    def name(self) -> str: ...

    @property
    def line(self) -> int: ...


class Operation(Arrival, Protocol):
    """An asynchronous operation, as those see it that wait for it."""

    @property
    def what(self) -> str: ...

    @property
    def read(self) -> int: ...

    @property
    def steps(self) -> list[Callable[[], None]]: ...

    @property
    def targets(self) -> frozenset[int]: ...

    @property
    def last_access(self) -> str: ...

    def advance(self, left: int = 0) -> None: ...


class Warp(Protocol):
    """32 threads."""

    pc: int
    count: int
    waited: int
    mask: Values
    cause: Cause
    registers: RegisterFile
    active: Values
    done: bool
    waiting: Callable[[], bool] | None
    phase: Any  # of the cluster barrier
    known_mbarriers: set[Any]

    @property
    def released_mbarriers(self) -> set[Any]: ...

    @property
    def block(self) -> Block: ...

    native: Any  # a `native.warps.WarpState`, or None where Python executes everything

    @property
    def clocks(self) -> "VectorClocks": ...

    @property
    def index(self) -> int: ...

    @property
    def name(self) -> str: ...

    @property
    def first_thread(self) -> int: ...

    @property
    def number(self) -> int: ...

    @property
    def is_ready(self) -> bool: ...

    @property
    def carry(self) -> Values: ...

    @property
    def parked(self) -> dict[int, Values]: ...

    @property
    def gathered(self) -> dict[int, Values]: ...

    @property
    def groups(self) -> Mapping[Any, Sequence[Sequence["Operation"]]]: ...

    def lanes(self) -> Values: ...

    def active_bits(self) -> int: ...

    def special(self, name: str) -> Values: ...

    def event(self, line: int, what: str, atomic: bool = False) -> int: ...

    def count_access(self, space: "Space", addresses: Values, width: int) -> None: ...

    def count_place(self, place: "Allocation", offsets: Values) -> None: ...
