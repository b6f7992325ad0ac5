"""The program ``dendsam-deploy``: the only place where errors become text and exit codes."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from typing import TYPE_CHECKING, NoReturn

import click

from dendsam_deploy import __version__
from dendsam_deploy.cli.benchmark import benchmark
from dendsam_deploy.cli.compare import compare
from dendsam_deploy.cli.console import Console
from dendsam_deploy.cli.demo import demo
from dendsam_deploy.cli.doctor import doctor
from dendsam_deploy.cli.evaluate import evaluate
from dendsam_deploy.cli.export import export
from dendsam_deploy.cli.finetune_detector import finetune_detector
from dendsam_deploy.cli.finetune_sam import finetune_sam
from dendsam_deploy.cli.info import info
from dendsam_deploy.cli.phantom import phantom
from dendsam_deploy.cli.pseudo_label import pseudo_label
from dendsam_deploy.cli.rounds import rounds
from dendsam_deploy.cli.segment import segment
from dendsam_deploy.cli.verify import verify
from dendsam_deploy.errors import (
    DendsamError,
    IncompleteRunError,
    InputFileError,
    InvalidArgumentError,
    MissingCapabilityError,
    ParityError,
    StorageError,
    UnsafeFileError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_CODES: tuple[tuple[type[DendsamError], int], ...] = (
    (ParityError, 1),
    (InvalidArgumentError, 2),
    (MissingCapabilityError, 3),
    (InputFileError, 4),
    (StorageError, 74),
    (IncompleteRunError, 75),
    (UnsafeFileError, 77),
)
"""Exit code of each branch of `errors`. A check that failed exits with 1, wrong usage with 2."""

_STORAGE, _INTERRUPTED = 74, 75


class _InOrder(click.Group):
    """A group whose commands are listed in the order in which they were added, which is that of the work."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands."""
        return list(self.commands)


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="dendsam-deploy")
def program() -> None:
    """Segment dendrites in volume electron microscopy: fine-tune, export, verify, segment, evaluate."""


@click.group("finetune", cls=_InOrder)
def finetune() -> None:
    """Train SAM or the detector on labelled slices."""


for member in (finetune_sam, finetune_detector):
    finetune.add_command(member)
for member in (
    demo,
    doctor,
    phantom,
    info,
    finetune,
    export,
    verify,
    benchmark,
    segment,
    pseudo_label,
    rounds,
    evaluate,
    compare,
):
    program.add_command(member)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Parameters
    ----------
    arguments : sequence of str, optional
        Words of the command line; by default those that the process was started with.

    Returns
    -------
    int
        Exit code.
    """
    console = Console()
    console.set_verbosity(0)
    signal.signal(signal.SIGTERM, _stop)
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        # Not `program.main`, which has its own ideas of exit codes for an interruption and a closed pipe.
        with program.make_context("dendsam-deploy", words, obj=console) as context:
            program.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.message, file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # Whoever read the result has gone. Python flushes stdout once more at exit, which must find something open.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _INTERRUPTED
    except (DendsamError, click.ClickException, KeyboardInterrupt, MemoryError, OSError) as error:
        if console.verbosity > 1:
            traceback.print_exception(error)
        message, code = explain(error)
        print(f"dendsam-deploy: error: {' '.join(message.split())}", file=sys.stderr)
        return code
    return 0


def explain(error: BaseException) -> tuple[str, int]:
    """Return what to tell the user about an error, and the exit code."""
    match error:
        case DendsamError():
            return str(error), next(code for kind, code in EXIT_CODES if isinstance(error, kind))
        case click.UsageError():
            hint = f"; see `{error.ctx.command_path} -h`" if error.ctx else ""
            return error.format_message().rstrip(".") + hint, error.exit_code
        case click.ClickException():
            return error.format_message(), error.exit_code
        case OSError():  # whatever nobody was prepared for
            return (
                f"{error.filename or 'a file'}: {error.strerror or error}; check the path and its permissions",
                _STORAGE,
            )
        case MemoryError():
            return "out of memory; free some and run the same command again", _INTERRUPTED
        case _:
            return "interrupted; run the same command again to go on", _INTERRUPTED


def _stop(signum: int, frame: object) -> NoReturn:
    """Treat a polite request to end like Ctrl-C."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
