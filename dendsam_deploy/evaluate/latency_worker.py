"""A bench in a process of its own: engines do not meet, and what a process needs is what its combination needs.

Both sides speak JSON, one line a message: ``{"do": ..., ...}`` one way, the answer or ``{"error": class, "message":
text}`` the other, before which any number of lines ``{"progress": ...}`` may come while an engine is prepared. A worker
waits for its next order without using the processor, so that several can hold their graphs loaded while they take
turns.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import dendsam_deploy
from dendsam_deploy import errors
from dendsam_deploy.errors import DendsamError, MissingCapabilityError
from dendsam_deploy.evaluate.latency_bench import Bench, BenchSetup, Case, Sample, open_bench
from dendsam_deploy.evaluate.matrix_peak import engine_peak, numpy_peak
from dendsam_deploy.progress import Progress, ProgressCallback, no_progress

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_GRACE_S = 5.0
_QUOTED_CHARACTERS = 300


class Worker:
    """The side that gives the orders; a context manager that ends the process when it is left.

    Parameters
    ----------
    setup : BenchSetup
        What the process puts on its bench.
    listen : callable
        Told about slow preparations of its engine, such as compiling.

    Attributes
    ----------
    load_ms : float
        From the start of the process until the graphs were loaded.
    graphs : dict
        Precision of each graph, by role.
    is_proven : bool
        Whether `verify` has passed this combination.
    encoder_batches : list of int
        Tiles that one call of the encoder should hold.
    """

    load_ms: float
    graphs: dict[str, str]
    is_proven: bool
    encoder_batches: list[int]

    def __init__(self, setup: BenchSetup, listen: ProgressCallback = no_progress) -> None:
        self.setup, self._listen = setup, listen
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed in __exit__
        self.started = time.perf_counter()
        self._process: subprocess.Popen[str] = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=_environment(setup.threads),
        )

    def take(self, case: Case, index: int) -> Sample:
        """Take a sample there.

        Raises
        ------
        DendsamError
            What the bench raised, or `MissingCapabilityError` where the process died.
        """
        return Sample(**self._ask("take", case=asdict(case), index=index))

    def engine_peak(self) -> float | None:
        """Measure the rate of the engine's matrix products, operations per second."""
        peak: float | None = self._ask("engine_peak")["flop_per_second"]
        return peak

    def numpy_peak(self) -> float:
        """Measure the rate of numpy's matrix products on the same threads, operations per second."""
        peak: float = self._ask("numpy_peak")["flop_per_second"]
        return peak

    def flop(self, case: Case) -> tuple[float | None, float | None]:
        """Count the operations of a call of a graph; see `Bench.flop`."""
        useful, reference = self._ask("flop", case=asdict(case))["flop"]
        return useful, reference

    def _ask(self, order: str, **details: object) -> dict[str, Any]:
        """Send one order and wait for its answer."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": order, **details}) + "\n")
            self._process.stdin.flush()
        while "progress" in (answer := self._next_message()):
            self._listen(Progress(**answer["progress"]))
        if "error" in answer:
            kind = getattr(errors, answer["error"], DendsamError)
            raise kind(answer["message"])
        return answer

    def _next_message(self) -> dict[str, Any]:
        """Return what the process says next."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise MissingCapabilityError(self._obituary())
        message: dict[str, Any] = json.loads(line)
        return message

    def _obituary(self) -> str:
        """Say how the process ended."""
        code = self._process.wait()
        self._log.seek(0)
        last_words = " ".join(self._log.read().decode(errors="replace").split())[-_QUOTED_CHARACTERS:]
        how = f"signal {-code}, perhaps for lack of memory" if code < 0 else f"exit code {code}"
        return f"{self.setup.combination}: its process died ({how}){': ' if last_words else ''}{last_words}"

    def __enter__(self) -> Self:
        try:
            opened = self._ask("open", setup=asdict(self.setup))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self.load_ms = (time.perf_counter() - self.started) * 1000
        self.graphs, self.is_proven = opened["graphs"], opened["is_proven"]
        self.encoder_batches = opened["encoder_batches"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):
                stream.close()  # the worker's next read finds the end, and it leaves
        try:
            self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def serve(orders: IO[str], answers: IO[str]) -> None:
    """Carry out orders until there are no more: the side that does the work.

    Parameters
    ----------
    orders, answers : text stream
        One message a line.
    """
    bench: Bench | None = None
    turn = threading.Lock()  # engines that compile tell of it from threads of their own

    def say(message: dict[str, Any]) -> None:
        with turn:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

    try:
        for line in orders:
            order = json.loads(line)
            try:
                if order["do"] == "open":
                    setup = setup_from_document(order["setup"])
                    bench = open_bench(setup, lambda progress: say({"progress": asdict(progress)})).__enter__()
                assert bench is not None, "the first order opens the bench"
                answer = _carry_out(bench, order)
            except (DendsamError, MemoryError) as error:
                message = str(error) or "out of memory; free some or choose another engine"
                answer = {"error": _public_name(error), "message": message}
            say(answer)
    finally:
        if bench is not None:
            bench.__exit__(None, None, None)


def _public_name(error: DendsamError | MemoryError) -> str:
    """Return the name of the branch of `errors` that an error belongs to, of which it may be a class of its own."""
    names = (kind.__name__ for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind)
    return next(names, MissingCapabilityError.__name__)


def _carry_out(bench: Bench, order: dict[str, Any]) -> dict[str, Any]:
    """Answer one order."""
    if order["do"] == "open":
        proven = bench.session.is_proven
        return {"graphs": bench.graphs, "is_proven": proven, "encoder_batches": bench.encoder_batches}
    if order["do"] == "take":
        return asdict(bench.take(Case(**order["case"]), order["index"]))
    if order["do"] == "flop":
        return {"flop": bench.flop(Case(**order["case"]))}
    if order["do"] == "engine_peak":
        return {"flop_per_second": engine_peak(bench.setup.combination, bench.setup.threads)}
    return {"flop_per_second": numpy_peak()}


def setup_from_document(document: dict[str, Any]) -> BenchSetup:
    """Return a setup that came as JSON values, which know no tuples."""
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in document.items()
    }
    return BenchSetup(**values)


def _environment(threads: int | None) -> dict[str, str]:
    """Return the environment of a worker: it finds this package, and its libraries use no more threads than allowed."""
    root = str(Path(dendsam_deploy.__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    limits = {} if threads is None else dict.fromkeys(_THREAD_VARIABLES, str(threads))
    return {**os.environ, "PYTHONPATH": path, **limits}


def main() -> None:
    """Serve on the streams of this process; what libraries print goes to the log instead."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever gives the orders is interrupted and ends this process
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
