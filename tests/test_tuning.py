# SPDX-License-Identifier: MIT
"""The choice of tiles: configurations, defaults, tables and damaged tables."""

import json
import math
import re
import warnings

import pytest
import torch
from torch import Tensor

from torchpar.kernels import candidates, tables, tuning
from torchpar.kernels.candidates import Tiles

DEVICE = candidates.Device("NVIDIA Test/9 GPU", 90, 132)
WIDE, LARGE = Tiles(128, 256, 64, 8, 4, "tma"), Tiles(128, 128, 64, 8, 4, "tma")
SQUARE, SMALL = Tiles(128, 128, 64, 8, 3), Tiles(64, 64, 64, 4, 3)
UNALIGNED, SPLIT = Tiles(64, 64, 32, 8, 3), Tiles(64, 64, 64, 4, 4, "split_k")
ENTRIES = [[512, 512, 512, 1, None], [2048, 2048, 2048, 1, SMALL], [4096, 4096, 4096, 1, WIDE]]
KINDS = [pytest.param(*kind[:2], id=name) for name, kind in candidates.KINDS.items()]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The user's folder, of a user with the device of the test and no shipped tables."""
    monkeypatch.setenv("TORCHPAR_CACHE", str(tmp_path / "user"))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped" / "tuned")
    monkeypatch.setattr(tuning, "device", lambda t: DEVICE)
    tables.forget_tables()
    yield tmp_path
    tables.forget_tables()


def table(entries=ENTRIES, kind: str = "bfloat16", kernel: str = "symmetric_product") -> dict:
    return {"device": DEVICE.name, "tiles": {kernel: {kind: entries}}}


def operand(n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(n, k, dtype=dtype, device="meta")


def chosen(n: int, k: int, batch: int = 1, like: Tensor | None = None, **kind) -> Tiles | None:
    x = operand(n, k, **kind) if like is None else like
    return tuning.chosen("symmetric_product", "ieee", (n, n, k, batch), x)


def default(m: int, n: int, batch: int = 1, kernel: str = "symmetric_product", dtype=torch.bfloat16) -> Tiles:
    operands = operand(m, n, dtype), operand(n, m, dtype)
    return tuning.default_tiles(kernel, "ieee", (m, n, n, batch), *operands)


@pytest.mark.parametrize("capability", [0, 80, 90, 100, 120])
@pytest.mark.parametrize("dtype, precision", KINDS)
@pytest.mark.parametrize("kernel", candidates.KERNELS)
def test_configurations_are_those_that_a_device_can_run(kernel, dtype, precision, capability):
    found = candidates.configurations(kernel, dtype, precision, capability)
    assert 3 <= len(set(found)) == len(found) <= 13
    for tiles in found:
        buffers = tiles.num_stages - (capability == 0)
        shared = buffers * (tiles.block_m + tiles.block_n) * tiles.block_k * dtype.itemsize
        assert shared <= {0: 65536, 80: 166912, 120: 101376}.get(capability, 232448)
        assert kernel == "linear_sigmoid" or tiles.block_n == tiles.block_m or tiles.variant == "tma"
    variants = {"pointers"} if kernel == "symmetric_product" else {"pointers", "split_k"}
    if capability in (90, 100) and (dtype.itemsize == 2 or precision == "tf32"):
        variants.add("tma")
        if capability == 90 and kernel == "symmetric_product":
            variants.add("specialized")
    assert {tiles.variant for tiles in found} == variants


@pytest.mark.parametrize(
    "kernel, m, n, batch, expected",
    [  # waves · cost of a tile, on 132 multiprocessors
        ("symmetric_product", 4096, 4096, 1, WIDE),  # 264 units: 2 · 57344, squares 4 · 32768
        ("symmetric_product", 4224, 4224, 1, LARGE),  # 561 units: 5 · 32768 beside 3 · 57344
        ("symmetric_product", 2048, 2048, 1, Tiles(64, 128, 64, 4, 4, "tma")),  # 264 units: 2 · 20480
        ("symmetric_product", 512, 512, 1, SMALL),  # 36 units: 12288
        ("symmetric_product", 512, 512, 64, LARGE),  # 640 units: 5 · 32768 beside 3 · 57344
        ("linear_sigmoid", 8192, 4096, 1, WIDE),  # 8 · 57344 beside 16 · 32768
        ("linear_sigmoid", 512, 4096, 1, LARGE),  # 32768 beside 57344, 2 · 20480, 4 · 12288
    ],
)
def test_default_has_the_least_estimate(kernel, m, n, batch, expected):
    assert default(m, n, batch, kernel) == expected


def test_default_is_of_what_the_operands_allow(monkeypatch):
    wide = operand(4096, 4100)
    assert chosen(4096, 4096, like=wide[:, :4096]) == UNALIGNED  # rows begin on 8 bytes
    padded = operand(4096, 8 * 4096)[:, ::8]  # neither rows nor columns are contiguous
    assert chosen(4096, 4096, like=padded) == SQUARE
    monkeypatch.setattr(tuning, "device", lambda t: DEVICE._replace(capability=80))
    assert default(4096, 4096) == SQUARE


@pytest.mark.parametrize(
    "m, n, k, expected",
    [
        (64, 1001, 784, Tiles(64, 64, 64, 4, 3)),  # 16 units: few columns of x, which a second launch delays
        (64, 1024, 8192, SPLIT),
        (64, 1001, 8192, SPLIT),
        (8192, 1001, 784, Tiles(64, 128, 64, 4, 4, "tma")),  # wider ones would spill
        (64, 1024, 1000, Tiles(64, 64, 128, 4, 3, "tma")),  # by pointers Triton would load 2 bytes at a time
    ],
)
def test_default_of_linear_sigmoid(m, n, k, expected):
    """Neither few rows nor a result whose rows begin at no 16 bytes take the tiles for unaligned operands."""
    found = tuning.default_tiles("linear_sigmoid", "ieee", (m, n, k, 1), operand(m, k), operand(n, k))
    assert found == expected
    tables.save(DEVICE, table([[m, 1024, k, 1, WIDE]], kernel="linear_sigmoid"))
    found = tuning.chosen("linear_sigmoid", "ieee", (m, n, k, 1), operand(m, k), operand(n, k))
    assert found == (expected if n % 8 else WIDE)


@pytest.mark.parametrize("m, n, k", [(0, 64, 64), (1, 12288, 4096), (8, 2**31, 16)])
def test_sizes_that_no_descriptor_has_go_by_pointers(m, n, k):
    operands = operand(m, k), operand(n, k)
    assert tuning.default_tiles("linear_sigmoid", "ieee", (m, n, k, 1), *operands).variant == "pointers"
    tables.save(DEVICE, table([[max(m, 1), n, k, 1, WIDE]], kernel="linear_sigmoid"))
    assert tuning.chosen("linear_sigmoid", "ieee", (m, n, k, 1), *operands).variant == "pointers"


@pytest.mark.parametrize(
    "m, n, k", [(0, 1, 1), (1, 1, 1), (64, 64, 255), (64, 64, 4096), (200, 1001, 8191), (8192, 8192, 8192)]
)
def test_each_part_has_columns(m, n, k):
    count, span = candidates.split_k(SPLIT, DEVICE, m, n, k)
    assert (count - 1) * span < k <= count * span
    assert span % 64 == 0
    assert count == 1 or span >= 256
    tiles = math.ceil(m / 64) * math.ceil(n / 64)
    assert count == 1 or count * tiles <= DEVICE.multiprocessors


def test_saved_table_is_what_is_chosen(folder):
    path = tables.save(DEVICE, table())
    assert path == folder / "user" / "nvidia-test-9-gpu.json"
    assert tables.load(DEVICE) == json.loads(json.dumps(table()))
    found = [chosen(n, n) for n in (128, 512, 1024, 1032, 2048, 4096, 16384)]
    assert found == [None] * 3 + [SMALL] * 2 + [WIDE] * 2
    assert chosen(1024, 2048) == SMALL, "1 octave of k nearer to 2048"
    assert chosen(64, 64) == default(64, 64), "too far from what was measured"
    assert list(path.parent.iterdir()) == [path], "something else was left behind"


def test_batch_is_a_size_like_others():
    tables.save(DEVICE, table([*ENTRIES, [512, 512, 512, 64, SQUARE]]))
    assert [chosen(512, 512, batch) for batch in (1, 8, 9, 64)] == [None, None, SQUARE, SQUARE]


def test_what_the_table_lacks_takes_the_defaults():
    tables.save(DEVICE, table([[512, 512, 512, 1, None]]))
    assert chosen(512, 512) is None
    assert chosen(512, 512, dtype=torch.float16) == SMALL
    x = operand(512, 512)
    assert tuning.chosen("linear_sigmoid", "ieee", (512, 512, 512, 1), x, x) == SMALL


@pytest.mark.parametrize(
    "n, stride, expected", [(4096, 4097, UNALIGNED), (4095, 4096, UNALIGNED), (4096, 4104, WIDE)]
)
def test_table_is_for_operands_that_move_16_bytes(n, stride, expected):
    tables.save(DEVICE, table([[4096, 4096, 4096, 1, WIDE]]))
    x = torch.empty(n * stride, dtype=torch.bfloat16, device="meta").as_strided((n, 4096), (stride, 1))
    assert chosen(n, 4096, like=x) == expected


def test_choice_by_a_symbolic_size_adds_no_guard():
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    tables.save(DEVICE, table())
    env = ShapeEnv()
    symbol = env.create_unspecified_symbol(1032, source=torch._dynamo.source.ConstantSource("n"))
    n = env.create_symintnode(symbol, hint=1032)
    x = operand(1024, 1024)
    assert tuning.chosen("symmetric_product", "ieee", (n, n, n, 1), x) == SMALL
    sizes = tuning._hint(n), 8, 8, 1
    assert tuning._least_estimate("symmetric_product", "bfloat16", DEVICE, sizes, ("tma",), True)
    assert candidates.split_k(SPLIT, DEVICE, 64, 64, n) == (1, n), "the number of programs would be a guard"
    assert tuning._hint(env.create_unbacked_symint()) == 1024
    assert all("Mod" in str(guard.expr) for guard in env.guards), "not of alignment"
    assert n > 1000
    assert not all("Mod" in str(guard.expr) for guard in env.guards), "a guard would have been seen"


def test_users_table_comes_first(folder, monkeypatch):
    monkeypatch.setattr(tables, "user_folder", lambda: folder / "shipped" / "tuned")
    tables.save(DEVICE, table([ENTRIES[1]]))
    monkeypatch.undo()
    monkeypatch.setattr(tuning, "device", lambda t: DEVICE)
    monkeypatch.setattr(tables, "SHIPPED", folder / "shipped" / "tuned")
    monkeypatch.setenv("TORCHPAR_CACHE", str(folder / "user"))
    assert chosen(4096, 4096) == SMALL
    tables.save(DEVICE, table())
    assert chosen(4096, 4096) == WIDE


def test_checkout_keeps_its_tables_beside_the_kernels(folder, monkeypatch):
    monkeypatch.delenv("TORCHPAR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    (folder / "shipped").mkdir()
    name = tables.file_name(DEVICE.name)
    own = folder / "cache" / "torchpar" / "tuned" / name
    assert tables.save(DEVICE, table()) == own
    (folder / "pyproject.toml").touch()
    assert tables.save(DEVICE, table()) == own, "the user's, which comes first, would hide it"
    own.unlink()
    monkeypatch.setenv("TORCHPAR_CACHE", "")
    assert tables.save(DEVICE, table()) == folder / "shipped" / "tuned" / name
    monkeypatch.delenv("TORCHPAR_CACHE")
    assert tables.save(DEVICE, table()) == folder / "shipped" / "tuned" / name


@pytest.mark.parametrize(
    "text, wrong",
    [
        ("{", "Expecting"),
        ("[]", "not the layout of a table"),
        ("{}", "'device'"),
        (json.dumps(table() | {"device": "Other"}), "the table is of 'Other', expected 'NVIDIA Test/9 GPU'"),
        (json.dumps(table(kernel="sort")), "sort of bfloat16 is not among symmetric_product"),
        (json.dumps(table(kind="bfloat17")), "symmetric_product of bfloat17 is not among"),
        (json.dumps(table([[8, 8, 8, SMALL]])), "not the layout of a table"),
        (json.dumps(table([{"up_to": None, "tiles": SMALL}])), "not the layout of a table"),
        (
            json.dumps(table([[8, 8, 0, 1, SMALL]])),
            "[8, 8, 0, 1, [64, 64, 64, 4, 3, 'pointers']], expected four sizes above 0",
        ),
        (json.dumps(table([[8, 8, 8.5, 1, SMALL]])), "expected four sizes"),
        (json.dumps(table([[8, 8, 10**400, 1, SMALL]])), "expected four sizes"),
        (json.dumps(table([[8, 8, 8, 1, []]])), "not the layout of a table"),
        (json.dumps(table([[8, 8, 8, 1, SMALL._replace(num_stages=9)]])), "a configuration of this device"),
        (json.dumps(table([[8, 8, 8, 1, SPLIT]])), "a configuration of this device"),
    ],
)
def test_wrong_file_is_named_and_not_used(folder, text, wrong):
    path = folder / "user" / tables.file_name(DEVICE.name)
    path.parent.mkdir()
    path.write_text(text)
    with pytest.warns(UserWarning, match=re.escape(wrong)) as caught:
        assert chosen(4096, 4096) == default(4096, 4096)
    assert str(path) in str(caught[0].message)
    assert "python -m torchpar tune" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(2048, 2048) == default(2048, 2048)  # once said is enough


def test_whole_numbers_of_a_table_are_integers(folder):
    """A kernel's constants must be."""
    path = folder / "user" / tables.file_name(DEVICE.name)
    path.parent.mkdir()
    path.write_text(json.dumps(table([[4096, 4096, 4096, 1, WIDE._replace(block_m=128.0, num_stages=4.0)]])))
    assert list(map(type, chosen(4096, 4096))) == list(map(type, WIDE))


def test_save_refuses_what_load_would(folder):
    with pytest.raises(ValueError, match="a configuration of this device"):
        tables.save(DEVICE._replace(capability=80), table())
    with pytest.raises(ValueError, match="expected 'Other'"):
        tables.save(DEVICE._replace(name="Other"), table())
    assert not (folder / "user").exists()
