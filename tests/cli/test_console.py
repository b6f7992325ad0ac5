"""Results go to stdout, everything else to stderr; progress is a bar on a terminal and rare lines elsewhere."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from dendsam_deploy.cli.console import Console, PlainLines, format_duration
from dendsam_deploy.errors import StorageError
from dendsam_deploy.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_plain_progress_is_one_line_every_30_s() -> None:
    stream, clock = io.StringIO(), Clock()
    lines = PlainLines(stream, clock)
    for done in range(91):  # one unit a second, 90 in all
        lines(Progress("segment", done, 90, "slice"))
        clock.now_s += 1
    assert stream.getvalue().splitlines() == [
        "segment: 33%, 1:00 left  slice",
        "segment: 67%, 0:30 left  slice",
        "segment: 100%  slice",
    ]


def test_time_left_is_that_of_the_present_stage() -> None:
    stream, clock = io.StringIO(), Clock()
    lines = PlainLines(stream, clock)
    lines(Progress("segment", 0, 10))
    clock.now_s += 1000
    lines(Progress("link", 0, 10))
    clock.now_s += 40
    lines(Progress("link", 5, 10))
    assert stream.getvalue().splitlines()[-1] == "link: 50%, 0:40 left"


def test_a_terminal_gets_a_bar_that_ends_with_its_line(monkeypatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "70")
    with Console().progress() as progress:
        progress(Progress("segment", 0, 2))
        progress(Progress("segment", 2, 2, "note " * 40))
        progress(Progress("link", 1, 2))
    drawn = terminal.getvalue()
    assert drawn.count("\n") == 2  # one for each stage
    assert drawn.endswith("\n")
    assert "100%" in drawn
    assert max(len(line.replace("\x1b[K", "")) for line in drawn.replace("\r", "\n").splitlines()) < 70


def test_progress_of_unknown_length_is_shown_too(monkeypatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with Console().progress() as progress:
        progress(Progress("scan", 3, 0))
    assert "0%" in terminal.getvalue()


def test_quiet_shows_neither_progress_nor_notes(capsys) -> None:
    console = Console(verbosity=-1)
    with console.progress() as progress:
        progress(Progress("segment", 1, 1))
    console.note("a remark")
    console.result("the result", {})
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("the result\n", "")


def test_json_in_place_of_text(capsys) -> None:
    Console().result("text", {"value": 1}, Path("-"))
    assert json.loads(capsys.readouterr().out) == {"value": 1}


def test_json_beside_the_text(capsys, tmp_path) -> None:
    Console().result("text", {"value": 1}, tmp_path / "result.json")
    assert capsys.readouterr().out == "text\n"
    assert json.loads((tmp_path / "result.json").read_text()) == {"value": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_json_that_cannot_be_written(tmp_path) -> None:
    with pytest.raises(StorageError, match=r"nowhere/result\.json: cannot be written"):
        Console().result("text", {}, tmp_path / "nowhere" / "result.json")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (80, "1:20"), (3599, "59:59"), (4000, "1:06:40")]
)
def test_durations(seconds, text) -> None:
    assert format_duration(seconds) == text
