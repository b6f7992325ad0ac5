"""Errors become one line on stderr and the exit code of the contract."""

from __future__ import annotations

import inspect
import signal
import subprocess
import sys

import click
import pytest
from command_outcome import run_python

from dendsam_deploy import errors
from dendsam_deploy.cli import main as program_module
from dendsam_deploy.cli.console import CheckFailedError
from dendsam_deploy.cli.main import explain, program

EXPECTED_CODES = {
    errors.ParityError: 1,
    CheckFailedError: 1,
    errors.InvalidArgumentError: 2,
    errors.MissingCapabilityError: 3,
    errors.InputFileError: 4,
    errors.VolumeError: 4,
    errors.CheckpointError: 4,
    errors.BundleError: 4,
    errors.StorageError: 74,
    errors.IncompleteRunError: 75,
    errors.UnsafeFileError: 77,
    KeyboardInterrupt: 75,
    MemoryError: 75,
}


def raising(error: BaseException) -> click.Command:
    def callback() -> None:
        raise error

    return click.Command("fail", callback=callback)


@pytest.fixture
def fail(run, monkeypatch):
    def call(error: BaseException, *words: str):
        monkeypatch.setitem(program.commands, "fail", raising(error))
        return run("fail", *words)

    return call


@pytest.mark.parametrize(("kind", "code"), EXPECTED_CODES.items())
def test_each_error_has_its_exit_code_and_one_line(fail, kind, code) -> None:
    outcome = fail(kind("volume.tif: is empty,\n expected an image"))
    assert outcome.code == code
    assert outcome.out == ""
    assert outcome.message


def test_every_error_of_the_library_has_a_code() -> None:
    kinds = {kind for _, kind in inspect.getmembers(errors, inspect.isclass)} - {errors.DendsamError}
    assert kinds <= EXPECTED_CODES.keys()
    assert all(explain(kind("x"))[1] == EXPECTED_CODES[kind] for kind in kinds)


def test_a_message_of_several_lines_becomes_one(fail) -> None:
    assert fail(errors.VolumeError("a.tif: bad\n  page 3")).message == "a.tif: bad page 3"


def test_bugs_are_not_hidden(run, monkeypatch) -> None:
    monkeypatch.setitem(program.commands, "fail", raising(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        run("fail")


def test_twice_verbose_shows_the_traceback(run, monkeypatch) -> None:
    def callback() -> None:
        raise errors.VolumeError("a.tif: bad") from OSError("cause")

    made = program_module.program.commands["doctor"]
    monkeypatch.setattr(made, "callback", callback)
    monkeypatch.setattr(made, "params", [p for p in made.params if p.name == "verbose"])
    quiet, verbose = run("doctor"), run("doctor", "-vv")
    assert "Traceback" not in quiet.err
    assert "OSError: cause" in verbose.err
    assert verbose.err.splitlines()[-1] == "dendsam-deploy: error: a.tif: bad"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["doctor", "--nonsense"], "No such option"),
        (["evaluate", "only-one.tif"], "Missing argument 'TRUTH'"),
        (["export", "-o", "x"], "Missing option '--sam'"),
        (["finetune", "sam", "a", "b"], "Missing option '-o' / '--out'"),
        (["finetune", "sam", "a", "b", "-o", "c", "--minutes", "0"], "'--minutes'"),
        (["segment", "a", "--slices", "5"], "'5' is no range of slices, expected A:B"),
        (["segment", "a", "--slices", "5:5"], "'5:5' names no slice"),
        (["segment", "a", "--voxel-size", "40,15"], "expected three lengths in nm"),
        (["segment", "a", "--voxel-size", "40,15,-1"], "lengths are positive"),
        (["segment", "a", "--engine", "abacus"], "'abacus' is not one of"),
        (["phantom", "out", "--shape", "4,64"], "expected three numbers"),
        (["phantom", "out", "--shape", "4,8,8"], "too small"),
        (["evaluate", "a", "b", "--min", "pq"], "expected KEY=VALUE"),
        (["evaluate", "a", "b", "--min", "volume.quality=1"], "there is no score 'volume.quality'"),
        (["evaluate", "a", "b", "--max", "slices.vi_split=1"], "there is no score 'slices.vi_split'"),
    ],
)
def test_wrong_usage_exits_with_2(run, words, part) -> None:
    outcome = run(*words)
    assert outcome.code == 2
    assert part in outcome.message


def test_without_words_the_help_is_shown_as_wrong_usage(run) -> None:
    outcome = run()
    assert (outcome.code, outcome.out) == (2, "")
    assert "Commands:" in outcome.err


def test_a_reader_that_goes_away_is_no_crash() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "dendsam_deploy", "phantom", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.close()
        error = process.stderr.read()
    assert error == ""
    assert process.returncode == 75


def test_sigterm_interrupts() -> None:
    program_text = """
import sys, time
from dendsam_deploy.cli.main import main, program
@program.command("wait")
def wait():
    print("ready", flush=True)
    time.sleep(600)
sys.exit(main(["wait"]))
"""
    with subprocess.Popen(
        [sys.executable, "-c", program_text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        error = process.stderr.read()
    assert process.returncode == 75
    assert error == "dendsam-deploy: error: interrupted; run the same command again to go on\n"


def test_python_m_runs_the_program() -> None:
    run_module = (
        "import runpy, sys; sys.argv[1:] = ['--version']; runpy.run_module('dendsam_deploy', run_name='__main__')"
    )
    outcome = run_python(run_module)
    assert outcome.code == 0
    assert outcome.out.startswith("dendsam-deploy, version ")
