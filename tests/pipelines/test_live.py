"""The view of a run: what it says, that it is there on a terminal only, and that it leaves the terminal as it was."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import termios
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pipelines.runs.generate import generate
from pipelines.runs.progress_view import RunView, Tail, live_view, watch
from pipelines.store.run_folder import RunFolder
from tests.pipelines import processes
from tests.pipelines.films import prepared_film

SEGMENTS = [{"index": i, "take": 0, "shot": i // 2, "num_code_frames": 4 * (i + 1)} for i in range(5)]
HIDE, SHOW = b"\x1b[?25l", b"\x1b[?25h"


def make_run(path: Path) -> RunFolder:
    """A run of five segments whose codes are there up to the fourth; two are committed, ten seconds apart."""
    folder = RunFolder(path)
    folder.start({"plan": {"segments": SEGMENTS}})
    folder.append_codes(0, 0, torch.zeros(1, 10, 2, 3, dtype=torch.int64))
    folder.append_codes(0, 10, torch.zeros(1, 6, 2, 3, dtype=torch.int64))
    events = [{"time": 100.0, "event": "start", "executor": "local", "segments": 0}]
    for index, at in ((0, 110.0), (1, 120.0)):
        for role, seconds in (("code", 0.5), ("refine", 6.0), ("decode", 2.0), ("write", 0.25)):
            events.append({"time": at, "event": "step", "segment": index, "role": role, "seconds": seconds})
        drift = {"colour": 1.25 * index, "contrast": -2.5 if index else 0.0}
        events.append({"time": at, "event": "commit", "segment": index, "look": {}, "drift": drift})
    events.append({"time": 120.0, "event": "queue", "refine": 0, "decode": 1, "write": 0})
    (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def shown(view: RunView, now_s: float = 125.0) -> list[list[str]]:
    console = Console(record=True, width=90, file=io.StringIO())
    console.print(view.render(now_s))
    return [line.split() for line in console.export_text().splitlines()]


def test_view_tells_roles_queues_time_left_and_drift(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    lines = shown(RunView(tmp_path / "run"))
    assert lines[0][0] == "segments"
    assert lines[0][2:] == ["2/5", "0:25,", "about", "0:30", "left"]  # three more at ten seconds each
    assert lines[1] == ["role", "queue", "done", "s/segment", "busy"]
    rows = {line[0]: line[1:] for line in lines[2:7]}
    assert rows["code"] == ["1", "2", "0.50", "4", "%"]  # the codes of one segment are to be written
    assert rows["refine"] == ["1", "2", "6.00", "48", "%"]
    assert rows["decode"] == ["1", "2", "2.00", "16", "%"]
    assert rows["write"] == ["0", "2", "0.25", "2", "%"]
    assert lines[7:] == [
        ["segment", "shot", "colour", "contrast"],
        ["1", "1", "0.0", "+0.0"],
        ["2", "1", "1.2", "-2.5"],
    ]


def test_view_starts_again_with_the_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    view = RunView(folder.path)
    view.poll()
    folder.log("start", executor="ray", segments=2)
    lines = shown(view, time.time())
    assert lines[0][2] == "2/5"
    assert "left" not in lines[0]  # no pace yet
    assert {line[2] for line in lines[2:7]} == {"0", "-"}


def test_view_of_nothing_and_of_damage_is_harmless(tmp_path: Path) -> None:
    assert "0/0" in shown(RunView(tmp_path / "none"))[0]
    folder = make_run(tmp_path / "run")
    folder.log("commit", segment="?")
    assert "cannot be read" in " ".join(shown(RunView(folder.path))[0])


def test_tail_leaves_torn_lines_and_follows_a_replaced_log(tmp_path: Path) -> None:
    path = tmp_path / "log"
    tail = Tail(path)
    assert list(tail.lines()) == []
    path.write_text('{"a": 1}\n{"a": 2')
    assert [line["a"] for line in tail.lines()] == [1]
    path.write_text('{"a": 1}\n{"a": 2}\nnonsense\n')
    assert [line["a"] for line in tail.lines()] == [2]
    path.write_text('{"a": 3}\n')
    assert [line["a"] for line in tail.lines()] == [3]


def test_watch_prints_a_line_a_segment_where_there_is_no_terminal(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    out, left = io.StringIO(), [True, False]

    def sleep(_: float) -> None:
        folder.log("commit", segment=2, look={}, drift={"colour": 3.0, "contrast": 1.0})

    watch(folder.path, Console(file=out, width=90), is_running=lambda: left.pop(0), sleep=sleep)
    assert out.getvalue() == "segment 3/5  colour 3.0  contrast +1.0\n"


def test_terminal_is_as_it_was_after_an_interruption(tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=90)
    with pytest.raises(KeyboardInterrupt), live_view(tmp_path, console):
        raise KeyboardInterrupt
    assert out.getvalue().index(HIDE.decode()) < out.getvalue().rindex(SHOW.decode())


def test_numbers_of_a_real_run(tiny_model: Path, tmp_path: Path) -> None:
    film = generate(prepared_film(tiny_model, tmp_path / "film.mp4"))
    lines = shown(RunView(film.run_dir), time.time())
    assert lines[0][2] == "3/3"
    assert {line[0]: line[1] for line in lines[2:7]} == dict.fromkeys(
        ("text", "code", "refine", "decode", "write"), "0"
    )
    assert [line[:2] for line in lines[8:]] == [["1", "1"], ["2", "2"], ["3", "3"]]


class Terminal:
    """A command whose stderr is a terminal and whose stdout is a file."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.ours, self.theirs = pty.openpty()
        self.before = termios.tcgetattr(self.theirs)
        self.stdout = folder / "stdout"
        self.process = processes.start(
            processes.command,
            *([str(argument) for argument in arguments], os.ttyname(self.theirs), str(self.stdout)),
            environment={"TERM": "xterm", "COLUMNS": "90"},
        )
        self.shown = b""

    def read(self, until: bytes = b"", timeout_s: float = 120.0) -> None:
        """Read until something is shown, or the command ends."""
        end_s = time.monotonic() + timeout_s
        while time.monotonic() < end_s:
            if select.select([self.ours], [], [], 0.1)[0]:
                self.shown += os.read(self.ours, 65536)
            elif self.process.exitcode is not None:
                return
            if until and until in self.shown:
                return
        raise AssertionError(f"not shown in time: {until!r}, but {self.shown!r}")


@pytest.mark.slow
def test_on_a_terminal_there_is_a_view_and_stdout_is_clean(tiny_model: Path, tmp_path: Path) -> None:
    arguments = ("generate", "--prompt", "a red circle", "--duration", "85f", "--model", tiny_model, "--threads", "1")
    terminal = Terminal(tmp_path, *arguments, "--seed", "7", "--output", tmp_path / "film.mp4", "--json")
    terminal.read()
    assert json.loads(terminal.stdout.read_text())["num_frames"] == 85
    assert HIDE in terminal.shown
    assert terminal.shown.rindex(SHOW) > terminal.shown.rindex(HIDE)
    text = terminal.shown.decode(errors="replace")
    assert "2/2" in text
    assert "refine" in text
    assert "segment 1/2 " not in text  # the lines of the plain way
    assert termios.tcgetattr(terminal.theirs) == terminal.before


@pytest.mark.slow
def test_ctrl_c_gives_the_terminal_back(tiny_model: Path, tmp_path: Path) -> None:
    prompts = [part for _ in range(40) for part in ("--prompt", "a red circle")]
    arguments = ("generate", *prompts, "--duration", "51f", "--model", tiny_model, "--threads", "1", "--seed", "7")
    terminal = Terminal(tmp_path, *arguments, "--output", tmp_path / "film.mp4")
    terminal.read(until=b"colour")  # a segment is committed
    assert terminal.process.pid is not None
    os.kill(terminal.process.pid, signal.SIGINT)
    terminal.read()
    assert terminal.process.exitcode == 130
    assert terminal.shown.rindex(SHOW) > terminal.shown.rindex(HIDE)
    assert b"go on with: arlon resume" in terminal.shown
    assert termios.tcgetattr(terminal.theirs) == terminal.before


@pytest.mark.slow
def test_quiet_says_nothing_and_prints_the_film(tiny_model: Path, tmp_path: Path) -> None:
    arguments = ("generate", "--prompt", "a red circle", "--duration", "51f", "--model", tiny_model, "--threads", "1")
    terminal = Terminal(tmp_path, *arguments, "--output", tmp_path / "film.mp4", "--quiet")
    terminal.read()
    assert terminal.stdout.read_text().strip() == str(tmp_path / "film.mp4")
    assert terminal.shown == b""
