"""The peak of a while: what was allocated and freed in it counts, what came before does not."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from dendsam_deploy.evaluate import process_memory
from dendsam_deploy.evaluate.process_memory import PeakMemory

MB = 200

# In a process of its own: what other tests left to be freed would otherwise count too.
SEEN_AND_FORGOTTEN = f"""
import json
import numpy as np
from dendsam_deploy.evaluate.process_memory import PeakMemory

memory = PeakMemory()
before = memory.peak_mb()
assert np.ones({MB} * 125_000).sum() > 0  # 8 bytes each
peak = memory.peak_mb()
memory.restart()
print(json.dumps([before, peak, memory.peak_mb()]))
"""


@pytest.mark.skipif(not process_memory._reset(), reason="this system cannot set its mark back")
def test_a_peak_is_seen_and_forgotten() -> None:
    told = subprocess.run([sys.executable, "-c", SEEN_AND_FORGOTTEN], capture_output=True, text=True, check=True)
    before, peak, after = json.loads(told.stdout)
    assert peak > before + 0.7 * MB
    assert after < peak - 0.7 * MB


def test_without_that_only_a_new_record_is_known(monkeypatch) -> None:
    records = iter([500.0, 500.0, 700.0])
    monkeypatch.setattr(process_memory, "_reset", lambda: False)
    monkeypatch.setattr(process_memory, "_peak_since_start_mb", lambda: next(records))
    memory = PeakMemory()
    assert memory.peak_mb() is None, "an earlier peak hides this one"
    assert memory.peak_mb() == 700


def test_the_mark_of_the_whole_process_is_in_megabytes() -> None:
    peak = process_memory._peak_since_start_mb()
    assert peak is None or 10 < peak < 1e6
