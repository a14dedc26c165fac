# SPDX-License-Identifier: MIT
"""The page that plays recorded steps, and its command; in Chromium where there is one."""

import gzip
import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT
from made_recordings import both, box, fault, hostile, pipeline, tiny
from pages import Page, check_in, chromium

from torchpar.errors import ConfigError
from torchpar.training.profile import replay_command, replay_page

MADE: dict[str, Callable[[], list[Mapping[str, Any]]]] = {
    "two ranks": lambda: [pipeline(2, 4, "1f1b", steps=3)],
    "nested": lambda: [pipeline(4, 4, "1f1b", layers=3)],
    "both": lambda: [*both()],
    "hostile": lambda: [hostile()],
    "fault": lambda: [fault()],
    "a mark alone": lambda: [tiny({"ph": "i", "ts": 3.0})],
}
TEMPLATE = Path(replay_page.__file__).with_suffix(".html").read_text("utf-8")
SCRIPT = TEMPLATE.split("<script>\n")[1].split("</script>")[0]


def data_of(text: str) -> dict[str, Any]:
    """The data that the script of a page reads."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(found)


@pytest.mark.parametrize("name", MADE)
def test_a_page_is_whole(name, tmp_path):
    path = tmp_path / "page.html"
    replay_page.write(path, MADE[name]())
    text = path.read_text("utf-8")
    # The parser takes no input element for one that is never closed.
    parsed = tmp_path / "parsed.html"
    parsed.write_text(re.sub(r"(<input [^>]*)>", r"\1/>", text), "utf-8")
    page = Page(parsed)
    assert page.addresses == []
    data = data_of(text)
    figures = re.findall(r'<figure class="step".*?</figure>', text, re.S)
    assert len(figures) == len(data["steps"])
    for figure, step in zip(figures, data["steps"], strict=True):
        assert figure.count("<b class=") == len(step["events"])
        assert figure.count('<div class="head">') == 2 * len(step["lanes"])  # beside the name, too


def test_a_page_shows_the_numbers_of_the_recording(tmp_path):
    path = tmp_path / "page.html"
    recording = pipeline(2, 4)
    text = replay_page.page([recording])
    path.write_text(re.sub(r"(<input [^>]*)>", r"\1/>", text), "utf-8")
    facts = recording["otherData"]
    (table,) = facts["tables"]
    assert Page(path).tables[-1] == [table["columns"], *table["rows"]]
    for line in (facts["command"], *facts["remarks"], *facts["about"]):
        assert line.replace("'", "&#x27;") in text
    data = data_of(text)
    (step,) = data["steps"]
    events = [e for e in recording["traceEvents"] if e["ph"] == "X"]
    shown = sorted((e[0], data["texts"][e[2]], e[3], e[4]) for e in step["events"])
    assert shown == sorted((e["pid"], e["name"], e["ts"], e["dur"]) for e in events)
    # What is held at the end is what changes say.
    sizes = dict.fromkeys(data["series"], 0)
    for _, *changes in step["memory"][0]:
        for n, size in zip(changes[::2], changes[1::2], strict=True):
            sizes[data["series"][n]] = size
    memory = [e for e in recording["traceEvents"] if e["ph"] == "C" and e["pid"] == 0]
    assert sizes == memory[-1]["args"]
    assert data["most"] == max(
        sum(e["args"].values()) for e in recording["traceEvents"] if e["ph"] == "C"
    )


def test_boxes_lie_where_they_were_recorded():
    text = replay_page.page([tiny(box("a", "b", 0, 25.0, 50.0), steps=[[0, 200]])])
    assert '<b class="k0" style="left:12.5%;width:25%">b</b>' in text


def test_each_step_has_its_boxes_and_the_memory_that_it_begins_with():
    def memory(ts: float, size: int) -> dict[str, Any]:
        return {"ph": "C", "name": "memory", "pid": 0, "ts": ts, "args": {"weights": size}}

    recording = tiny(
        *(box("a", f"{ts}", 0, ts, dur) for ts, dur in ((0, 10), (10, 5), (15, 10), (30, 0))),
        *(memory(ts, size) for ts, size in ((0, 7), (5, 9), (25, 4))),
        steps=[[0, 10], [10, 20], [20, 30]],
    )
    data = data_of(replay_page.page([recording]))
    names = [[data["texts"][e[2]] for e in step["events"]] for step in data["steps"]]
    assert names == [["0"], ["10", "15"], ["15", "30"]]
    assert [step["memory"][0] for step in data["steps"]] == [
        [[0, 0, 7], [5, 0, 9]],
        [[0, 0, 9]],
        [[0, 0, 9], [5, 0, 4]],
    ]


def lines_of(*boxes: tuple[str, float, float]) -> list[list[tuple[str, int]]]:
    """The names and the depths in each line of a row."""
    made = [
        replay_page._Box(0, 0, kind, f"{begin:g}-{end:g}", begin, end - begin, {}, False)
        for kind, begin, end in boxes
    ]
    found = replay_page._without_overlap(made)
    return [[(one.name, depth) for one, depth in line] for line in found]


def test_boxes_of_a_line_are_apart_or_nested():
    assert lines_of(("a", 0, 9), ("a", 0, 4), ("a", 4, 9), ("a", 5, 6)) == [
        [("0-9", 0), ("0-4", 1), ("4-9", 1), ("5-6", 2)]
    ]
    assert lines_of(("a", 0, 5), ("a", 3, 8), ("a", 8, 9)) == [
        [("0-5", 0), ("8-9", 0)],
        [("3-8", 0)],
    ]
    # Of messages that are under way together none lies in another.
    assert lines_of(("message", 0, 9), ("message", 3, 5)) == [[("0-9", 0)], [("3-5", 0)]]
    # Times that were rounded overlap by nothing.
    assert len(lines_of(("a", 0, 5.1), ("a", 5, 9))) == 1


@pytest.mark.parametrize(
    "length, unit, lines, last",
    [
        (10_000, "ms", 6, "10"),
        (7120, "ms", 8, "7"),
        (3.5, "µs", 4, "3"),
        (12, "cycles", 7, "12"),
        (3, "cycles", 4, "3"),
        (1e6, "cycles", 6, "1,000,000"),
    ],
)
def test_the_axis_has_lines_at_round_times(length, unit, lines, last):
    found = [one for one in replay_page._ticks(length, unit) if 'class="t0"' in one]
    assert len(found) == lines
    assert found[-1].endswith(f">{last}</i>")
    assert len([*replay_page._ticks(length, unit)]) <= replay_page.FINEST + 1


def test_texts_of_a_recording_stay_texts():
    text = replay_page.page([hostile()])
    assert text.count("<script") == 2  # the data, and the script of the page
    assert "alert(1)</script>" not in text
    assert "url(" not in text
    assert "javascript:" not in data_of(text)["texts"]
    assert not any(one.startswith("javascript") for one in data_of(text)["texts"])
    assert (
        "</script><script>alert(1)</script> & <b>{{data}}</b> $& 𝛁 勾配" in data_of(text)["texts"]
    )


def test_a_page_of_eight_ranks_and_three_steps_is_small():
    recording = pipeline(8, 8, "1f1b", steps=3, layers=8)
    boxes = sum(event["ph"] == "X" for event in recording["traceEvents"])
    assert boxes > 3600
    assert len(replay_page.page([recording]).encode()) < 700_000


def test_the_script_is_short_enough_to_be_read():
    assert SCRIPT.count("\n") <= 400


def test_the_script_has_no_error_of_syntax(tmp_path):
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no Node.js, which checks the script's syntax")
    path = tmp_path / "script.js"
    for text, is_right in ((SCRIPT, True), (SCRIPT.replace("function play() {", "play {"), False)):
        path.write_text(text, "utf-8")
        done = subprocess.run([node, "--check", path], capture_output=True)
        assert (done.returncode == 0) == is_right, done.stderr.decode()


WRONG = [
    ([], "there are 0 recordings, expected one or two"),
    ([{"traceEvents": []}], "it is no recording"),
    ([[1]], "it is no recording"),
    ([{"traceEvents": [], "otherData": {"replay": 2}}], "format is 2, expected 1"),
    ([tiny()], "has no boxes"),
    ([tiny({"ph": "X", "ts": "1", "dur": 2})], "event 0 of the recording has ts 1, expected"),
    ([tiny({"ph": "X", "ts": 1, "dur": None})], "has dur None, expected a number"),
    ([tiny({"ph": "X", "ts": 1, "dur": 1, "pid": "a"})], "has pid a, expected an integer"),
    ([tiny({"ph": "X", "ts": 1, "dur": 1, "args": [1]})], "is no object of JSON"),
    ([tiny(box("a", "b", 0, 0, 1), steps=[1])], r"steps are \[1\], expected pairs"),
    ([pipeline(), fault()], "one recording is in ms and the other in cycles"),
]


@pytest.mark.parametrize("recordings, said", WRONG)
def test_what_is_no_recording_is_refused(recordings, said):
    with pytest.raises(ValueError, match=said):
        replay_page.page(recordings)


# The command


def test_the_command_writes_a_page_of_two_recordings(tmp_path, capsys):
    a, b, page = tmp_path / "a.json", tmp_path / "b.json.gz", tmp_path / "page.html"
    a.write_text(json.dumps(both()[0]), "utf-8")
    b.write_bytes(gzip.compress(json.dumps(both()[1]).encode()))
    assert replay_command.main([str(a), str(b), "--page", str(page)]) == 0
    assert capsys.readouterr().out == f"{page} plays {a} beside {b}\n"
    assert page.read_text("utf-8") == replay_page.page(both())
    assert replay_command.main([str(b), "--page", str(page)]) == 0
    assert page.read_text("utf-8") == replay_page.page(both()[1:])


@pytest.mark.parametrize(
    "content, said",
    [
        (None, r"cannot read .*a.json: No such file or directory; name a recording"),
        (b"{", r"a.json is no JSON, expected a recording: [^;]*$"),
        (b"\x1f\x8b\x08", r"a.json: "),
        (b"[]", r"a.json: it is no recording: expected a trace"),
        (b"\xff", r"a.json: "),
    ],
)
def test_the_command_says_in_a_line_what_is_wrong(content, said, tmp_path, capsys):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    assert replay_command.main([str(path), "--page", str(tmp_path / "page.html")]) == 2
    err = capsys.readouterr().err
    assert re.match(rf"python -m torchpar replay: error: .*{said}", err)
    assert err.count("\n") == 1


def test_the_command_names_the_recording_beside_a_page(tmp_path, capsys):
    page = tmp_path / "step.html"
    page.write_text(replay_page.page(both()), "utf-8")
    (tmp_path / "step.json").write_text(json.dumps(both()[0]), "utf-8")
    assert replay_command.main([str(page), "--page", str(tmp_path / "other.html")]) == 2
    assert capsys.readouterr().err.endswith(f"; name {tmp_path / 'step.json'}\n")


def test_a_page_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"page.html cannot be written \(No such file or directory\); .* by --page$",
    ):
        replay_command.write_page(tmp_path / "none" / "page.html", both())
    with pytest.raises(ConfigError, match="make a page of each"):
        replay_command.write_page(tmp_path / "page.html", [pipeline(), fault()])


def test_the_command_needs_no_pytorch(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(pipeline()), "utf-8")
    code = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = ["torchpar", "replay", "a.json", "--page", "a.html"]
runpy.run_module("torchpar", run_name="__main__")
"""
    path = {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "a.html").read_text("utf-8") == replay_page.page([pipeline()])


def test_the_package_has_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["torchpar", "replay", "none.json", "--page", "a.html"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("torchpar", run_name="__main__")
    assert capsys.readouterr().err.count("\n") == 1


# In Chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@contextmanager
def opened(browser: Any, folder: Path, name: str, **options: Any) -> Iterator[Any]:
    """A page of `MADE` in a tab, whose errors are the test's."""
    path = folder / "page.html"
    replay_page.write(path, MADE[name]())
    errors: list[str] = []
    with browser.new_page(**options) as tab:
        tab.set_default_timeout(0)
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(path.as_uri())
        yield tab
        assert errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["two ranks", "both", "hostile"])
def test_a_page_is_legible_on_a_phone(name, scheme, browser, tmp_path):
    check_in(browser, replay_page.page(MADE[name]()), tmp_path, scheme)


def test_it_plays_to_the_end_and_pauses(browser, tmp_path):
    with opened(browser, tmp_path, "two ranks") as tab:
        tab.select_option("#speed", "5")
        tab.click("#play")
        tab.wait_for_function("time > 0")
        assert tab.text_content("#play") == "❚❚ Pause"
        tab.keyboard.press("Space")  # on the button
        assert tab.text_content("#play") == "▶ Play"
        before = tab.evaluate("time")
        tab.evaluate("moveTo(0.99 * step.length)")
        tab.locator("h1").click()
        tab.keyboard.press("Space")  # on the page
        tab.wait_for_function("time === step.length && !frame")
        assert before < tab.evaluate("time")
        assert tab.text_content("#clock") == "7.120 ms of 7.120 ms"


def test_less_motion_rests_at_each_event(browser, tmp_path):
    with opened(browser, tmp_path, "two ranks", reduced_motion="reduce") as tab:
        tab.evaluate(
            "window.seen = []; const old = moveTo; moveTo = (t) => { old(t); seen.push(time); }"
        )
        tab.select_option("#speed", "5")
        tab.click("#play")
        tab.wait_for_function("seen.length > 60")
        begins = "step.events.some((event) => event.begin === t) || t === step.length || t === 0"
        assert tab.evaluate(f"seen.every((t) => {begins})")


def test_arrow_keys_choose_events_in_their_order(browser, tmp_path):
    with opened(browser, tmp_path, "two ranks") as tab:
        tab.focus("figure:not([hidden]) b[tabindex]")
        seen = []
        for _ in range(5):
            tab.keyboard.press("ArrowRight")
            seen.append(tab.evaluate("[chosen.name, chosen.lane, time]"))
        assert seen == [
            ["forward 0", 0, 0],
            ["wait", 1, 0],
            ["forward 1", 0, 400],
            ["send 0", 0, 400],
            ["recv 0", 1, 400],
        ]
        assert tab.evaluate("document.activeElement === chosen.node")
        label = tab.evaluate("document.activeElement.getAttribute('aria-label')")
        assert label == "recv 0, rank 1, 0.080 ms"
        tab.keyboard.press("ArrowLeft")
        assert tab.evaluate("chosen.name") == "send 0"
        tab.keyboard.press("ArrowDown")
        assert tab.evaluate("chosen.lane") == 1
        tab.keyboard.press("ArrowUp")
        assert tab.evaluate("chosen.lane") == 0
        tab.keyboard.press("End")
        assert tab.evaluate("chosen === step.inOrder.at(-1)")
        tab.keyboard.press("Escape")
        assert tab.evaluate("chosen") is None


def test_a_wait_is_explained_and_its_message_drawn(browser, tmp_path):
    with opened(browser, tmp_path, "nested") as tab:
        wait = tab.locator(".row b:text-is('wait')").nth(1)
        wait.click()
        said = tab.inner_text("#chosen")
        assert "waiting on rank 0: begins at 5.280 ms, lasts 0.400 ms, 4.0% of the step" in said
        assert "Rank 0 waits for the gradient of micro-batch 1, which rank 1 sends." in said
        assert "from rank 1 to rank 0" in said
        assert tab.locator("#arrows line.strong").count() == 1
        assert tab.locator(".peer").count() == 2  # its two ends
        # From the sender's beginning to the end of what arrives.
        message = "step.events.filter((event) => event.id === chosen.id && event.role)"
        ends = tab.evaluate(f"{message}.map((event) => [event.role, event.begin, event.end])")
        places = {role: (begin, end) for role, begin, end in ends}
        line = tab.locator("#arrows line.strong")
        length = tab.evaluate("step.length")
        drawn = [float(line.get_attribute(name).rstrip("%")) for name in ("x1", "x2")]
        assert drawn == pytest.approx(
            [100 * places["send"][0] / length, 100 * places["recv"][1] / length]
        )
        tab.keyboard.press("Escape")
        assert tab.locator("#arrows .strong").count() == 0


def test_a_message_of_all_connects_all_ranks(browser, tmp_path):
    with opened(browser, tmp_path, "nested") as tab:
        tab.locator(".row b:text-is('all_reduce')").first.click()
        assert tab.locator("#arrows line.strong").count() == 3
        assert "all_reduce, gradients, 400,000 bytes" in tab.inner_text("#chosen")
        said = tab.inner_text("#chosen")
        assert "between rank 0, rank 1, rank 2, rank 3; rank 0 begins last" in said


def test_what_is_under_way_has_an_arrow_and_what_runs_stands_out(browser, tmp_path):
    with opened(browser, tmp_path, "two ranks") as tab:
        tab.evaluate("moveTo(430)")
        assert tab.locator("#arrows line:not(.halo)").count() == 1
        assert tab.locator("#arrows circle").count() == 1  # the tensor on its way
        on = tab.locator("figure:not([hidden]) .on").all_text_contents()
        assert sorted(on) == ["forward 1", "recv 0", "send 0", "wait"]
        assert tab.locator("#now li").all_inner_texts() == [
            "650 kB\nrank 0: forward 1 · ⇄ send 0",
            "400 kB\nrank 1: wait · ⇄ recv 0",
        ]
        assert (
            tab.locator("#bytes tr").nth(1).inner_text()
            == "rank 0\t400 kB\t0 bytes\t250 kB\t650 kB"
        )


def test_a_click_between_boxes_moves_the_cursor(browser, tmp_path):
    with opened(browser, tmp_path, "two ranks") as tab:
        bounds = tab.locator("figure:not([hidden]) .track").bounding_box()
        tab.mouse.click(bounds["x"] + bounds["width"] / 2, bounds["y"] + 5)
        assert tab.evaluate("time / step.length") == pytest.approx(0.5, abs=0.01)
        tab.fill("#slider", "250")
        assert tab.evaluate("time / step.length") == pytest.approx(0.25)


def test_zoomed_lanes_scroll_in_their_own_box(browser, tmp_path):
    with opened(browser, tmp_path, "both", viewport={"width": 360, "height": 780}) as tab:
        for _ in range(4):
            tab.click("#in")
        assert tab.evaluate("document.documentElement.scrollWidth") == 360
        assert tab.evaluate("step.track.offsetWidth / step.scroll.clientWidth") > 15
        tab.evaluate("choose(step.inOrder.at(-1))")
        assert tab.evaluate("step.scroll.scrollLeft") > 1000
        left = tab.evaluate("chosen.node.getBoundingClientRect().left")
        assert 0 <= left < 360


def test_lanes_that_are_not_zoomed_stay_where_they_are(browser, tmp_path):
    with opened(browser, tmp_path, "nested") as tab:
        tab.evaluate("choose(step.inOrder.at(-1))")
        assert tab.evaluate("[step.scroll.scrollLeft, step.track.scrollLeft]") == [0, 0]


def test_another_step_is_shown(browser, tmp_path):
    with opened(browser, tmp_path, "two ranks") as tab:
        assert tab.locator("figure:visible").count() == 1
        tab.select_option("#step", "2")
        assert tab.locator("figure:visible").count() == 1
        assert tab.evaluate("step.figure === figures[2] && step.figure.contains($('cursor'))")
        assert tab.evaluate("step.events.length") == tab.locator("figure:visible .row b").count()


def test_two_recordings_have_one_cursor_and_one_axis(browser, tmp_path):
    with opened(browser, tmp_path, "both") as tab:
        assert tab.locator("#cursor").count() == tab.locator(".track .axis").count() == 1
        assert tab.locator(".names .part").all_text_contents() == [
            "train_pipeline.py, gpipe",
            "train_pipeline.py, 1f1b",
        ]
        tab.evaluate("moveTo(2700)")
        assert tab.locator("#now li").count() == 2 + 8


def test_two_marks_of_a_fault_are_connected(browser, tmp_path):
    with opened(browser, tmp_path, "fault") as tab:
        tab.locator(".mark").first.click()
        assert tab.locator("#arrows line.strong").count() == 1
        assert "fault on program 0: at 0 cycles" in tab.inner_text("#chosen")
        tab.keyboard.press("End")
        assert "fault on program 1, warp 0: at 60 cycles" in tab.inner_text("#chosen")
        assert "program 1: warp 0 ld.global" in tab.inner_text("#now")
        assert not tab.locator("#live").is_visible()  # no memory was recorded


def test_without_javascript_it_shows_the_first_step(browser, tmp_path):
    with opened(browser, tmp_path, "two ranks", java_script_enabled=False) as tab:
        assert tab.locator("figure:visible").count() == 1
        assert tab.locator("figure:visible b:visible").count() > 20
        assert tab.locator("figure:visible .memory path:visible").count() > 4
        assert tab.locator(".remark:visible").count() == 1
        assert tab.locator("table:visible").count() == 1
        assert tab.locator("button:visible, select:visible, input:visible").count() == 0
