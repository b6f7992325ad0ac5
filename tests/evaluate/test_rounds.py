"""Roles of slices, records of rounds, and rounds from files to the best checkpoint."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile

from dendsam_deploy.errors import IncompleteRunError, InputFileError, InvalidArgumentError, VolumeError
from dendsam_deploy.evaluate.mask_choice import MaskCriteria
from dendsam_deploy.evaluate.rounds_options import RoundsOptions, plan_roles
from dendsam_deploy.evaluate.rounds_record import RoundRecord, RoundsResult, rounds_without_gain
from dendsam_deploy.report.rounds_report import render_rounds_report
from dendsam_deploy.training.sam_options import SamTrainingOptions
from dendsam_deploy.volume.array import ArrayVolume

DEPTH = 20


def labels_of(*labelled: int, depth: int = DEPTH) -> ArrayVolume:
    stack = np.zeros((depth, 8, 8), np.uint16)
    stack[list(labelled), 2:5, 2:5] = 7
    return ArrayVolume(stack)


def roles(labels: ArrayVolume, **wishes):
    return plan_roles(labels, RoundsOptions(Path("out"), **wishes))


class TestRoles:
    def test_few_labelled_slices_are_divided_and_the_rest_is_unlabelled(self) -> None:
        found = roles(labels_of(0, 1, 2, 3, 16, 17, 18, 19), gap=2)
        assert found.held_out == (19,)
        assert found.labelled == (0, 1, 2, 3, 16)
        assert found.unlabelled == tuple(range(4, 16))

    def test_named_ranges_are_taken(self) -> None:
        found = roles(
            labels_of(*range(DEPTH)), labelled_slices=(0, 3), held_out_slices=(15, 20), calibration_slices=(4, 6), gap=1
        )
        assert (found.labelled, found.held_out, found.calibration) == ((0, 1, 2), tuple(range(15, 20)), (4, 5))
        assert found.unlabelled == (3, *range(6, 14))
        assert found.looked_at() == (3, 14)

    @pytest.mark.parametrize(
        ("wishes", "complaint"),
        [
            ({"labelled_slices": (10, 14), "held_out_slices": (15, 20)}, "lie within 2 of the held-out slices 15:20"),
            ({"held_out_slices": (15, 25)}, "do not lie in a volume of 20 slices"),
            ({"labelled_slices": (0, 4), "unlabelled_slices": (3, 9)}, "slices 3:4 are both labelled and unlabelled"),
            ({"calibration_slices": (6, 8), "unlabelled_slices": (5, 9)}, "both"),
            ({"unlabelled_slices": (10, 17)}, "lie within 2"),
        ],
    )
    def test_roles_that_meet_are_refused(self, wishes, complaint) -> None:
        with pytest.raises(InvalidArgumentError, match=complaint):
            roles(labels_of(*range(DEPTH)), **{"labelled_slices": (0, 3), "held_out_slices": (15, 20)} | wishes)

    def test_nothing_left_is_refused(self) -> None:
        with pytest.raises(InvalidArgumentError, match="no slice is left for the role unlabelled"):
            roles(labels_of(*range(DEPTH)))
        with pytest.raises(InvalidArgumentError, match="no slice is left for the role labelled"):
            roles(labels_of(4, 5))
        with pytest.raises(VolumeError, match="no slice shows an object"):
            roles(labels_of())
        with pytest.raises(InvalidArgumentError, match="show no labelled object"):
            roles(labels_of(0, 1, 2), labelled_slices=(0, 2), held_out_slices=(10, 12))

    def test_membrane_is_no_object(self) -> None:
        with pytest.raises(VolumeError, match="no slice shows an object"):
            roles(labels_of(1, 2, 3), background_labels=(7,))


@pytest.mark.parametrize(
    "wishes",
    [
        {"rounds": 0},
        {"patience": 0},
        {"gap": -1},
        {"wanted_precision": 0.0},
        {"pseudo_weight": 0.0},
        {"least_gain": -1.0},
    ],
)
def test_senseless_options_are_refused(wishes) -> None:
    with pytest.raises(InvalidArgumentError, match="expected"):
        RoundsOptions(Path("out"), **wishes)


def record(number: int, iou: tuple[float, ...]) -> RoundRecord:
    return RoundRecord(
        number, f"round-{number}/sam.pt", f"round-{number}/bundle", iou, iou, 40 * number, 30 * number, 0.93, 100, 60.0
    )


def result(*records: RoundRecord, reason: str = "done") -> RoundsResult:
    return RoundsResult(Path("out"), records, {"labelled": "0:3"}, reason, 3, "f" * 64, ("a notice",))


class TestVerdict:
    def test_a_gain_in_every_slice(self) -> None:
        found = result(record(0, (0.6, 0.7, 0.65)), record(1, (0.66, 0.75, 0.71)), record(2, (0.65, 0.75, 0.7)))
        assert (found.best.number, found.improved) == (1, True)
        assert found.gain[0] == pytest.approx(0.17 / 3)
        assert "Round 1 is the best" in found.verdict()
        assert "chance" not in found.verdict()

    def test_a_gain_that_may_be_chance(self) -> None:
        found = result(record(0, (0.6, 0.7, 0.65)), record(1, (0.8, 0.6, 0.64)))
        assert (found.best.number, found.improved) == (1, False)
        assert "which may be chance" in found.verdict()

    def test_no_gain_is_said_plainly(self) -> None:
        found = result(record(0, (0.6, 0.7)), record(1, (0.6, 0.7)), record(2, (0.5, 0.6)))
        assert (found.best.number, found.improved) == (0, False)
        assert found.verdict().startswith("The rounds did not improve the model")
        page = render_rounds_report(found)
        assert "The rounds did not improve the model" in page
        assert "+0.0000 (+0.0000 to +0.0000)" in page
        assert "A notice." in page
        document = found.to_document()
        assert (document["best_round"], document["improved"]) == (0, False)
        assert [row["held_out_box_iou"] for row in document["rounds"]] == pytest.approx([0.65, 0.65, 0.55])

    def test_no_round_at_all(self) -> None:
        found = result(record(0, (0.6,)), reason="in round 1 no mask was good enough to teach")
        assert found.verdict() == "No round with pseudo-labels was made: in round 1 no mask was good enough to teach."
        render_rounds_report(found)


@pytest.mark.parametrize(
    ("scores", "stalled"),
    [
        ([0.6], 0),
        ([0.6, 0.6], 1),
        ([0.6, 0.605], 1),
        ([0.6, 0.61], 0),
        ([0.6, 0.65, 0.64, 0.655], 2),
        ([0.6, 0.65, 0.64, 0.66], 0),
        ([0.6, 0.605, 0.61], 2),
    ],
)
def test_rounds_stall_when_the_best_one_is_not_beaten_by_enough(scores, stalled) -> None:
    assert rounds_without_gain(scores, 0.01) == stalled


def test_records_belong_to_their_settings(tmp_path) -> None:
    made = record(1, (0.5, 0.6))
    made.write(tmp_path, "a")
    assert RoundRecord.read(tmp_path, "a") == made
    assert RoundRecord.read(tmp_path, "b") is None
    assert RoundRecord.read(tmp_path / "none", "a") is None
    (tmp_path / "round.json").write_text("{")
    with pytest.raises(InputFileError, match="is damaged"):
        RoundRecord.read(tmp_path, "a")


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """Twelve slices of bright discs, all labelled."""
    folder = tmp_path_factory.mktemp("stack")
    y, x = np.mgrid[:64, :80]
    labels = np.zeros((12, 64, 80), np.uint16)
    for label, (cy, cx) in enumerate([(16, 20), (40, 30), (30, 62)], start=1):
        for z in range(12):
            labels[z][(y - cy - z / 2) ** 2 + (x - cx) ** 2 < 81] = label
    noise = np.random.default_rng(0).normal(0, 6, labels.shape)
    raw = np.clip(np.where(labels > 0, 170, 60) + noise, 0, 255).astype(np.uint8)
    for name, array in (("raw", raw), ("labels", labels)):
        tifffile.imwrite(folder / f"{name}.tif", array, imagej=True, metadata={"axes": "ZYX"})
    return folder


SCHEDULE = SamTrainingOptions(
    minutes=None, steps=2, judge_steps=2, tiles_per_step=1, objects_per_tile=2, judge_slices=1
)


@pytest.mark.slow
def test_rounds_from_files_to_the_best_checkpoint(stack, exported, tmp_path, monkeypatch) -> None:
    from dendsam_deploy.evaluate import rounds  # noqa: PLC0415 - loads torch
    from dendsam_deploy.models.weights import load_sam  # noqa: PLC0415 - as above
    from dendsam_deploy.volume.pseudo_record import PseudoRecord  # noqa: PLC0415 - as above

    options = RoundsOptions(
        tmp_path / "out", rounds=1, labelled_slices=(0, 2), held_out_slices=(9, 12), start=exported.sam,
        criteria=MaskCriteria(0, 0, 0, 0), schedule=SCHEDULE, detector=exported.detector, least_gain=0.0,
    )  # fmt: skip
    calls: list[str] = []
    original = rounds.export_bundle

    def counted(wishes, **others):
        calls.append(wishes.name)
        if len(calls) == 2:  # round 1 is trained, but not exported
            raise KeyboardInterrupt
        return original(wishes, **others)

    monkeypatch.setattr(rounds, "export_bundle", counted)
    arguments = (stack / "raw.tif", stack / "labels.tif")
    with pytest.raises(IncompleteRunError, match="run the same command again to go on"):
        rounds.run_rounds(*arguments, options)
    assert (tmp_path / "out" / "round-0" / "round.json").is_file()
    trained = (tmp_path / "out" / "round-1" / "sam.pt").read_bytes()
    made = rounds.run_rounds(*arguments, options)
    # What was finished was not done again: round 0, and the training of round 1.
    assert calls == ["round-0", "round-1", "round-1"]
    assert (tmp_path / "out" / "round-1" / "sam.pt").read_bytes() == trained
    assert [entry.number for entry in made.records] == [0, 1]
    assert len(made.records[0].box_iou) == 3
    assert made.records[1].kept > 0

    _, pseudo = PseudoRecord.read(tmp_path / "out" / "round-1" / "pseudo")
    taught = set(pseudo.kept_masks)
    assert taught
    assert taught <= set(range(2, 7))  # neither labelled, nor held out, nor within the gap of 2
    assert (tmp_path / "out" / "round-1" / "pseudo" / "review.html").is_file()
    best = load_sam(tmp_path / "out" / "best.pt").record.summary
    assert best["held_out_slices"] == [9, 12]
    document = json.loads((tmp_path / "out" / "rounds.json").read_bytes())
    assert Path(document["best_checkpoint"]).read_bytes() == (tmp_path / "out" / "best.pt").read_bytes()
    with (tmp_path / "out" / "rounds.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["held_out_box_iou"]) for row in rows] == pytest.approx(
        [entry["held_out_box_iou"] for entry in document["rounds"]], abs=1e-4
    )
    with pytest.raises(InvalidArgumentError, match=re.escape("gap: 2 -> 1")):
        rounds.run_rounds(*arguments, replace(options, gap=1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(InvalidArgumentError, match="holds no rounds"):
        rounds.run_rounds(*arguments, replace(options, out=tmp_path / "mine"))
