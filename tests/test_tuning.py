# SPDX-License-Identifier: MIT
"""The choice of tiles: defaults, tables, what is wrong with a table, and the space that a search walks."""

import json
import re
import warnings

import pytest
import torch
from torch import Tensor

from torchpar.kernels import tuning
from torchpar.kernels.tuning import Block, Tiles

DEVICE = tuning.Device("NVIDIA Test/9 GPU", 90, 132)
SMALL, LARGE = Tiles(64, 64, 64, 4, 3), Tiles(128, 128, 64, 8, 4, True, False)
ENTRIES = [{"up_to": 512, "tiles": None}, {"up_to": 2048, "tiles": SMALL}, {"up_to": None, "tiles": LARGE}]
KINDS = [
    (torch.bfloat16, "ieee"),
    (torch.float16, "ieee"),
    (torch.float32, "ieee"),
    (torch.float32, "tf32"),
    (torch.float64, "ieee"),
]
MATRIX_KERNELS = ("symmetric_product", "symmetrized_product", "linear_sigmoid")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The user's folder, of a user with the device of the test and no shipped tables."""
    monkeypatch.setenv("TORCHPAR_CACHE", str(tmp_path / "user"))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped" / "tuned")
    monkeypatch.setattr(tuning, "device", lambda t: DEVICE)
    tuning._table.cache_clear()
    yield tmp_path
    tuning._table.cache_clear()


def table(entries=ENTRIES, kind: str = "bfloat16", kernel: str = "symmetric_product") -> dict:
    return {"device": DEVICE.name, "tiles": {kernel: {kind: entries}}}


def chosen(n: int, k: int, batch: int = 1, dtype=torch.bfloat16, like: Tensor | None = None) -> Tiles | None:
    x = torch.empty(n, k, dtype=dtype, device="meta") if like is None else like
    return tuning.chosen("symmetric_product", dtype, "ieee", n, n, k, batch, x)


def default(n: int, k: int, dtype=torch.bfloat16) -> Tiles:
    return tuning.default_tiles(dtype, "ieee", n, n, torch.empty(n, k, dtype=dtype, device="meta"))


def test_saved_table_is_what_is_chosen(folder):
    path = tuning.save(DEVICE.name, table())
    assert path == folder / "user" / "nvidia-test-9-gpu.json"
    assert tuning.load(DEVICE.name) == json.loads(json.dumps(table()))
    assert [chosen(n, n) for n in (64, 512, 520, 2048, 2056)] == [None, None, SMALL, SMALL, LARGE]
    # The size is the geometric mean: 512³ = 256²·2048.
    assert chosen(256, 2048) is None
    assert chosen(256, 2056) == SMALL
    assert list(path.parent.iterdir()) == [path], "something else was left behind"


def test_what_the_table_lacks_takes_the_defaults():
    tuning.save(DEVICE.name, table())
    assert chosen(4096, 4096, dtype=torch.float16) == default(4096, 4096, torch.float16) != LARGE
    assert chosen(128, 128, batch=31) is None
    assert chosen(128, 128, batch=32) == default(128, 128)
    tuning.save(DEVICE.name, table(kind="bfloat16 batched"))
    assert chosen(128, 128, batch=32) is None
    assert chosen(4096, 4096, batch=32) == LARGE


@pytest.mark.parametrize("n, stride", [(4096, 4097), (4095, 4096)])
def test_table_is_for_operands_that_move_16_bytes(n, stride):
    tuning.save(DEVICE.name, table())
    x = torch.empty(n * stride, dtype=torch.bfloat16, device="meta").as_strided((n, 4096), (stride, 1))
    assert chosen(n, 4096, like=x) == Tiles(64, 64, 32, 8, 3) != LARGE


def test_sizes_may_be_symbolic():
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    tuning.save(DEVICE.name, table())
    env = ShapeEnv()
    symbol = env.create_unspecified_symbol(1024, source=torch._dynamo.source.ConstantSource("n"))
    n = env.create_symintnode(symbol, hint=1024)
    x = torch.empty(1024, 1024, dtype=torch.bfloat16, device="meta")
    assert tuning.chosen("symmetric_product", torch.bfloat16, "ieee", n, n, n, 1, x) == SMALL
    assert env.guards, "the choice holds for sizes that would have had another"


def test_users_table_comes_first(folder):
    shipped = folder / "shipped" / "tuned"
    tuning.save(DEVICE.name, table([{"up_to": None, "tiles": SMALL}]), shipped)
    assert chosen(4096, 4096) == SMALL
    tuning.save(DEVICE.name, table())
    assert chosen(4096, 4096) == LARGE


def test_checkout_keeps_its_tables_beside_the_kernels(folder, monkeypatch):
    monkeypatch.delenv("TORCHPAR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    (folder / "shipped").mkdir()
    name = tuning.file_name(DEVICE.name)
    own = folder / "cache" / "torchpar" / "tuned" / name
    assert tuning.save(DEVICE.name, table()) == own
    (folder / "pyproject.toml").touch()
    assert tuning.save(DEVICE.name, table()) == own, "the user's, which comes first, would hide it"
    own.unlink()
    assert tuning.save(DEVICE.name, table()) == folder / "shipped" / "tuned" / name


def one(tiles) -> list[dict]:
    return [{"up_to": None, "tiles": tiles}]


@pytest.mark.parametrize(
    "text, wrong",
    [
        ("{", "Expecting"),
        ("[]", "not laid out as a table"),
        ("{}", "'device'"),
        (json.dumps(table() | {"device": "Other"}), "it is of 'Other', expected 'NVIDIA Test/9 GPU'"),
        (json.dumps(table(kernel="sort")), "'sort' is no kernel"),
        (json.dumps(table(kind="bfloat17")), "no such kind"),
        (json.dumps(table(kind="float32")), "no such kind"),
        (json.dumps(table([])), "up_to is []"),
        (json.dumps(table(ENTRIES[:2])), "null at the end"),
        (json.dumps(table([ENTRIES[1], ENTRIES[0], ENTRIES[2]])), "rising sizes"),
        (json.dumps(table(one([64, 64, 64, 4]))), "not laid out as a table"),
        (json.dumps(table(one([64, 64, 64, "4", 3]))), "not five numbers"),
        (json.dumps(table(one([64, 64, 64, 4, 3, 1, 0]))), "truth values"),
        (json.dumps(table(one([96, 96, 64, 4, 3]))), "powers of two"),
        (json.dumps(table(one([64, 64, 64, 4, 9]))), "9 stages"),
        (json.dumps(table(one([64, 128, 64, 4, 3]))), "not square"),
        (json.dumps(table(one([256, 256, 64, 8, 3]))), "256 registers a thread"),
        (json.dumps(table(one([128, 128, 128, 8, 4]))), "262144 bytes of shared memory, of 232448"),
    ],
)
def test_wrong_file_is_named_and_not_used(folder, text, wrong):
    path = folder / "user" / tuning.file_name(DEVICE.name)
    path.parent.mkdir()
    path.write_text(text)
    with pytest.warns(UserWarning, match=re.escape(wrong)) as caught:
        assert chosen(4096, 4096) == default(4096, 4096)
    assert str(path) in str(caught[0].message)
    assert "python -m torchpar tune" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(2048, 2048) == default(2048, 2048)  # once said is enough


def test_save_refuses_what_load_would(folder):
    with pytest.raises(ValueError, match="not square"):
        tuning.save(DEVICE.name, table(one([64, 128, 64, 4, 3])))
    with pytest.raises(ValueError, match="expected 'Other'"):
        tuning.save("Other", table())
    assert not (folder / "user").exists()


def test_tma_is_refused_where_there_is_none(monkeypatch):
    tuning.save(DEVICE.name, table())
    monkeypatch.setattr(tuning, "device", lambda t: DEVICE._replace(capability=80))
    with pytest.warns(UserWarning, match="no TMA"):
        assert chosen(4096, 4096) == default(4096, 4096)


@pytest.mark.parametrize("capability", [0, 80, 90, 100, 120])
@pytest.mark.parametrize("dtype, precision", KINDS)
@pytest.mark.parametrize("kernel", MATRIX_KERNELS)
def test_candidates_are_possible(kernel, dtype, precision, capability):
    found = tuning.candidates(kernel, dtype, precision, capability)
    assert 10 <= len(set(found)) == len(found) <= 40
    itemsize = dtype.itemsize
    for tiles in found:
        sums = tiles.block_m * tiles.block_n * max(1, itemsize // 4) / (32 * tiles.num_warps)
        buffers = tiles.num_stages - (capability == 0)
        shared = buffers * (tiles.block_m + tiles.block_n) * tiles.block_k * itemsize
        assert sums <= 192
        assert shared <= {0: 65536, 80: 166912, 120: 101376}.get(capability, 232448)
        assert not (tiles.tma and capability < 90)
    has_tma = kernel == "symmetric_product" and capability >= 90 and (itemsize == 2 or precision == "tf32")
    assert any(tiles.tma for tiles in found) == has_tma


def test_candidates_of_maximum():
    found = tuning.candidates("maximum", torch.bfloat16, "ieee", 90)
    assert Block(2048, 4) in found
    assert all(isinstance(block, Block) for block in found)


@pytest.mark.parametrize("capability", [0, 80, 90])
def test_defaults_take_tma_from_hopper_on(monkeypatch, capability):
    monkeypatch.setattr(tuning, "device", lambda t: DEVICE._replace(capability=capability))
    for dtype, precision in KINDS:
        x = torch.empty(4096, 4096, dtype=dtype, device="meta")
        tiles = tuning.default_tiles(dtype, precision, 4096, 4096, x)
        assert tiles.tma == (capability == 90 and (dtype.itemsize == 2 or precision == "tf32"))
        assert not tuning.default_tiles(dtype, precision, 512, 512, x[:512, :512].contiguous()).tma
