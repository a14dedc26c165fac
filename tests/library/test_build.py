# SPDX-License-Identifier: MIT
"""The choice of the compiled library: by the PyTorch that runs, and never another's."""

import importlib.util
import runpy
import sys

import pytest
import torch

from torchpar.errors import ConfigError
from torchpar.library import build


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """The package's folder and the cache, both empty, and the paths that `build.load` opens."""
    opened = []
    spec = importlib.util.spec_from_file_location

    def note(name, path):
        opened.append(path)
        return spec(name, path)

    monkeypatch.setattr(importlib.util, "spec_from_file_location", note)
    monkeypatch.setattr(build, "__file__", str(tmp_path / "package" / "build.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for folder in (tmp_path / "package", tmp_path / "torchpar"):
        folder.mkdir()
    return tmp_path / "package", tmp_path / "torchpar", opened


def test_only_a_library_for_this_pytorch_is_loaded(folders, monkeypatch):
    package, cache, opened = folders
    name = build.library_name(["g++"])
    others = [name.replace(torch.__version__, "2.9.1+cu126")]
    for other, version in (("2.14.1", "2.14.2"), (torch.__version__, "2.9.1+cu126")):
        with monkeypatch.context() as patched:
            patched.setattr(torch, "__version__", version)
            patched.setattr(torch.version, "git_version", other)
            others.append(build.library_name(["g++"]))
    for folder in (package, cache):
        for one in others:
            (folder / one).write_text("a library for another PyTorch")
    assert (build.load(), opened) == (None, [])
    assert build.other_torches() == ["2.14.2", "2.9.1+cu126"]
    for folder in (cache, package):
        (folder / name).write_text("no library")
    assert build.load() is None
    assert opened == [package / name, cache / name]
    opened.clear()
    monkeypatch.setattr(torch.version, "git_version", "another build of the same version")
    assert (build.load(), opened) == (None, [])


def test_a_library_that_cannot_be_loaded_is_built_again(folders, monkeypatch, tmp_path):
    _, cache, _ = folders
    compiler = tmp_path / "compiler"
    compiler.write_text("""#!/bin/sh
[ "$1" = --version ] && exit
for path; do :; done
echo built >"$path"
""")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    path = cache / build.library_name([str(compiler)])
    path.write_text("no library")
    assert build.main([]) == 0
    assert path.read_text() == "built\n"


def test_a_place_that_cannot_be_written_is_named_in_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(build, "find_compiler", lambda: ["c++"])
    file = tmp_path / "file"
    file.touch()
    for arguments, flag in ((["--into", str(file / "x")], "--into"), ([], "XDG_CACHE_HOME, or by")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(file))
        monkeypatch.setattr(sys, "argv", ["torchpar", "build", *arguments])
        with pytest.raises(SystemExit, match=r"^2$"):
            runpy.run_module("torchpar", run_name="__main__")
        said = capsys.readouterr().err
        assert said.startswith("python -m torchpar build: error: ")
        assert "cannot be written (Not a directory)" in said
        assert f"name another place by {flag}" in said
        assert said.count("\n") == 1


def test_a_compiler_that_is_no_command_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "'c++ -O2")
    with pytest.raises(ConfigError, match=r"CXX is 'c\+\+ -O2, expected a command: No closing"):
        build.find_compiler()


def test_a_compiler_that_cannot_be_executed_is_named(monkeypatch, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!{tmp_path}/no-shell\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(ConfigError, match=r"compiler, which cannot be executed \(No such file"):
        build.main([])


def test_what_a_killed_build_has_left_is_removed(folders, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nfor path; do :; done\necho built >"$path"\n')
    compiler.chmod(0o755)
    path = tmp_path / "libraries" / "library.so"
    left = path.parent / f"{build.UNFINISHED}x"
    left.mkdir(parents=True)
    (left / path.name).write_text("half")
    (path.parent / "unfinished-thesis").mkdir()  # the folder of --into may be of anything
    build.build(path, [str(compiler)])
    assert path.read_text() == "built\n"
    names = sorted(one.name for one in path.parent.iterdir())
    assert names == ["build.lock", "library.so", "unfinished-thesis"]


def test_a_compiler_that_fails_is_named_with_its_error(folders, monkeypatch, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho in line 1 >&2\necho error: no concepts >&2\nexit 1\n")
    compiler.chmod(0o755)
    path = tmp_path / "library.so"
    with pytest.raises(ConfigError, match=r"cannot compile player.cpp .*: error: no concepts; "):
        build.build(path, [str(compiler)])
    assert not path.exists()
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(ConfigError, match=r"there is no C\+\+ compiler \(no-such-compiler -O2\)"):
        build.find_compiler()
