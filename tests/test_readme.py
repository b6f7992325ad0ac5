"""What the README says is true: its commands are run, its pictures exist, and no command is missing from it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from dendsam_deploy.cli.main import program

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
SETUP = r"python3 -m venv \.venv && \.venv/bin/pip install (-e )?\S+ && "
"""What the two set-up commands do first. The tests run in an environment that was made that way, so it is left out."""

SHORTER = {
    "benchmark": "--quick",
    "phantom": "--shape 6,256,256",
    "finetune detector": "--minutes 0.3",
    "finetune sam": "--minutes 0.3",
    "rounds": "--minutes 0.2 --rounds 1 --detector trial/detector.pt",
}
"""What is added to commands that would take long: a smaller volume, and trainings that only have to run."""


LEAST_DEMO_PQ, MOST_DEMO_OCE = 0.80, 0.15
"""What the packaged weights are for: the scores per slice of the demonstration, on a phantom not used in training."""


def blocks(language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def shell_lines() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines()]


def setup_lines() -> list[str]:
    return [line for line in shell_lines() if line.startswith("python3 -m venv")]


def leaves(group: click.Group = program, path: str = "") -> list[str]:
    return [
        name
        for word, member in group.commands.items()
        for name in (leaves(member, f"{path}{word} ") if isinstance(member, click.Group) else [f"{path}{word}"])
    ]


def run_shell(line: str, folder: Path) -> str:
    """Run a line in a folder, with this environment's programs first, and return what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    return done.stdout


def test_two_commands_do_their_whole_setup() -> None:
    demo, tests = setup_lines()
    assert re.fullmatch(SETUP + r"\.venv/bin/dendsam-deploy demo", demo)
    assert re.fullmatch(SETUP + r"\.venv/bin/pytest", tests)
    assert "'.[train]'" in demo
    assert "'.[train,openvino,test]'" in tests


def test_the_continuous_integration_runs_the_test_command() -> None:
    extract = re.search(r"install=\$\((sed .*? README\.md)\)", (REPOSITORY / ".ci" / "run").read_text())
    found = subprocess.run(extract[1], shell=True, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert setup_lines()[1].startswith(found.strip())
    assert found.strip().endswith("'.[train,openvino,test]'")


@pytest.mark.slow
def test_the_demo_command(tmp_path) -> None:
    line = re.sub(f"^{SETUP}", "", setup_lines()[0]).removeprefix(".venv/bin/")
    out = run_shell(line, tmp_path)
    pq, oce = map(float, re.search(r"^per slice +PQ ([\d.]+), OCE ([\d.]+)", out, flags=re.MULTILINE).groups())
    assert pq >= LEAST_DEMO_PQ
    assert oce <= MOST_DEMO_OCE
    for name in (
        "raw.tif",
        "labels.tif",
        "bundle/parity.json",
        "result/labels.tif",
        "result/report.html",
        "scores.html",
    ):
        assert (tmp_path / "demo" / name).is_file()


@pytest.mark.slow
def test_the_common_tasks_one_after_the_other(tmp_path) -> None:
    for line in shell_lines():
        if line in setup_lines():
            continue
        command = next(name for name in leaves() if line.startswith(f"dendsam-deploy {name}"))
        run_shell(f"{line} {SHORTER.get(command, '')}", tmp_path)
    for block in blocks("python"):
        (tmp_path / "example.py").write_text(block)
        assert run_shell("python example.py", tmp_path)
    for path in re.findall(r"`(trial/[^`]+)`", README):
        assert (tmp_path / path).exists()


@pytest.mark.parametrize("name", leaves())
def test_every_command_is_in_the_readme(name) -> None:
    assert re.search(rf"dendsam-deploy {name}\b", README)


def test_every_picture_exists_and_is_small() -> None:
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert pictures
    for picture in pictures:
        assert (REPOSITORY / picture).stat().st_size < 300_000


def test_every_path_of_the_repository_exists() -> None:
    for path in re.findall(r"`((?:benchmarks|dendsam_deploy|docs|tests)/[^`]+)`", README):
        assert (REPOSITORY / path).exists(), path
