# SPDX-License-Identifier: MIT
"""Checkpoints: every bit back, kills during saves, damage, forgery, full disks, and other
meshes."""

import errno
import fcntl
import json
import os
import pickle
import resource
import shutil
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from saved import latest, same, steps, tensors
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim.lr_scheduler import LambdaLR

from torchpar.data import Samples
from torchpar.errors import ConfigError
from torchpar.nn import MLP
from torchpar.parallel.launch.world import join_world
from torchpar.parallel.save import checkpoint
from torchpar.parallel.save.checkpoint import MANIFEST, Checkpoint, Checkpoints, write_manifest
from torchpar.parallel.split.mlp import parallel_mlp
from torchpar.parallel.split.pipeline import stage_mlp
from torchpar.training import CheckpointConfig, Classification, Run, muon, sgd, state

FILES = [".metadata", "__0_0.distcp", MANIFEST]


def content(step: int) -> dict[str, torch.Tensor]:
    """Tensors that all differ from step to step."""
    odd = torch.tensor([float(step), -0.0, float("nan"), float("inf"), 1e-45])
    return {
        "odd": odd,
        "bf16": odd.bfloat16(),
        "f64": odd.double(),
        "count": torch.tensor(step),
    } | {
        "whole": torch.full((129, 7), step, dtype=torch.uint8),
        "empty": torch.zeros(0, 5),
        "int16": torch.tensor([step, -step], dtype=torch.int16),
        "complex": torch.full((2,), complex(step, -0.0)),
    }


def holds(saved: Checkpoint, step: int) -> bool:
    expected = content(step)
    found = {name: torch.full_like(t, 77) for name, t in expected.items()}
    saved.read(found)
    return same(found, expected)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_gives_back_every_bit(world, tmp_path, asynchronous):
    checkpoints = Checkpoints(
        CheckpointConfig(tmp_path / "new" / "folder", asynchronous=asynchronous), world
    )
    assert checkpoints.load() is None
    checkpoints.save(2, content(2), {})
    saved = content(3)
    checkpoints.save(3, saved, {"loss": 0.1, "nested": [{"é": None}]})
    saved["odd"][0] = 9.0  # training goes on while the save is written
    found = checkpoints.load()
    assert (found.path.name, found.state) == ("step-3", {"loss": 0.1, "nested": [{"é": None}]})
    assert found.shapes == {name: t.shape for name, t in saved.items()}
    assert holds(found, 3)
    assert not holds(found, 2)
    assert steps(checkpoints.folder) == ["step-2", "step-3"]  # a save waits for the one before it
    manifest = json.loads((found.path / MANIFEST).read_text())
    assert manifest["mesh"] == {"pp": 1, "dp": 1, "tp": 1}
    assert manifest["shapes"]["whole"] == [129, 7]


def test_a_save_waits_for_the_one_in_progress(world, tmp_path, monkeypatch):
    checkpoints = Checkpoints(CheckpointConfig(tmp_path, asynchronous=True), world)
    events = []

    def slow(step: int, *_: Any) -> None:
        events.append(("begin", step))
        time.sleep(0.2)
        events.append(("end", step))

    monkeypatch.setattr(checkpoints, "_save", slow)
    for step in (1, 2):
        checkpoints.save(step, {}, {})
    checkpoints.wait()
    assert events == [("begin", 1), ("end", 1), ("begin", 2), ("end", 2)]


def test_files_and_their_names_are_flushed_to_the_disk(world, tmp_path, monkeypatch):
    flushed, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: flushed.add(os.fstat(file).st_ino) or fsync(file))
    Checkpoints(CheckpointConfig(tmp_path), world).save(1, content(1), {})
    saved = [tmp_path, tmp_path / "latest", tmp_path / "step-1", *(tmp_path / "step-1").iterdir()]
    assert {path.stat().st_ino for path in saved} <= flushed


@pytest.mark.parametrize("keep", [1, 3])
def test_keeps_the_newest(world, tmp_path, keep):
    others = {"step-x", "step-1.old", "other"}  # of something else: they are left alone
    for name in others:
        (tmp_path / name).mkdir()
    checkpoints = Checkpoints(CheckpointConfig(tmp_path, keep=keep), world)
    for step in (8, 9, 10, 11):  # not in the order of their names
        checkpoints.save(step, content(step), {"step": step})
        assert latest(tmp_path) == f"step-{step}"
    kept = {f"step-{step}" for step in (8, 9, 10, 11)[-keep:]}
    assert {p.name for p in tmp_path.glob("[!.]*")} == {*kept, *others, "latest"}
    assert checkpoints.load().state == {"step": 11}
    with pytest.raises(ConfigError, match="keep is 0, expected a whole number from 1 on"):
        Checkpoints(CheckpointConfig(tmp_path, keep=0), world)


@pytest.fixture
def two(world, tmp_path) -> Checkpoints:
    checkpoints = Checkpoints(CheckpointConfig(tmp_path), world)
    for step in (1, 2):
        # Of one float in three, two texts of 17 digits have the same value.
        checkpoints.save(
            step, content(step), {"step": step, "loss": 0.1 + 0.2, "results": [8.1 * 1.1]}
        )
    assert sorted(os.listdir(tmp_path / "step-2")) == sorted(FILES)
    return checkpoints


def flip(file: Path) -> None:
    """Flip a bit; in the manifest that of a float's digit beyond those that make its value."""
    flipped = bytearray(file.read_bytes())
    flipped[flipped.rfind(b"4")] ^= 1
    file.write_bytes(flipped)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flip,
    "missing": Path.unlink,
    "one byte less": lambda file: os.truncate(file, file.stat().st_size - 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_step_before_loaded(two, capsys, name, damage):
    file = two.folder / "step-2" / name
    DAMAGES[damage](file)
    found = two.load()
    assert (found.path.name, found.state["step"]) == ("step-1", 1)
    assert holds(found, 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert str(file) in line
    assert "skipped for the previous checkpoint" in line
    two.save(2, content(2), {"step": 2})  # replaces it
    assert holds(two.load(), 2)
    assert capsys.readouterr().err == ""


def test_unfinished_and_damaged_later_checkpoints_replace_no_whole_one(two, capsys):
    shutil.copytree(two.folder / "step-2", two.folder / "step-3.tmp")
    shutil.copytree(two.folder / "step-2", two.folder / "step-9")
    (two.folder / "step-9" / MANIFEST).write_text("{")
    (two.folder / "latest").write_text("step-9\n")  # for people: nothing reads it
    two = Checkpoints(CheckpointConfig(two.folder, keep=1), two.world)
    assert two.load().path.name == "step-2"
    unfinished, damaged = capsys.readouterr().err.splitlines()
    assert f"{two.folder / 'step-3.tmp'} was not finished" in unfinished
    assert "step-9" in damaged
    two.save(4, content(4), {"step": 4})
    assert steps(two.folder) == ["step-4", "step-9"]
    assert two.load().state == {"step": 4}
    os.truncate(two.folder / "step-4" / "__0_0.distcp", 5)
    with pytest.raises(
        ConfigError, match=r"step-9/manifest.json is damaged .* remove them to start afresh"
    ):
        two.load()


def killed(folder: Path, function: Callable[[], object]) -> list[Path]:
    """Copies of ``folder`` before each access to the disk of ``function``, as a kill would leave
    it."""
    copies: list[Path] = []
    copying = False

    def copy(event: str, args: Any) -> None:
        nonlocal copying
        changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
        if not copying and (changes or (event == "open" and str(args[0]).startswith(str(folder)))):
            copying = True
            copies.append(shutil.copytree(folder, folder.with_name(f"copy-{len(copies)}")))
            copying = False

    sys.addaudithook(copy)
    function()
    copying = True  # a hook stays
    return copies


@pytest.mark.parametrize("asynchronous", [False, True])
def test_killed_at_any_access_to_the_disk_a_save_is_whole_or_absent(world, tmp_path, asynchronous):
    folder = tmp_path / "saved"
    checkpoints = Checkpoints(CheckpointConfig(folder, keep=1, asynchronous=asynchronous), world)

    def save(step: int) -> None:
        checkpoints.save(step, content(step), {"step": step})
        checkpoints.wait()

    save(1)
    found = [
        Checkpoints(CheckpointConfig(copy), world).load()
        for copy in killed(folder, partial(save, 2))
    ]
    assert [saved.state["step"] for saved in found] == sorted(
        int(saved.path.name[5:]) for saved in found
    )
    assert all(holds(saved, saved.state["step"]) for saved in found)
    assert {saved.state["step"] for saved in found} == {1, 2}


class Payload:
    """An object that makes a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def sign(path: Path) -> None:
    """Make the manifest right for the present files, as someone who knows the format can."""
    contents = json.loads((path / MANIFEST).read_text())
    del contents["sha256"]
    write_manifest(path, list(contents.pop("files")), contents)


def forge(path: Path, payload: Payload, how: str) -> None:
    """Hide the payload within the metadata, or in the place of the tensors.

    PyTorch's planner unpickles objects without an allow-list, so the last way declares the tensors
    objects.
    """
    metadata: Metadata = pickle.loads((path / ".metadata").read_bytes())
    if how == "in the metadata":
        metadata.planner_data = payload
    else:
        torch.save(payload, path / "__0_0.distcp")
        info = _StorageInfo("__0_0.distcp", 0, (path / "__0_0.distcp").stat().st_size)
        metadata.storage_data = dict.fromkeys(metadata.storage_data, info)
    if how == "as objects":
        names = metadata.state_dict_metadata
        metadata.state_dict_metadata = dict.fromkeys(names, BytesStorageMetadata())
        metadata.storage_data = {MetadataIndex(name): info for name in names}
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(path)


@pytest.mark.parametrize(
    "how, reason",
    [
        ("in the metadata", "system is not allowed"),
        ("as tensors", "Weights only load failed"),
        ("as objects", "BytesStorageMetadata is not allowed"),
    ],
)
def test_a_payload_is_refused_and_not_executed(world, tmp_path, how, reason):
    payload = Payload(tmp_path / "mark")
    checkpoints = Checkpoints(CheckpointConfig(tmp_path / "saved"), world)
    checkpoints.save(1, content(1), {})
    sign(tmp_path / "saved" / "step-1")
    assert holds(checkpoints.load(), 1)  # the signature is right
    forge(tmp_path / "saved" / "step-1", payload, how)
    with pytest.raises(ValueError, match=reason) as caught:
        holds(checkpoints.load(), 1)
    assert "\n" not in str(caught.value)
    assert not payload.mark.exists()
    pickle.loads(pickle.dumps(payload))
    assert payload.mark.exists()


def save_on_a_full_disk(folder: Path, asynchronous: bool, full_on: int) -> list[str]:
    """Return this rank's errors of three saves and waits; there is no room for the second one."""
    errors = []
    with join_world("cpu") as world:
        checkpoints = Checkpoints(CheckpointConfig(folder, asynchronous=asynchronous), world)
        values = {f"rank{world.rank}": torch.zeros(9999)}
        room = resource.getrlimit(resource.RLIMIT_FSIZE)
        for step in (1, 2, 3):
            if world.rank == full_on:
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, room[1]) if step == 2 else room)
            for call in (partial(checkpoints.save, step, values, {}), checkpoints.wait):
                try:
                    call()
                    errors.append("")
                except ConfigError as e:
                    errors.append(str(e))
    return errors


@pytest.mark.parametrize("asynchronous, full_on", [(False, 1), (True, 0)])
def test_every_rank_raises_the_error_of_a_save_once(ranks, tmp_path, asynchronous, full_on):
    """The wait raises that of an asynchronous save."""
    for errors in ranks(2, save_on_a_full_disk, tmp_path, asynchronous, full_on):
        message = errors.pop(3 if asynchronous else 2)
        assert not any(errors)
        assert f"{tmp_path / 'step-2'} could not be saved: rank {full_on}: " in message
        assert "File too large" in message
        assert "\n" not in message
    assert steps(tmp_path) == ["step-1", "step-3"]


def save_to_two_folders(folder: Path) -> None:
    error = r"could not be saved: .*No such file.*__1_0\.distcp.* take a folder that all ranks see"
    with join_world("cpu") as world, pytest.raises(ConfigError, match=error):
        Checkpoints(CheckpointConfig(folder / str(world.rank)), world).save(
            1, {f"rank{world.rank}": torch.zeros(9)}, {}
        )


def test_ranks_that_see_different_folders_are_told_so(ranks, tmp_path):
    ranks(2, save_to_two_folders, tmp_path)
    assert not steps(tmp_path / "0")  # nor a part


def make_run(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    world: Any,
    checkpoint: CheckpointConfig | None = None,
) -> Run:
    samples = Samples(torch.zeros(9, 2), torch.zeros(9, dtype=torch.int64), ("a",))
    scheduler = LambdaLR(optimizer, lambda step: 1 - step / 9)
    task = Classification(samples, samples, 1)
    return Run(model, optimizer, scheduler, world, task, epochs=1, checkpoint=checkpoint)


def pass_on(
    source: Path | None, target: Path, sizes: list[int], optimizer: str, **mesh: int
) -> float:
    """Load another mesh's checkpoint on this mesh, if any, and save it; return the sum of the
    losses."""
    with join_world("cpu") as world:
        torch.manual_seed(7 if source else 1)
        world = world.with_mesh(**mesh)
        model = stage_mlp(parallel_mlp(MLP(sizes), world.mesh["tp"]), world.mesh["pp"])
        make = partial(muon, mesh=world.mesh["dp", "tp"]) if optimizer == "muon" else sgd
        made = make(model, lr=0.1, momentum=0.9, weight_decay=0)
        for p in model.parameters():
            p.grad = torch.randn(p.shape)
        made.step()
        run = make_run(model, made, world)
        if source:
            assert state.resume(run.state, Checkpoints(CheckpointConfig(source), world))
        else:
            run.state.step, run.state.loss_sum = 5, 0.1 * (world.rank + 1)
        assert run.state.step == 5
        state.save(run.state, Checkpoints(CheckpointConfig(target), world), 5)
        return float(world.sum(torch.tensor(run.state.loss_sum, dtype=torch.float64)))


MESHES = [(1, {"dp": 1}), (3, {"tp": 3}), (2, {"dp": 2}), (3, {"pp": 3}), (4, {"dp": 2, "tp": 2})]


@pytest.mark.parametrize(
    "optimizer, meshes",
    [
        ("muon", MESHES[:3]),
        pytest.param("muon", MESHES[3:], marks=pytest.mark.slow),
        pytest.param("sgd", MESHES, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_goes_from_mesh_to_mesh_with_every_bit(ranks, tmp_path, optimizer, meshes):
    """No number of ranks divides the layers' 33 and 7. Each mesh reads the checkpoint of the one
    before."""
    sizes = [9, 33, 7, 10]
    ranks(4, partial(pass_on, None, tmp_path / "0", sizes, optimizer, pp=2, tp=2))
    first = tensors(tmp_path / "0" / "step-5")
    for i, (world_size, mesh) in enumerate(meshes):
        source, target = tmp_path / str(i), tmp_path / str(i + 1)
        sums = ranks(world_size, partial(pass_on, source, target, sizes, optimizer, **mesh))
        assert sums == [pytest.approx(0.1 * (1 + 2 + 3 + 4), abs=1e-15)] * world_size
        assert same(tensors(target / "step-5"), first), mesh
    assert first["model.layers.0.weight"].shape == (33, 9)
    assert first["optimizer.layers.1.weight.momentum_buffer"].shape == (7, 33)
    assert len(first) == 2 * 6 + 2
    for others, reason in (
        ([9, 34, 7, 10], "holds no checkpoint of this run"),
        ([9, 33, 10], r"holds layers\.2\.bias, which the model lacks"),
        ([9, 33, 7, 7, 10], r"does not hold layers\.3\.bias of the model"),
    ):
        with pytest.raises(ConfigError, match=reason):
            ranks(2, partial(pass_on, tmp_path / "0", tmp_path / "other", others, optimizer, tp=2))


HOLDS = """
import fcntl, json, os, sys, time
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(file, fcntl.LOCK_EX)
holder = {"process": os.getpid(), "launcher": int(sys.argv[2]), "host": sys.argv[3]}
os.write(file, json.dumps(holder).encode())
print(flush=True)
time.sleep(float(sys.argv[4]))
"""


@contextmanager
def held(folder: Path, launcher: int = 0, host: str = "", seconds: float = 60.0) -> Iterator[int]:
    """Let another process lock ``folder``, as the rank 0 of a run does, and end later."""
    folder.mkdir(exist_ok=True)
    where = host or socket.gethostname()
    arguments = [str(folder / ".lock"), str(launcher), where, str(seconds)]
    command = [sys.executable, "-c", HOLDS, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"\n"
        yield process.pid
        process.kill()


@pytest.mark.parametrize("has_torchrun", [False, True])
def test_one_run_at_a_time_saves_to_a_folder(world, tmp_path, monkeypatch, capsys, has_torchrun):
    """The second one is refused before its first step, which waits for no save of the first."""
    monkeypatch.setattr(checkpoint, "LINGER", 0.2)
    with held(tmp_path, launcher=os.getpid() if has_torchrun else 0) as other:
        message = (
            rf"another run saves to .* \(process {other} on .*\); wait for its end, or use another"
        )
        config = CheckpointConfig(tmp_path)
        model = MLP([4, 2])
        optimizer = sgd(model, 0.1, 0.9, 0.0)
        run = make_run(model, optimizer, world, config)
        with pytest.raises(ConfigError, match=message), run:
            run.resume()
        with pytest.raises(ConfigError, match=message):
            Checkpoints(config, world).save(3, content(3), {})
    assert capsys.readouterr().err == ""
    assert not [*tmp_path.glob("[!.]*")]
    Checkpoints(config, world).save(3, content(3), {})
    assert steps(tmp_path) == ["step-3"]


@pytest.mark.parametrize("launcher, host", [(1, ""), (0, "elsewhere")])
def test_a_run_waits_for_ranks_that_may_end(world, tmp_path, monkeypatch, capsys, launcher, host):
    """Those of a torchrun that was killed, and those that this machine does not see."""
    monkeypatch.setattr(checkpoint, "LINGER", 0.0)
    checkpoints = Checkpoints(CheckpointConfig(tmp_path), world)
    with held(tmp_path, launcher, host, seconds=0.5) as other:
        checkpoints.lock()
    where = host or socket.gethostname()
    said = f"checkpoint: process {other} on {where} still saves to {tmp_path}; waiting up to 35 s\n"
    assert capsys.readouterr().err == said
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "0")
    monkeypatch.setattr(checkpoint, "SLACK", 0.2)
    folder = tmp_path / "other"
    with held(folder, launcher, host), pytest.raises(ConfigError, match="another run saves to"):
        Checkpoints(CheckpointConfig(folder), world).lock()


ASKS = """
import fcntl, sys
try:
    fcntl.flock(open(sys.argv[1], "r+"), fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("free")
except BlockingIOError:
    print("locked")
"""


def is_locked(folder: Path) -> bool:
    """Whether another process finds ``folder`` locked."""
    command = [sys.executable, "-c", ASKS, str(folder / ".lock")]
    answer = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    assert answer in ("free\n", "locked\n")
    return answer == "locked\n"


def test_a_folder_stays_locked_where_the_run_copies_it_and_runs_again(world, tmp_path):
    """Reading `.lock` would drop a lock of POSIX."""
    folder, backup = tmp_path / "run", tmp_path / "backup"
    before = checkpoint._LOCKED.copy()
    Checkpoints(CheckpointConfig(folder), world).lock()
    assert is_locked(folder)
    shutil.copytree(folder, backup)
    assert is_locked(folder)
    assert not is_locked(backup)
    Checkpoints(CheckpointConfig(folder), world).lock()  # another run of this process
    (locked,) = checkpoint._LOCKED.items() - before.items()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of a fork beside threads
        child = os.fork()
    if child == 0:
        with suppress(BaseException):
            os._exit(7 if not checkpoint._LOCKED and has_closed(locked[1]) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert is_locked(folder)
    os.close(checkpoint._LOCKED.pop(locked[0]))
    assert not is_locked(folder)


def has_closed(file: int) -> bool:
    try:
        os.fstat(file)
    except OSError:
        return True
    return False


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(two, tmp_path):
    (tmp_path / "file").touch()
    config = CheckpointConfig(tmp_path / "file" / "folder")
    with pytest.raises(ConfigError, match=r"nothing can be saved to .*folder \(.*Not a directory"):
        Checkpoints(config, two.world).lock()
    read_only = OSError(errno.EROFS, "Read-only file system")
    with patch.object(Checkpoints, "_lock", side_effect=read_only):
        Checkpoints(two.config, two.world).lock()  # it may be the result of a run that has ended
        with pytest.raises(ConfigError, match=r"nothing can be saved to .*Read-only"):
            Checkpoints(CheckpointConfig(tmp_path / "new"), two.world).lock()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(world, tmp_path, monkeypatch, code):
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(code, "no locks")))
    with pytest.raises(ConfigError, match=r"cannot be locked \(.*no locks\); use a folder of"):
        Checkpoints(CheckpointConfig(tmp_path), world).lock()


def test_a_state_that_cannot_be_split_is_refused(world, tmp_path):
    """As a plain tensor it would be saved once, but differs between ranks."""
    model = parallel_mlp(MLP([4, 3, 2]), world.mesh["tp"])
    optimizer = sgd(model, 0.1, 0.9, 0.0)
    run = make_run(model, optimizer, world)
    checkpoints = Checkpoints(CheckpointConfig(tmp_path), world)
    weight = model.layers[0].weight
    optimizer.state[weight] = {"row": torch.zeros(3, 4), "number": torch.zeros(())}
    state.save(run.state, checkpoints, 0)
    optimizer.state[weight] = {"row": torch.zeros(3)}
    with pytest.raises(
        ConfigError, match=r"row of layers\.0\.weight has shape \(3,\), expected \(3, 4\)"
    ):
        state.save(run.state, checkpoints, 0)
    assert steps(tmp_path) == ["step-0"]
    optimizer.state[weight] = {"history": [torch.zeros(3, 4)]}
    with pytest.raises(
        ConfigError, match=r"history of layers\.0\.weight is a list, expected a tensor;"
    ):
        state.save(run.state, checkpoints, 0)


def test_keys_that_are_numbers_come_back_as_such(world, tmp_path):
    """JSON has none, and MultiStepLR's milestones are some."""
    checkpoints = Checkpoints(CheckpointConfig(tmp_path), world)
    for rate in (0.1, 0.7):  # the first is saved, the second resumes
        model = MLP([4, 2])
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        run = make_run(model, optimizer, world)
        optimizer.param_groups[0]["betas"] = (0.9, 0.99)  # of another optimizer
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1], gamma=0.1)
        run.state.lr_scheduler = scheduler
        if rate == 0.1:
            state.save(run.state, checkpoints, 0)
    assert state.resume(run.state, checkpoints)
    optimizer.step()
    scheduler.step()
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"]) == (pytest.approx(0.01), (0.9, 0.99))


def test_pytorchs_own_state_of_an_optimizer_takes_a_step():
    """Which is why `torchpar.training.state` has its own; if this fails, PyTorch's may do."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    hooks = []
    optimizer.register_step_pre_hook(lambda *_: hooks.append("step"))
    found = get_optimizer_state_dict(model, optimizer)["state"]
    assert hooks == ["step"]
    assert {float(values["step"]) for values in found.values()} == {1.0}
