# SPDX-License-Identifier: MIT
"""Named numbers and structures that Python and C share.

C is the one that lays structures out: it is compiled with a table of what Python takes for sizes,
offsets and numbers (`table`), which `check` compares when the core is loaded.
"""

import ctypes
from collections.abc import Iterator

BUDGET, PYTHON, GROW, REACHED, STOPPED, REFINE = range(6)  # why `run` returns
(
    LEFT,
    ELEMENTWISE,
    BRANCH,
    LOAD,
    STORE,
    SHUFFLE,
    PACK,
    LOAD_MATRIX,
    PRODUCT,
    NOTHING,
    COPY,
    ELECT,
    STORE_MATRIX,
    REDUCE,
    VOTE,
    MATCH,
    ACTIVE,
    SYNC_WARP,
    BRANCH_INDEX,
    RETURN,
    BARRIER,
    COMMIT,
    WAIT,
    PROXY_FENCE,
    PRODUCT_FENCE,
    ASYNC_PRODUCT,
    ATOMIC,
    MBARRIER_INIT,
    MBARRIER_INVAL,
    MBARRIER_ARRIVE,
    MBARRIER_WAIT,
    LOAD_BOX,
    STORE_BOX,
    BULK_COMMIT,
    BULK_WAIT,
    MAP_REPLACE,
    MAP_PUBLISH,
    MAP_ACQUIRE,
    GRID_WAIT,
    GRID_TRIGGER,
) = range(40)
ROW, OPERANDS = 256, 16
GENERIC, MOST_GROUPS, MANY = 3, 40, 32
OF_COPIES, OF_PRODUCTS = range(2)  # families of groups
MOST_ELEMENTS = 4  # of an atomic
IN_ROW, IN_LIST, PENDING, UNDEFINED, NEVER = 1, 2, 4, 8, 16  # states of a register
UNINITIALISED, LEFT_OUT = 0, 1  # causes of undefined bits; LEFT_OUT and the instruction's index
# How the undefined bits of a result follow from those of the operands
(
    OF_THREADS,
    OF_WARP,
    MOVED,
    OF_AND,
    OF_OR,
    OF_EITHER,
    OF_SUM,
    OF_HALVES,
    JOINED,
    SELECTED,
) = range(10)
BARRIERS, MOST_WARPS, MOST_MBARRIERS = 16, 64, 64
PAGE = 4096  # bytes of an allocation whose first access is noted
# What a block has done of griddepcontrol: it has let the next grid begin, has waited for earlier
# ones, and has done the former in a warp that had not done the latter.
TRIGGERED, WAITED, EARLY = 1, 2, 4
WAIT_ADDRESS = 1  # at which earlier grids release what they have done; no memory lies there


class InstructionStruct(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "guard", "target", "line")),
        *((name, ctypes.c_int32) for name in ("results", "sources")),
        ("to", ctypes.c_int32 * OPERANDS),
        ("from_", ctypes.c_int32 * OPERANDS),
        ("offset", ctypes.c_int64),
        ("second_offset", ctypes.c_int64),
        ("function", ctypes.c_void_p),
        *((name, ctypes.c_uint8) for name in ("negated", "whole", "flush", "space")),
        *((name, ctypes.c_uint8) for name in ("width", "is_signed", "mode", "transposed")),
        *((name, ctypes.c_uint8) for name in ("count", "is_atomic", "releases", "acquires")),
        ("slot", ctypes.c_int32),
        ("table", ctypes.c_void_p),
        ("members", ctypes.c_int32),
        *((name, ctypes.c_uint8) for name in ("rule", "moved")),
    )


class AllocationStruct(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("start", "base", "end")),
        *((name, ctypes.c_void_p) for name in ("data", "writes", "reads", "others", "barriers")),
        ("touched", ctypes.c_void_p),
        ("sectors", ctypes.c_int64),
        ("spare", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("pages", "written", "saved")),
        *((name, ctypes.c_int64) for name in ("unwritten_first", "unwritten_end")),
        ("pattern", ctypes.c_uint8 * 8),
        *((name, ctypes.c_int32) for name in ("unit", "barrier_count")),
        *((name, ctypes.c_void_p) for name in ("lane_writes", "lane_reads")),
    )


class SpaceStruct(ctypes.Structure):
    _fields_ = (
        ("allocations", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("last", ctypes.c_void_p),
        ("is_deferred", ctypes.c_int32),
    )


class EventsStruct(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("lines", "what", "agents", "times", "blocks")),
        ("atomic", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "capacity")),
    )


class GroupStruct(ctypes.Structure):
    _fields_ = (("pc", ctypes.c_int32), ("mask", ctypes.c_uint32), ("waits", ctypes.c_int32))


class WarpStruct(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("program", "rows", "states", "versions", "widths")),
        *((name, ctypes.c_void_p) for name in ("undefined", "causes", "counts", "events")),
        ("seed", ctypes.c_uint64),
        ("spaces", ctypes.c_void_p * 3),
        ("times", ctypes.c_void_p),
        ("copies", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "stores")),
        *((name, ctypes.c_int32) for name in ("pc", "block", "index", "knows_others")),
        *((name, ctypes.c_int32) for name in ("load_name", "store_name", "atomic_name")),
        *((name, ctypes.c_int32) for name in ("load_box_name", "store_box_name", "fence_name")),
        *((name, ctypes.c_int32) for name in ("elected", "finer")),
        ("coarse", ctypes.c_void_p),
        ("active", ctypes.c_uint32),
        *((name, ctypes.c_void_p) for name in ("fence", "runner", "undo", "foreign")),
        *((name, ctypes.c_uint32) for name in ("alive", "first_alive")),
        *((name, ctypes.c_int32) for name in ("of_threads", "generic", "local_bytes")),
        ("swaps", ctypes.c_int32),
        ("early", ctypes.c_uint32),
        *((name, ctypes.c_int32) for name in ("patience", "held", "group_count")),
        ("groups", GroupStruct * MOST_GROUPS),
    )


class UndoStruct(ctypes.Structure):
    _fields_ = (
        ("bytes", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("used", "capacity", "first_event")),
    )


class CopiesStruct(ctypes.Structure):
    _fields_ = (
        ("parts", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "capacity")),
        *((name, ctypes.c_int32) for name in ("agent", "name", "time", "done")),
    )


class FamilyStruct(ctypes.Structure):
    _fields_ = (
        ("operations", ctypes.c_void_p),
        ("ends", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("count", "operation_capacity", "groups")),
        *((name, ctypes.c_int32) for name in ("group_capacity", "first_group", "first")),
    )


class StateStruct(ctypes.Structure):
    _fields_ = (
        ("families", FamilyStruct * 2),
        ("copies", CopiesStruct),
        *((name, ctypes.c_int32) for name in ("copy_name", "product_name", "has_fence")),
        ("fence_versions", ctypes.c_void_p),
        ("owners", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("done", "waiting", "mbarrier", "parity")),
        ("has_waited", ctypes.c_int32),
        ("bulk", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("bulk_count", "bulk_capacity")),
        *((name, ctypes.c_int32 * 32) for name in ("committed", "deleted")),
    )


class MbarrierStruct(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("offset", "bytes")),
        *((name, ctypes.c_int32) for name in ("pending", "count", "phase")),
        *((name, ctypes.c_int32) for name in ("is_live", "has_parts", "is_loading")),
        ("parts", ctypes.c_void_p),
        ("known", ctypes.c_void_p * 2),
    )


class TensormapStruct(ctypes.Structure):
    _fields_ = (
        ("place", ctypes.c_void_p),
        ("row", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("published", "acquired")),
    )


class CoordinateStruct(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int32) for name in ("row", "width", "axis"))


class ReleaseStruct(ctypes.Structure):
    _fields_ = (("address", ctypes.c_uint64), ("known", ctypes.c_void_p))


class PastStruct(ctypes.Structure):
    _fields_ = (("block", ctypes.c_int64), ("times", ctypes.c_void_p))


class CountedStruct(ctypes.Structure):
    """The beginning of `Known` and `Times`."""

    _fields_ = (("moved", ctypes.c_void_p), ("count", ctypes.c_int64))


class ReleasesStruct(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("table", "before")),
        *((name, ctypes.c_int64) for name in ("count", "capacity", "changes", "change_capacity")),
        ("chunks", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("bytes", "live_bytes")),
        ("merged", ctypes.c_void_p * 3),
    )


class RunnerStruct(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("warps", "states", "template_states")),
        *((name, ctypes.c_void_p) for name in ("coordinates", "shared", "events")),
        *((name, ctypes.c_void_p) for name in ("counts", "total_counts", "controls")),
        *((name, ctypes.c_int64) for name in ("count_size", "rows", "limit")),
        *((name, ctypes.c_int32) for name in ("warp_count", "coordinate_count")),
        *((name, ctypes.c_int32) for name in ("copies_need_fence", "atomics")),
        *((name, ctypes.c_int32) for name in ("agents", "capacity")),
        *((name, ctypes.c_void_p) for name in ("times", "fenced")),
        ("arrived", ctypes.c_int32 * BARRIERS),
        ("arrivals", ctypes.c_int32 * MOST_WARPS * BARRIERS),
        ("undo", UndoStruct),
        *((name, ctypes.c_int64) for name in ("executed", "stores")),
        *((name, ctypes.c_int32) for name in ("fault_pc", "spins", "finer")),
        *((name, ctypes.c_int32 * BARRIERS) for name in ("votes", "voters")),
        *((name, ctypes.c_void_p) for name in ("coarse", "found")),
        ("releases", ReleasesStruct),
        *((name, ctypes.c_void_p) for name in ("maps", "maps_before")),
        *((name, ctypes.c_int64) for name in ("map_count", "map_capacity", "map_count_before")),
        ("runs", ctypes.c_void_p),
        ("run_count", ctypes.c_int64),
        ("box", ctypes.c_void_p),
        ("mbarriers", MbarrierStruct * MOST_MBARRIERS),
        ("places", ctypes.c_int64 * MOST_MBARRIERS),
    )


STRUCTURES = (
    InstructionStruct,
    AllocationStruct,
    SpaceStruct,
    EventsStruct,
    GroupStruct,
    WarpStruct,
    UndoStruct,
    CopiesStruct,
    FamilyStruct,
    StateStruct,
    MbarrierStruct,
    TensormapStruct,
    CoordinateStruct,
    ReleaseStruct,
    PastStruct,
    CountedStruct,
    ReleasesStruct,
    RunnerStruct,
)
# The names in C that differ.
IN_C = {"from_": "from", CountedStruct: "Known"}


def _constants() -> dict[str, int]:
    return {
        name: value
        for name, value in globals().items()
        if name.isupper() and isinstance(value, int)
    }


def _places() -> Iterator[tuple[str, str, int, int]]:
    """Each structure and its fields: the type of C, the field or "", the offset and the size."""
    for structure in STRUCTURES:
        of_c = IN_C.get(structure) or structure.__name__.removesuffix("Struct")
        yield of_c, "", 0, ctypes.sizeof(structure)
        for name, *_ in structure._fields_:
            field = getattr(structure, name)
            yield of_c, IN_C.get(name, name), field.offset, field.size


def table() -> str:
    """The table in C: the same numbers as the compiler has them."""
    rows = list(_constants())
    for of_c, field, _, _ in _places():
        whole = f"sizeof((({of_c} *)0)->{field})" if field else f"sizeof({of_c})"
        rows += [f"offsetof({of_c}, {field})" if field else "0", whole]
    return f"#include <stddef.h>\nconst int64_t layout[] = {{\n    {','.join(rows)}\n}};\n"


def check(core: ctypes.CDLL) -> None:
    """Compare the compiler's numbers with those of Python.

    Raises:
        RuntimeError: they differ, so that the core would take one thing for another.
    """
    constants = _constants()
    places = list(_places())
    found = iter((ctypes.c_int64 * (len(constants) + 2 * len(places))).in_dll(core, "layout"))
    for name, value in constants.items():
        if (of_c := next(found)) != value:
            raise RuntimeError(f"{name} is {of_c} in C, and {value} in native/layout.py")
    for of_c, field, *expected in places:
        if (got := [next(found), next(found)]) != expected:
            what = f"{of_c}.{field}" if field else of_c
            message = f"{what} has offset and size {got} in C, and {expected} in native/layout.py"
            raise RuntimeError(message)
