"""Pseudo-labels of a stack of discs: what is kept and why, what the files say, what an interruption leaves."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import roifile
import tifffile
from stack_runs import DEPTH, FixedBoxes, draw_stack, read_rows
from synthetic_session import decode_ellipses, make_session

from dendsam_deploy.errors import IncompleteRunError, InputFileError, InvalidArgumentError, VolumeError
from dendsam_deploy.evaluate.mask_table import MaskTable, separate_twins
from dendsam_deploy.evaluate.pseudo_files import MASK_COLUMNS
from dendsam_deploy.evaluate.pseudo_labels import pseudo_label_volume
from dendsam_deploy.evaluate.pseudo_options import PseudoLabelOptions
from dendsam_deploy.geometry import Window
from dendsam_deploy.instances import Instances, RunLengths
from dendsam_deploy.report.review_page import write_review_page
from dendsam_deploy.volume.open import open_labels, open_volume
from dendsam_deploy.volume.outlines import signed_area_px
from dendsam_deploy.volume.pseudo_record import PseudoRecord

EVERYTHING = {"least_score": 0.0, "least_predicted_iou": 0.0, "least_stability": 0.0, "least_agreement": 0.0}


def run(volume, out, session=None, **wishes):
    return pseudo_label_volume(volume, session or make_session(), PseudoLabelOptions(out, **wishes))


def write_truth(path, labels: np.ndarray):
    tifffile.imwrite(path, labels.astype(np.uint16), imagej=True, metadata={"axes": "ZYX"})
    return path


@pytest.fixture
def truth(tmp_path):
    """Labels of the discs: a bright pixel belongs to the object whose half of the slice it is in."""
    bright = draw_stack() > 40
    half = np.where(np.arange(bright.shape[1]) < 47, 1, 2)
    return write_truth(tmp_path / "truth.tif", bright * half[None, :, None])


class SometimesWrong:
    """A decoder whose masks of large boxes are much too small, and that knows it."""

    def __call__(self, inputs):
        outputs = decode_ellipses(inputs)
        large = inputs["boxes"][:, 2] - inputs["boxes"][:, 0] > 20
        outputs["logits"][large] -= 6.5
        outputs["iou"][:] = np.where(large, 0.6, 0.9)
        return outputs


def test_every_mask_has_a_row_that_can_be_recomputed(volume, tmp_path) -> None:
    result = run(volume, tmp_path / "out", **EVERYTHING)
    rows = read_rows(tmp_path / "out" / "masks.csv")
    labels = tifffile.imread(result.labels)
    assert labels.shape == draw_stack().shape
    assert (result.masks, result.kept) == (len(rows), len(rows))
    assert list(rows[0]) == list(MASK_COLUMNS)
    for row in rows:
        mask = labels[int(row["z"])] == int(row["id"])
        assert mask.sum() == int(row["area_px"])
        values = [float(row[name]) for name in ("score", "predicted_iou", "stability", "agreement")]
        assert float(row["margin"]) == pytest.approx(min(values), abs=1e-4)
        near = [row[name] for name in ("agreement_below", "agreement_above") if row[name]]
        assert row["agreement"] == max(near)
        assert (row["agreement_below"] == "") == (row["z"] == "0")
        assert (row["kept"], row["why_not"], row["truth_iou"]) == ("yes", "", "")
        assert re.fullmatch(r"[0-9a-f]{64}", row["bundle_sha256"])
        assert row["thresholds"] == "score >= 0, predicted_iou >= 0, stability >= 0, agreement >= 0"
    record = json.loads((tmp_path / "out" / "pseudo.json").read_bytes())
    assert sum(record["kept_masks"].values()) == len(rows)
    assert set(map(int, record["kept_masks"])) == {int(row["z"]) for row in rows}
    assert "unlabelled" in record["unlabelled"]


def test_what_misses_a_threshold_is_left_and_says_so(volume, tmp_path) -> None:
    wishes = {**EVERYTHING, "least_predicted_iou": 0.8}
    result = run(volume, tmp_path / "out", make_session(decoder=SometimesWrong()), **wishes)
    rows = read_rows(tmp_path / "out" / "masks.csv")
    labels = tifffile.imread(result.labels)
    left = [row for row in rows if row["kept"] == "no"]
    assert 0 < len(left) < len(rows)
    for row in left:
        assert row["why_not"] == f"predicted_iou {float(row['predicted_iou']):.2f} < 0.80"
        assert float(row["margin"]) < 0
        assert not (labels[int(row["z"])] == int(row["id"])).any()
    assert result.kept == len(rows) - len(left)
    assert {int(value) for value in np.unique(labels[labels > 0])} == {
        int(row["id"]) for row in rows if row["kept"] == "yes"
    }


def test_thresholds_reach_the_wanted_precision(volume, truth, tmp_path) -> None:
    session = make_session(decoder=SometimesWrong())
    result = run(volume, tmp_path / "out", session, truth=truth, precision=1.0, detection_score=0.2)
    rows = read_rows(tmp_path / "out" / "masks.csv")
    judged = [row for row in rows if row["truth_iou"]]
    right = [float(row["truth_iou"]) >= 0.5 for row in judged]
    assert 0 < sum(right) < len(right)
    assert result.choice is not None
    # Too few masks for a choice that counts: it is refused, and nothing pretends to be labels.
    assert sum(right) < 10
    assert not result.reached
    assert result.labels is None
    assert not (tmp_path / "out" / "pseudo.json").exists()
    assert {row["kept"] for row in rows} == {"no"}
    assert all(row["why_not"] for row in rows)


def test_precision_on_a_longer_stack(tmp_path) -> None:
    stack = np.concatenate([draw_stack()[:4]] * 5)
    volume, truth = tmp_path / "long.tif", tmp_path / "truth.tif"
    tifffile.imwrite(volume, stack, imagej=True, metadata={"axes": "ZYX"})
    half = np.where(np.arange(stack.shape[1]) < 47, 1, 2)
    write_truth(truth, (stack > 40) * half[None, :, None])
    session = make_session(decoder=SometimesWrong())
    result = run(volume, tmp_path / "out", session, truth=truth, precision=0.95)
    rows = read_rows(tmp_path / "out" / "masks.csv")
    assert result.reached
    kept = [row for row in rows if row["kept"] == "yes"]
    assert sum(float(row["truth_iou"]) >= 0.5 for row in kept) >= 0.95 * len(kept)
    assert len(kept) == sum(float(row["truth_iou"]) >= 0.5 for row in rows)  # none that is right is given away
    assert result.choice is not None
    assert result.choice.left_out is not None

    everything = run(volume, tmp_path / "all", session, truth=truth, precision=0.1, **EVERYTHING)
    assert everything.reached
    rows = read_rows(tmp_path / "all" / "masks.csv")
    wrong = [row for row in rows if float(row["truth_iou"]) < 0.5]
    assert len(wrong) == len(rows) - everything.kept > 0, "what is known to be wrong is not taught"
    assert {row["kept"] for row in wrong} == {"no"}
    assert all(row["why_not"].startswith("IoU 0.") for row in wrong)
    assert result.choice.left_out.precision >= 0.95
    labels, record = PseudoRecord.read(tmp_path / "out")
    assert labels == result.labels
    assert record.truth_slices == tuple(range(20))
    assert record.choice == result.choice.to_document()
    # Other thresholds choose among the same masks: no graph runs again.
    again = run(volume, tmp_path / "out", make_session(decoder=SometimesWrong(), encoder=refuse), **EVERYTHING)
    assert again.kept == again.masks == result.masks


def refuse(inputs):
    raise AssertionError("this graph must not run")


def test_only_labelled_slices_choose(volume, truth, tmp_path) -> None:
    labels = tifffile.imread(truth)
    labels[2:] = 0
    few = write_truth(tmp_path / "few.tif", labels)
    run(volume, tmp_path / "a", truth=few, precision=0.5)
    judged = {int(row["z"]) for row in read_rows(tmp_path / "a" / "masks.csv") if row["truth_iou"]}
    assert judged == {0, 1}
    run(volume, tmp_path / "b", truth=truth, truth_slices=(3, 5), precision=0.5)
    judged = {int(row["z"]) for row in read_rows(tmp_path / "b" / "masks.csv") if row["truth_iou"]}
    assert judged == {3, 4}


def test_truth_iou_is_that_of_painted_images(volume, truth, tmp_path) -> None:
    labels = tifffile.imread(truth)
    everything = run(volume, tmp_path / "out", **EVERYTHING)
    painted = tifffile.imread(everything.labels)
    again = run(volume, tmp_path / "out", truth=truth, precision=0.1)
    assert again.masks == everything.masks
    for row in read_rows(tmp_path / "out" / "masks.csv"):
        mask = painted[int(row["z"])] == int(row["id"])
        ious = [
            (mask & (labels[int(row["z"])] == n)).sum() / (mask | (labels[int(row["z"])] == n)).sum() for n in (1, 2)
        ]
        assert float(row["truth_iou"]) == pytest.approx(max(ious), abs=1e-4)


def test_sparse_truth_and_background_labels(volume, truth, tmp_path) -> None:
    labels = tifffile.imread(truth)
    options = {"truth": write_truth(tmp_path / "one.tif", np.where(labels == 1, 1, 0)), "precision": 0.1}
    run(volume, tmp_path / "dense", **options)
    run(volume, tmp_path / "sparse", sparse_truth=True, **options)
    dense, sparse = (read_rows(tmp_path / name / "masks.csv") for name in ("dense", "sparse"))
    assert [row for row in dense if row["truth_iou"] == "0.0000"]
    assert not [row for row in sparse if row["truth_iou"] == "0.0000"]
    run(volume, tmp_path / "void", truth=truth, background_labels=(2,), precision=0.1)
    assert [row["truth_iou"] for row in read_rows(tmp_path / "void" / "masks.csv")] == [
        row["truth_iou"] for row in dense
    ]


def test_the_review_list_begins_with_the_worst(volume, tmp_path) -> None:
    wishes = {**EVERYTHING, "least_predicted_iou": 0.8}
    result = run(volume, tmp_path / "out", make_session(decoder=SometimesWrong()), **wishes)
    rows = read_rows(tmp_path / "out" / "review.csv")
    assert [int(row["rank"]) for row in rows] == list(range(1, result.masks + 1))
    words = [row["kept"] for row in rows]
    assert words == sorted(words, reverse=True)  # yes before no
    assert 0 < result.kept < result.masks
    margins = [float(row["margin"]) for row in rows]
    assert margins[: result.kept] == sorted(margins[: result.kept])
    assert margins[result.kept :] == sorted(margins[result.kept :], reverse=True)
    rois = roifile.roiread(tmp_path / "out" / "review-rois.zip")
    assert [roi.name.split("-")[0] for roi in rois] == [f"{rank:04d}" for rank in range(1, result.masks + 1)]
    for roi, row in zip(rois, rows, strict=True):
        area = sum(signed_area_px(np.asarray(part)) for part in roi.coordinates(multi=True))
        assert (area, roi.position) == (int(row["area_px"]), int(row["z"]) + 1)


def test_the_page_shows_what_the_list_says(volume, truth, tmp_path) -> None:
    result = run(volume, tmp_path / "out", make_session(decoder=SometimesWrong()), truth=truth, precision=1.0)
    with open_volume(volume) as raw:
        page = write_review_page(result, raw).read_text()
    assert "was not reached, and no labels were written" in page
    assert page.count('<figure class="card">') == result.masks
    kept = run(volume, tmp_path / "kept", **EVERYTHING)
    with open_volume(volume) as raw:
        page = write_review_page(kept, raw).read_text()
    assert "precision of the kept masks is not known" in page
    assert page.index("Kept, worst first") < page.index("Not kept")
    assert "http" not in re.sub(r"http://www\.w3\.org/[^\"']*", "", page)


def test_interrupted_and_run_again_equals_undisturbed(volume, tmp_path) -> None:
    undisturbed = run(volume, tmp_path / "a", **EVERYTHING)
    calls = iter(range(5))

    def mutiny(inputs):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return decode_ellipses(inputs)

    with pytest.raises(IncompleteRunError, match="run the same command again"):
        run(volume, tmp_path / "b", make_session(decoder=mutiny), **EVERYTHING)
    with pytest.raises(InputFileError, match=r"pseudo\.json is missing"):
        PseudoRecord.read(tmp_path / "b")
    resumed = run(volume, tmp_path / "b", **EVERYTHING)
    assert resumed.fingerprint == undisturbed.fingerprint
    for name in ("labels.tif", "masks.csv", "review.csv", "review-rois.zip", "pseudo.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_labels_may_have_a_name_of_their_own(volume, tmp_path) -> None:
    result = run(volume, tmp_path / "mine.tif", **EVERYTHING)
    assert result.labels == tmp_path / "mine.tif"
    assert result.out == tmp_path / "mine.pseudo"
    for path in (tmp_path / "mine.tif", tmp_path / "mine.pseudo"):
        labels, record = PseudoRecord.read(path)
        assert labels.resolve() == tmp_path / "mine.tif"
        assert record.shape_zyx == draw_stack().shape
    with pytest.raises(InvalidArgumentError, match="name is that of a TIFF"):
        run(volume, tmp_path / "mine.tif", format="ome-zarr", **EVERYTHING)


def test_labels_come_in_the_other_format(volume, tmp_path) -> None:
    result = run(volume, tmp_path / "out", format="ome-zarr", **EVERYTHING)
    plain = run(volume, tmp_path / "plain", **EVERYTHING)
    assert result.labels == tmp_path / "out" / "labels.ome.zarr"
    with open_labels(result.labels) as labels:
        found = np.stack([labels.read(z) for z in range(DEPTH)])
    np.testing.assert_array_equal(found, tifffile.imread(plain.labels))


def test_slices_that_are_not_looked_at_stay_unlabelled(volume, tmp_path) -> None:
    result = run(volume, tmp_path / "out", slices=(1, 3), boxes=FixedBoxes(0.9), **EVERYTHING)
    labels = tifffile.imread(result.labels)
    assert np.flatnonzero(labels.any(axis=(1, 2))).tolist() == [1, 2]
    assert result.slices == (1, 3)
    few = run(volume, tmp_path / "few", kept_slices=(2,), **EVERYTHING)
    assert np.flatnonzero(tifffile.imread(few.labels).any(axis=(1, 2))).tolist() == [2]
    rows = read_rows(tmp_path / "few" / "masks.csv")
    assert {row["why_not"] for row in rows if row["z"] != "2"} == {"its slice gets no labels"}


def test_nothing_of_other_thresholds_stays_behind(volume, truth, tmp_path) -> None:
    out, folder = tmp_path / "labels.tif", tmp_path / "labels.pseudo"
    names = ["boxes.yolo", "masks.coco.json", "rois.zip"]
    run(volume, out, also=("coco", "yolo", "roi"), **EVERYTHING)
    assert out.is_file()
    assert all((folder / name).exists() for name in names)
    run(volume, out, **EVERYTHING)
    assert out.is_file()
    assert not any((folder / name).exists() for name in names)
    session = make_session(decoder=SometimesWrong())
    assert not run(volume, out, session, truth=truth, precision=1.0, restart=True).reached
    assert not out.exists()
    with pytest.raises(InvalidArgumentError, match="the name is that of a TIFF"):
        run(volume, out, format="ome-zarr")


@pytest.mark.parametrize("depth", [1, 3])
def test_a_volume_without_any_mask_and_one_of_a_single_slice(tmp_path, depth) -> None:
    blank, one = tmp_path / "blank.tif", tmp_path / "one.tif"
    tifffile.imwrite(blank, np.zeros((depth, 96, 110), np.uint8), imagej=True, metadata={"axes": "ZYX"})
    tifffile.imwrite(one, draw_stack()[:depth], imagej=True, metadata={"axes": "ZYX"})
    nothing = run(blank, tmp_path / "a", also=("coco", "yolo", "roi"))
    assert (nothing.masks, nothing.kept, nothing.reached) == (0, 0, True)
    assert any("no mask was found at all" in notice for notice in nothing.notices)
    assert not tifffile.imread(nothing.labels).any()
    some = run(one, tmp_path / "b", **{**EVERYTHING, "least_agreement": 0.99 if depth == 1 else 0.0})
    assert some.kept == some.masks == 2 * depth
    assert any("no neighbouring slice" in notice for notice in some.notices) == (depth == 1)
    for made, volume in ((nothing, blank), (some, one)):
        with open_volume(volume) as raw:
            assert "Kept, worst first" in write_review_page(made, raw).read_text()


def test_other_folders_are_left_alone(volume, tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(InvalidArgumentError, match="holds no pseudo-labels"):
        run(volume, tmp_path / "mine", **EVERYTHING)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"


@pytest.mark.parametrize(
    ("wishes", "complaint"),
    [
        ({"precision": 0.9}, "give their labels as truth"),
        ({"least_stability": 1.2}, "least stability"),
        ({"jitter_fraction": 0.7}, "jitter is 0.7"),
        ({"right_iou": 0.0}, "IoU of a right mask"),
    ],
)
def test_senseless_options_are_refused(tmp_path, wishes, complaint) -> None:
    with pytest.raises(InvalidArgumentError, match=complaint):
        PseudoLabelOptions(tmp_path, **wishes)


def test_truth_that_does_not_fit_is_refused_before_any_work(volume, truth, tmp_path) -> None:
    small = write_truth(tmp_path / "small.tif", np.zeros((3, 96, 110)))
    session = make_session(encoder=refuse)
    with pytest.raises(VolumeError, match="differs from"):
        run(volume, tmp_path / "out", session, truth=small)
    with pytest.raises(InvalidArgumentError, match="not among the slices 0:3"):
        run(volume, tmp_path / "out", session, truth=truth, truth_slices=(2, 5), slices=(0, 3))
    assert not (tmp_path / "out").exists()
    with pytest.raises(VolumeError, match="shows no object"):
        run(volume, tmp_path / "out", truth=write_truth(tmp_path / "none.tif", np.zeros((DEPTH, 96, 110))))


def test_a_damaged_record_is_refused(volume, tmp_path) -> None:
    run(volume, tmp_path / "out", **EVERYTHING)
    record = tmp_path / "out" / "pseudo.json"
    document = json.loads(record.read_bytes())
    for damage, complaint in (
        ({**document, "labels": "../../elsewhere.tif"}, "outside of its folder"),
        ({**document, "schema_version": 99}, "schema version 99"),
        ({"schema_version": 1}, "is damaged"),
        ({**document, "labels": "gone.tif"}, "is missing"),
    ):
        record.write_text(json.dumps(damage))
        with pytest.raises(InputFileError, match=complaint):
            PseudoRecord.read(tmp_path / "out")


def test_parts_of_one_dendrite_that_touch_stay_apart() -> None:
    shapes = [(0, 0, 6, 6), (0, 6, 4, 4), (20, 20, 3, 3)]
    instances = Instances(
        np.array([1, 2, 3], np.uint32),
        np.zeros((3, 4), np.float32),
        np.ones(3, np.float32),
        np.ones(3, np.float32),
        np.array([36, 16, 9], np.int64),
        tuple(RunLengths.from_mask(np.ones(shape[2:], bool), Window(*shape)) for shape in shapes),
    )

    class OneSlice:
        def load(self, z: int):
            return type("Scored", (), {"instances": instances})

    table = MaskTable(
        np.zeros(3, np.int64), np.array([1, 2, 3]), np.array([5, 5, 5]), instances.boxes_xyxy,
        np.ones((3, 4)), np.ones(3), np.ones(3), instances.areas_px,
    )  # fmt: skip
    assert separate_twins(table, OneSlice(), np.ones(3, bool)).tolist() == [5, 6, 5]
    assert separate_twins(table, OneSlice(), np.array([True, False, True])).tolist() == [5, 5, 5]
