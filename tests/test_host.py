"""Facts about a machine: those that decide a time, and nothing by which to find it."""

from __future__ import annotations

import json
import platform
import socket

import pytest

from dendsam_deploy import host
from dendsam_deploy.host import differences, examine_host, gpu_memory_in_use_mb, gpu_name


def test_facts_are_plain_values_without_names_of_places() -> None:
    document = examine_host().to_document()
    text = json.dumps(document)
    assert json.loads(text) == document
    assert socket.gethostname() not in text
    assert "/" not in text
    assert document["cpu_cores"] >= 1
    assert document["processor"]
    assert document["architecture"] == platform.machine()
    assert document["packages"]["numpy"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cpu_cores": 64}, "cpu_cores"),
        ({"processor": "other"}, "processor"),
        ({"instructions": ["avx512f"]}, "instructions"),
        ({"gpus": ["NVIDIA X"]}, "gpus"),
    ],
)
def test_what_makes_times_incomparable(change, words) -> None:
    here = examine_host().to_document()
    assert differences(here, here) == []
    (found,) = differences(here, here | change)
    assert words in found


def test_what_changes_from_day_to_day_does_not_matter() -> None:
    here = examine_host().to_document()
    assert differences(here, here | {"load_average": 9.0, "python": "3.99", "packages": {}, "memory_gib": None}) == []


def test_a_virtual_machine_without_a_model_name_still_has_a_processor(monkeypatch) -> None:
    monkeypatch.setattr(host, "_cpu_info", lambda: {"cpu family": "25", "model": "1"})
    assert examine_host().processor == "unnamed (family 25, model 1)"
    monkeypatch.setattr(host, "_cpu_info", dict)
    assert examine_host().processor


@pytest.mark.parametrize(
    ("index", "visible", "physical"),
    [(1, None, 1), (0, "3", 3), (1, "2, 5", 5), (2, "2,5", None), (0, "GPU-8f1c", None), (0, "", None)],
)
def test_gpus_are_counted_as_this_process_sees_them(index, visible, physical) -> None:
    assert host._physical_index(index, visible) == physical


def test_a_gpu_that_is_not_there_has_no_memory() -> None:
    assert gpu_memory_in_use_mb(99) is None
    assert gpu_name(99) is None


def test_a_gpu_is_named_as_the_process_counts_it(monkeypatch):
    monkeypatch.setattr(host, "_nvidia_gpus", lambda: (("small", "large"), "580"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [gpu_name(index) for index in range(3)] == ["small", "large", None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [gpu_name(index) for index in range(2)] == ["large", None]
