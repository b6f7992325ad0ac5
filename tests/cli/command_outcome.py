"""What a command did, and programs in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What a call of the program did."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """What ``--json -`` printed."""
        document: dict[str, Any] = json.loads(self.out)
        return document

    @property
    def message(self) -> str:
        """The single line of an error."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("dendsam-deploy: error: ")
        assert "Traceback" not in self.err
        return lines[0].removeprefix("dendsam-deploy: error: ")


def run_python(program: str, *words: object) -> Outcome:
    """Run a Python program in a fresh process, where nothing is imported yet."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return Outcome(done.returncode, done.stdout, done.stderr)
