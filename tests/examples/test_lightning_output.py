# SPDX-License-Identifier: MIT
"""The lines that train_lightning.py prints: at the start, after each epoch, and true seconds."""

import re
import sys
import time
from importlib.util import find_spec

import pytest
from commands import ROOT, run
from fake_data import fashion_mnist

pytestmark = pytest.mark.skipif(
    find_spec("lightning") is None, reason="the extra `lightning` is not installed"
)


@pytest.mark.filterwarnings("ignore:The number of training batches")  # fewer than the log's steps
@pytest.mark.slow  # Lightning takes seconds to import
def test_the_seconds_are_no_more_than_passed_and_each_epoch_has_a_line(
    tmp_path, monkeypatch, capsys
):
    import train_lightning

    # The epochs take more than the test after them, so that a training counted twice shows.
    begin, starts = train_lightning.Lines.on_train_epoch_start, []

    def begin_slowly(self, *given):
        starts.append(time.perf_counter())
        begin(self, *given)
        time.sleep(0.5)

    monkeypatch.setattr(train_lightning.Lines, "on_train_epoch_start", begin_slowly)
    monkeypatch.setattr(train_lightning, "SILENCE", 0.0)  # so that each step tells
    data = fashion_mnist(tmp_path / "data", train=201, test=101)
    flags = f"--config={ROOT / 'examples' / 'lightning.yaml'}"
    flags += f" --data.root={data} --data.dataset=fashion-mnist --data.validation=21"
    flags += (
        f" --trainer.max_epochs=3 --trainer.accelerator=cpu --trainer.default_root_dir={tmp_path}"
    )
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr(sys, "argv", ["train_lightning.py", "fit", *flags.split()])
    train_lightning.main()
    passed = time.perf_counter() - starts[0]
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert first == "epoch 1 begins: 2 steps"
    epochs = [line for line in lines if "loss" in line]
    told = [line for line in lines if "loss" not in line]
    assert [line.rpartition(" after ")[0] for line in told] == [
        f"epoch {epoch}: {step} of 2 steps" for epoch in (1, 2, 3) for step in (1, 2)
    ]
    form = r"epoch (\d)/3 \| train loss \S+ \| train accuracy \S+ \| val loss \S+ \| .* \d\.\d s"
    assert [re.fullmatch(form, line)[1] for line in epochs] == ["1", "2", "3"]
    (seconds,) = re.findall(r"\| (\d+\.\d) s \|", last)
    # What begins before the first epoch takes milliseconds, and the seconds are rounded.
    assert 1.4 <= float(seconds) <= passed + 0.2


def test_a_missing_package_is_one_line(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'lightning' else find(name, *more)\n"
    )
    script = str(ROOT / "examples" / "train_lightning.py")
    code, out, err = run("env", f"PYTHONPATH={tmp_path}:{ROOT}", sys.executable, script, "fit")
    assert (code, out) == (1, "")
    assert err == (
        "train_lightning.py needs lightning; pip install 'torchpar[examples,lightning]'\n"
    )
