# SPDX-License-Identifier: MIT
"""Checkpoints: every bit back, kills during saves, damage, forgery, full disks, and other meshes."""

import hashlib
import io
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from faults import latest, same, steps, tensors, wait_for
from ranks import fork_context
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save

from torchpar.errors import ConfigError
from torchpar.nn import MLP
from torchpar.optim import SGD
from torchpar.parallel.launch.world import World, join_world
from torchpar.parallel.save.checkpoint import Checkpoint, Checkpoints
from torchpar.parallel.save.manifest import MANIFEST, UNSIGNED
from torchpar.parallel.save.storage import LocalShard
from torchpar.parallel.split.mlp import parallel_mlp
from torchpar.parallel.split.pipeline import stage_mlp
from torchpar.training import lr_scheduler, muon, sgd
from torchpar.training.state import TrainState

FILES = [".metadata", "__0_0.distcp", MANIFEST]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A world of one rank."""
    with join_world("cpu") as world:
        yield world


def content(step: int) -> dict[str, torch.Tensor]:
    """Tensors that all differ from step to step."""
    odd = torch.tensor([float(step), -0.0, float("nan"), float("inf"), 1e-45])
    return {"odd": odd, "bf16": odd.bfloat16(), "f64": odd.double(), "count": torch.tensor(step)} | {
        "whole": torch.full((129, 7), step, dtype=torch.uint8),
        "empty": torch.zeros(0, 5),
    }


def read(saved: Checkpoint | None, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    assert saved is not None
    found = {name: torch.full_like(t, 77) for name, t in like.items()}
    saved.read(found)
    return found


def bits(t: torch.Tensor) -> bytes:
    return t.contiguous().view(torch.uint8).numpy().tobytes() if t.dim() else t.numpy().tobytes()


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(bits(a[name]) == bits(b[name]) for name in a)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_gives_back_every_bit(world, tmp_path, asynchronous):
    checkpoints = Checkpoints(tmp_path / "new" / "folder", world, asynchronous=asynchronous)
    assert checkpoints.load() is None
    saved = content(3)
    checkpoints.save(3, saved, {"loss": 0.1, "nested": [{"é": None}]})
    expected, saved["odd"][0] = content(3), 9.0  # training goes on while the save is written
    found = checkpoints.load()
    assert found.path == tmp_path / "new" / "folder" / "step-3"
    assert found.state == {"loss": 0.1, "nested": [{"é": None}]}
    assert found.shapes == {name: t.shape for name, t in expected.items()}
    assert equal(read(found, expected), expected)
    assert not equal(read(found, expected), content(4))
    assert not equal(read(found, expected), saved)


@pytest.mark.parametrize("keep", [1, 3])
def test_keeps_the_newest(world, tmp_path, keep):
    checkpoints = Checkpoints(tmp_path, world, keep=keep)
    for step in (8, 9, 10, 11):  # not in the order of their names
        checkpoints.save(step, content(step), {"step": step})
        assert latest(tmp_path) == f"step-{step}"
    assert steps(tmp_path) == [f"step-{step}" for step in (8, 9, 10, 11)[-keep:]]
    assert checkpoints.load().state == {"step": 11}
    with pytest.raises(ConfigError, match="keep is 0, expected at least 1"):
        Checkpoints(tmp_path, world, keep=0)


@pytest.fixture
def two(world, tmp_path) -> Checkpoints:
    """Steps 1 and 2."""
    checkpoints = Checkpoints(tmp_path, world)
    for step in (1, 2):
        # Of one float in three, two texts of 17 digits have the same value.
        checkpoints.save(step, content(step), {"step": step, "loss": 0.1 + 0.2, "results": [8.1 * 1.1]})
    assert sorted(os.listdir(tmp_path / "step-2")) == sorted(FILES)
    return checkpoints


def skips(checkpoints: Checkpoints, file: Path, capsys: Any) -> None:
    """Check that the step before is loaded, and that the damaged file is named on stderr."""
    found = checkpoints.load()
    assert found.path.name == "step-1"
    assert found.state["step"] == 1
    assert equal(read(found, content(1)), content(1))
    (line,) = capsys.readouterr().err.splitlines()
    assert str(file) in line
    assert "skipped for the one before it" in line


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_named(two, capsys, name):
    file = two.folder / "step-2" / name
    whole = file.read_bytes()
    generator = random.Random(0)
    positions = generator.sample(range(len(whole)), min(len(whole), 100))
    for position in [0, len(whole) - 1, *positions]:
        flipped = bytearray(whole)
        flipped[position] ^= 1 << generator.randrange(8)
        file.write_bytes(flipped)
        skips(two, file, capsys)
    file.write_bytes(whole)
    assert two.load().path.name == "step-2"  # it was the bit
    assert capsys.readouterr().err == ""


def test_every_byte_of_a_manifest_counts(two, capsys):
    """Even the digits of a float beyond those that make its value."""
    file = two.folder / "step-2" / MANIFEST
    whole = file.read_bytes()
    survivors = []
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        file.write_bytes(flipped)
        found = two.load()
        if found.path.name != "step-1":
            survivors.append(whole[position - 20 : position + 2])
    capsys.readouterr()
    assert survivors == []


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda file: os.truncate(file, 0),
    "half": lambda file: os.truncate(file, file.stat().st_size // 2),
    "one byte less": lambda file: os.truncate(file, file.stat().st_size - 1),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "of another step": lambda file: shutil.copy(file.parent.parent / "step-1" / file.name, file),
    "folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_missing_file_is_named(two, capsys, name, damage):
    file = two.folder / "step-2" / name
    DAMAGES[damage](file)
    if damage == "of another step" and name == MANIFEST:  # which then has the SHA-256 of other files
        file = file.with_name(".metadata")
    skips(two, file, capsys)


def test_the_next_save_replaces_a_damaged_checkpoint(two, capsys):
    os.truncate(two.folder / "step-2" / "__0_0.distcp", 9)
    assert two.load().path.name == "step-1"
    two.save(2, content(2), {"step": 2})
    capsys.readouterr()
    assert equal(read(two.load(), content(2)), content(2))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", FILES)
def test_where_all_are_damaged_the_error_names_the_newest(two, name):
    for step in (1, 2):
        os.truncate(two.folder / f"step-{step}" / name, 5)
    with pytest.raises(ConfigError) as caught:
        two.load()
    assert str(two.folder / "step-2" / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_text("step-9\n")])
def test_latest_is_for_people(two, damage):
    damage(two.folder / "latest")
    assert two.load().path.name == "step-2"


def test_an_unfinished_save_is_skipped_and_removed(two, capsys):
    shutil.copytree(two.folder / "step-2", two.folder / "step-3.tmp")
    assert two.load().path.name == "step-2"
    assert f"{two.folder / 'step-3.tmp'} was not finished" in capsys.readouterr().err
    two.save(4, content(4), {})
    assert steps(two.folder) == ["step-2", "step-4"]


def test_a_folder_of_something_else_is_left_alone(world, tmp_path):
    for name in ("step-x", "step-1.old", "other"):
        (tmp_path / name).mkdir()
    checkpoints = Checkpoints(tmp_path, world, keep=1)
    assert checkpoints.load() is None
    checkpoints.save(1, content(1), {})
    checkpoints.save(2, content(2), {})
    assert {"step-x", "step-1.old", "other", "step-2"} == {p.name for p in tmp_path.glob("[!.]*")} - {
        "latest"
    }


def save_for_ever(folder: Path, way: str, first: int, rank: int, store: Path) -> None:
    """Save a tensor that two ranks share, and one of each rank's, all full of the step's number."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    with join_world("cpu") as world:
        save_steps(folder, way, first, world)


def save_steps(folder: Path, way: str, first: int, world: World) -> None:
    rank = world.rank
    checkpoints = Checkpoints(folder, world, asynchronous=way == "asynchronous")
    for step in itertools.count(first):
        whole = torch.full((20_001,), float(step))
        piece = LocalShard.of(whole.tensor_split(2)[rank], 0, 10_001 * rank, 20_001)
        content = {"shared": piece, f"own{rank}": whole}
        if way == "in place":
            save(content, storage_writer=FileSystemWriter(folder / "step-0", sync_files=True))
            (folder / "latest").write_text(str(step))
        else:
            checkpoints.save(step, content, {"step": step})


def load_whole(folder: Path, way: str, at_least: int) -> None:
    if way == "in place":
        found = tensors(folder / "step-0")
        step = int(found["shared"][0])
    else:
        with join_world("cpu") as world:
            saved = Checkpoints(folder, world).load()
            found = {name: torch.zeros(20_001) for name in ("shared", "own0", "own1")}
            saved.read(found)
        step = saved.state["step"]
        assert saved.path.name == f"step-{step}"
    assert step >= at_least
    assert len(found) == 3
    for t in found.values():
        assert t.eq(step).all()


def fork(function: Callable[[], None]) -> int:
    pid = os.fork()
    if not pid:
        try:
            function()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def kill(folder: Path, way: str, rounds: int) -> None:
    """Start two ranks that save, kill them at a random moment, and load; ``rounds`` times."""
    os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    torch.set_num_threads(1)
    generator = random.Random(way)
    unfinished = broken = 0
    for i in range(rounds):
        before = latest(folder)
        first = int(before.removeprefix("step-") or 0) + 1
        store = folder / f"store{i}"
        pids = [fork(partial(save_for_ever, folder, way, first, rank, store)) for rank in range(2)]
        after = wait_for(lambda before=before: (now := latest(folder)) != before and now)
        time.sleep(generator.uniform(0, 0.08))
        for pid in generator.sample(pids, 2):
            os.kill(pid, signal.SIGKILL)
            time.sleep(generator.choice([0, 0.01]))
        for pid in pids:
            os.waitpid(pid, 0)
        unfinished += any(folder.glob("step-*.tmp"))
        loader = fork(partial(load_whole, folder, way, int(after.removeprefix("step-"))))
        broken += os.waitpid(loader, 0)[1] != 0
        if broken:
            break
    (folder / "counts").write_text(json.dumps({"unfinished": unfinished, "broken": broken}))


def killed(folder: Path, way: str, rounds: int) -> tuple[dict[str, int], str]:
    process = fork_context().Process(target=kill, args=(folder, way, rounds))
    process.start()
    process.join(120)
    err = (folder / "stderr").read_text()
    assert process.exitcode == 0, err
    return json.loads((folder / "counts").read_text()), err


@pytest.mark.parametrize("rounds", [6, pytest.param(15, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", ["synchronous", "asynchronous"])
def test_killed_during_saves_it_is_whole_or_absent(tmp_path, way, rounds):
    counts, err = killed(tmp_path, way, rounds)
    assert counts["broken"] == 0, err
    assert counts["unfinished"] >= 1  # the kills did hit saves
    assert err.count("was not finished and is skipped") >= counts["unfinished"]


def test_overwriting_in_place_does_not_survive_the_same(tmp_path):
    counts, _ = killed(tmp_path, "in place", 60)
    assert counts["broken"] == 1


class Payload:
    """An object that makes a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def sign(path: Path) -> None:
    """Make the manifest right for the present files, as someone who knows the format can."""
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["sha256"] = UNSIGNED
    for name in manifest["files"]:
        manifest["files"][name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    text = json.dumps(manifest)
    (path / MANIFEST).write_text(text.replace(UNSIGNED, hashlib.sha256(text.encode()).hexdigest()))


def forge_metadata(path: Path, payload: Payload) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(payload))
    sign(path)


def forge_within_metadata(path: Path, payload: Payload) -> None:
    metadata: Metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.planner_data = payload
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(path)


def forge_manifest(path: Path, payload: Payload) -> None:
    (path / MANIFEST).write_bytes(pickle.dumps(payload))


def forge_shard(path: Path, payload: Payload) -> None:
    torch.save(payload, path / "__0_0.distcp")
    metadata: Metadata = pickle.loads((path / ".metadata").read_bytes())
    length = (path / "__0_0.distcp").stat().st_size
    for index in metadata.storage_data:
        metadata.storage_data[index] = _StorageInfo("__0_0.distcp", 0, length)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(path)


def forge_bytes(path: Path, payload: Payload) -> None:
    """Declare a tensor an object, which PyTorch's planner unpickles without an allow-list."""
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    (path / "__0_0.distcp").write_bytes(buffer.getvalue())
    metadata: Metadata = pickle.loads((path / ".metadata").read_bytes())
    for name in metadata.state_dict_metadata:
        metadata.state_dict_metadata[name] = BytesStorageMetadata()
    info = _StorageInfo("__0_0.distcp", 0, len(buffer.getvalue()))
    metadata.storage_data = {MetadataIndex(name): info for name in metadata.state_dict_metadata}
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(path)


@pytest.mark.parametrize(
    "forge", [forge_metadata, forge_within_metadata, forge_manifest, forge_shard, forge_bytes]
)
def test_a_payload_is_refused_and_not_executed(world, tmp_path, forge):
    mark = tmp_path / "mark"
    checkpoints = Checkpoints(tmp_path / "saved", world)
    checkpoints.save(1, content(1), {})
    sign(tmp_path / "saved" / "step-1")
    assert equal(read(checkpoints.load(), content(1)), content(1))  # the signature is right
    forge(tmp_path / "saved" / "step-1", Payload(mark))
    with pytest.raises(ValueError, match=r"step-1|rank 0: ") as caught:
        read(checkpoints.load(), content(1))
    assert "\n" not in str(caught.value)
    assert not mark.exists()


def test_the_payload_has_teeth(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


def save_on_a_full_disk(folder: Path, asynchronous: bool, full_on: int) -> list[str]:
    """Return this rank's errors of a save and of two waits for it."""
    with join_world("cpu") as world:
        checkpoints = Checkpoints(folder, world, asynchronous=asynchronous)
        values = {f"rank{world.rank}": torch.zeros(9999)}
        checkpoints.save(1, values, {})
        checkpoints.wait()
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        errors = []
        if world.rank == full_on:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            for call in (partial(checkpoints.save, 2, values, {}), checkpoints.wait, checkpoints.wait):
                try:
                    call()
                    errors.append("")
                except ConfigError as e:
                    errors.append(str(e))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        checkpoints.save(3, values, {})  # there is room again
        checkpoints.wait()
        return errors


@pytest.mark.parametrize("full_on", [0, 1])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_every_rank_raises_the_error_of_a_save_once(ranks, tmp_path, asynchronous, full_on):
    """The first wait raises that of an asynchronous save."""
    for errors in ranks(2, save_on_a_full_disk, tmp_path, asynchronous, full_on):
        message = errors.pop(1 if asynchronous else 0)
        assert errors == ["", ""]
        assert f"{tmp_path / 'step-2'} could not be saved: " in message
        assert f"rank {full_on}: " in message
        assert "File too large" in message
        assert "\n" not in message
    assert steps(tmp_path) == ["step-1", "step-3"]


def state_of(world: World, sizes: list[int], optimizer: str = "sgd", **mesh: int) -> tuple[World, TrainState]:
    """Return the world of a mesh, and this rank's state of a model on it after one step."""
    torch.manual_seed(1)
    world = world.with_mesh(**mesh)
    model = stage_mlp(parallel_mlp(MLP(sizes), world.mesh["tp"]), world.mesh["pp"])
    make = partial(muon, mesh=world.mesh["dp", "tp"]) if optimizer == "muon" else sgd
    made = make(model, lr=0.1, momentum=0.9, weight_decay=0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape)
    made.step()
    return world, TrainState(model, made, lr_scheduler(made, "linear", 9), {}, world)


def begin(folder: Path, sizes: list[int], **arguments: Any) -> None:
    with join_world("cpu") as world:
        world, state = state_of(world, sizes, **arguments)
        state.step = 5
        state.add_loss(torch.tensor(0.1 * (world.rank + 1), dtype=torch.float64))
        state.save(Checkpoints(folder, world), 5)


def hand_on(source: Path, target: Path, sizes: list[int], **arguments: Any) -> float:
    """Load another mesh's checkpoint on this mesh, and save it again."""
    with join_world("cpu") as world:
        world, state = state_of(world, sizes, **arguments)
        torch.manual_seed(7)
        state.resume(Checkpoints(source, world))
        assert state.step == 5
        # A split model's steps must not be computed as the saved run's were.
        if "optimizer" not in arguments:
            fused = True if type(state.optimizer) is SGD else None
            assert {group["fused"] for group in state.optimizer.param_groups} == {fused}
        state.save(Checkpoints(target, world), 5)
        return float(world.sum(torch.tensor(state.loss(), dtype=torch.float64)))


MESHES = [{"dp": 1}, {"tp": 2}, {"dp": 2, "tp": 2}, {"pp": 2, "tp": 2}, {"pp": 3}, {"tp": 3}, {"dp": 2}]


@pytest.mark.parametrize("optimizer", [{}, {"optimizer": "muon"}], ids=["sgd", "muon"])
def test_a_checkpoint_goes_from_mesh_to_mesh_with_every_bit(ranks, tmp_path, optimizer):
    """No number of ranks divides the layers' 33 and 7. Each mesh reads the checkpoint of the one before."""
    sizes = [9, 33, 7, 10]
    ranks(4, partial(begin, tmp_path / "0", sizes, dp=2, pp=2, **optimizer))
    first = tensors(tmp_path / "0" / "step-5")
    for i, mesh in enumerate(MESHES):
        world_size = mesh.get("dp", 1) * mesh.get("tp", 1) * mesh.get("pp", 1)
        hand = partial(hand_on, tmp_path / str(i), tmp_path / str(i + 1), sizes, **mesh, **optimizer)
        sums = ranks(world_size, hand)
        assert sums == [pytest.approx(0.1 * (1 + 2 + 3 + 4), abs=1e-15)] * world_size
        assert same(tensors(tmp_path / str(i + 1) / "step-5"), first), mesh
    assert first["model.layers.0.weight"].shape == (33, 9)
    assert first["optimizer.layers.1.weight.momentum_buffer"].shape == (7, 33)
    assert len(first) == 2 * 6 + 1
    # The weights that a mesh draws by itself differ: these were read, not drawn again.
    ranks(1, partial(begin, tmp_path / "fresh", sizes, dp=1, **optimizer))
    assert not same(tensors(tmp_path / "fresh" / "step-5"), first)


def test_a_model_of_other_sizes_is_refused(ranks, tmp_path):
    ranks(1, partial(begin, tmp_path / "0", [9, 33, 7, 10], dp=1))
    for sizes in ([9, 34, 7, 10], [9, 33, 10], [9, 33, 7, 7, 10]):
        with pytest.raises(ConfigError, match="holds no checkpoint of this run"):
            ranks(2, partial(hand_on, tmp_path / "0", tmp_path / "1", sizes, tp=2))
    assert not (tmp_path / "1").exists()


def test_a_damaged_later_checkpoint_does_not_replace_a_whole_one(world, tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path, world, keep=1)
    checkpoints.save(2, content(2), {"step": 2})
    shutil.copytree(tmp_path / "step-2", tmp_path / "step-9")
    (tmp_path / "step-9" / MANIFEST).write_text("{")
    checkpoints.save(3, content(3), {"step": 3})
    assert steps(tmp_path) == ["step-3", "step-9"]
    assert checkpoints.load().state == {"step": 3}
    assert "step-9" in capsys.readouterr().err


def save_and_stay(folder: Path) -> None:
    with join_world("cpu") as world:
        Checkpoints(folder, world).save(1, {"a": torch.ones(1)}, {})
        signal.pause()


def test_one_run_at_a_time_saves_to_a_folder(world, tmp_path):
    other = fork_context().Process(target=save_and_stay, args=(tmp_path,))
    other.start()
    try:
        wait_for(lambda: latest(tmp_path))
        with pytest.raises(ConfigError, match=r"another run saves to .*use another folder"):
            Checkpoints(tmp_path, world).save(2, content(2), {})
        assert steps(tmp_path) == ["step-1"]
    finally:
        other.kill()
        other.join()
    Checkpoints(tmp_path, world).save(2, content(2), {})
    assert steps(tmp_path) == ["step-1", "step-2"]


def test_a_state_that_cannot_be_split_is_refused(world, tmp_path):
    """As a plain tensor it would be saved once, but differs between ranks."""
    model = parallel_mlp(MLP([4, 3, 2]), world.mesh["tp"])
    optimizer = sgd(model, 0.1, 0.9, 0.0)
    train_state = TrainState(model, optimizer, lr_scheduler(optimizer, "constant", 1), {}, world)
    checkpoints = Checkpoints(tmp_path, world)
    weight = model.layers[0].weight
    for state in (torch.zeros(3, 4), torch.zeros(())):
        optimizer.state[weight] = {"row": state}
        train_state.save(checkpoints, 1)
    optimizer.state[weight] = {"row": torch.zeros(3)}
    with pytest.raises(ConfigError, match=r"row of layers\.0\.weight has shape \(3,\), expected \(3, 4\)"):
        train_state.save(checkpoints, 2)
    assert steps(tmp_path) == ["step-1"]
