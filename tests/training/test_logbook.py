"""The course of a training on disk: whole at any time, struck out behind the point that a run goes on from."""

from __future__ import annotations

import json
import math

import pytest

from dendsam_deploy.errors import CheckpointError, StorageError
from dendsam_deploy.training.logbook import Logbook, logbook_folder, read_history


def test_rows_come_back_as_they_were(tmp_path):
    folder = logbook_folder(tmp_path / "sam.pt")
    assert folder == tmp_path / "sam.training"
    with Logbook(folder, {"seed": 3, "out": tmp_path}, "step") as book:
        book.add({"step": 0, "held_out_iou": 0.5})
        assert len(read_history(folder / "history.csv")) == 1
        book.add({"step": 10, "loss": 1 / 3, "held_out_iou": math.nan})
    first, second = read_history(folder / "history.csv")
    assert (first["step"], first["held_out_iou"]) == (0, 0.5)
    assert math.isnan(first["loss"])
    assert second["loss"] == pytest.approx(1 / 3, rel=1e-8)
    assert math.isnan(second["held_out_iou"])
    assert (folder / "history.csv").read_text().splitlines()[0] == "step,held_out_iou,loss"
    assert json.loads((folder / "config.json").read_text()) == {"seed": 3, "out": str(tmp_path)}


def test_going_on_strikes_out_what_came_later(tmp_path):
    with Logbook(tmp_path, {}, "epoch") as book:
        for epoch in range(5):
            book.add({"epoch": epoch, "loss": float(epoch)})
    with Logbook(tmp_path, {}, "epoch", resume_at=2) as book:
        assert [row["epoch"] for row in book.rows] == [0, 1, 2]
        book.add({"epoch": 3, "loss": 7.0})
    assert [row["loss"] for row in read_history(tmp_path / "history.csv")] == [0, 1, 2, 7]
    with Logbook(tmp_path, {}, "epoch") as book:
        assert book.rows == ()


def test_events_can_be_read_by_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415 - optional

    with Logbook(tmp_path, {}, "step") as book:
        book.add({"step": 4, "loss": 2.0, "held_out_iou": math.nan})
        book.add({"step": 8, "loss": 1.0, "held_out_iou": 0.25})
    with Logbook(tmp_path, {}, "step", resume_at=4) as book:
        book.add({"step": 6, "loss": 1.5})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(entry.step, entry.value) for entry in events.Scalars("loss")] == [(4, 2.0), (6, 1.5)]
    with Logbook(tmp_path, {}, "step") as book:
        book.add({"step": 5, "loss": 9.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(entry.step, entry.value) for entry in events.Scalars("loss")] == [(5, 9.0)]


@pytest.mark.parametrize("text", ["epoch,loss\n1,heavy\n", "epoch,loss\n1,2,3\n", "epoch,loss\n1\n"])
def test_a_damaged_table_is_refused(tmp_path, text):
    (tmp_path / "history.csv").write_text(text)
    with pytest.raises(CheckpointError, match="start anew with --no-resume"):
        Logbook(tmp_path, {}, "epoch", resume_at=3)


def test_a_file_in_the_way_is_a_storage_error(tmp_path):
    (tmp_path / "sam.training").touch()
    with pytest.raises(StorageError, match=r"sam\.training"):
        Logbook(tmp_path / "sam.training", {}, "step")
