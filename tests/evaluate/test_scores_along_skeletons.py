"""Expected run length of label volumes: skeletons in physical units, walked through the voxels."""

from __future__ import annotations

import numpy as np
import pytest
from scored_arrays import ArrayReader, blocks, score

from dendsam_deploy.errors import InputFileError, InvalidArgumentError
from dendsam_deploy.evaluate.score_report import EvaluateOptions
from dendsam_deploy.evaluate.scores import score_volumes


def swc(folder, *lines):
    (folder / "a.swc").write_text("\n".join(lines))
    return folder / "a.swc"


def test_skeletons_are_walked_in_the_volume(tmp_path):
    """Voxels of 1000 x 500 x 250 nm; the skeleton runs along x through row 1 of slice 1, then down to slice 2."""
    labels = np.zeros((3, 3, 8), int)
    labels[1, 1, :4], labels[1, 1, 4:], labels[2, 1] = 5, 6, 6
    path = swc(
        tmp_path,
        "1 3 0.0 0.5 1.0 1 -1",
        "2 3 0.75 0.5 1.0 1 1",
        "3 3 1.0 0.5 1.0 1 2",
        "4 3 1.9 0.7 1.2 1 3",
        "5 3 1.9 0.7 2.2 1 4",
        "6 3 1.9 0.7 3.2 1 5",
    )
    reader = ArrayReader("labels", labels, (1000.0, 500.0, 250.0))
    found = score_volumes(reader, reader, EvaluateOptions(skeletons=path)).skeletons
    last = (0.9**2 + 0.2**2 + 0.2**2) ** 0.5
    assert (found.skeletons, found.nodes, found.nodes_outside) == (1, 5, 1)
    run = found.run_length  # 0.75 in segment 5, 0.25 cut, then 0.94 and 1 in segment 6
    assert (run.split, run.correct) == pytest.approx((0.25, 1.75 + last))
    assert run.expected == pytest.approx((0.75**2 + (last + 1) ** 2) / (2 + last))
    document = score_volumes(reader, reader, EvaluateOptions(skeletons=path)).to_document()
    assert document["volume"]["erl_um"] == run.expected
    assert document["volume"]["erl_share"] == pytest.approx(run.expected / (2 + last))


def test_positions_on_the_grid_of_voxels_are_not_lost_by_rounding(tmp_path):
    labels = np.arange(1, 1001).reshape(1000, 1, 1)
    lines = [f"{z + 1} 3 0 0 {z * 0.04:.6f} 1 {z or -1}" for z in range(1000)]
    reader = ArrayReader("labels", labels, (40.0, 10.0, 10.0))
    found = score_volumes(reader, reader, EvaluateOptions(skeletons=swc(tmp_path, *lines), resamples=0)).skeletons
    assert found.nodes == 1000
    assert found.run_length.split == pytest.approx(999 * 0.04)


def test_skeletons_start_where_the_labels_do(tmp_path):
    truth = np.ones((6, 2, 2), int)
    path = swc(tmp_path, "1 3 0 0 0 1 -1", "2 3 0 0 4 1 1", "3 3 0 0 5 1 2")
    options = EvaluateOptions(skeletons=path, first_slice=4, voxel_size_nm=(1000, 1000, 1000))
    report = score_volumes(ArrayReader("labels", truth[4:]), ArrayReader("truth", truth), options)
    assert report.skeletons.nodes == 2
    assert report.skeletons.run_length.expected == 1


def test_skeletons_elsewhere_or_of_unknown_scale_are_refused(tmp_path):
    path = swc(tmp_path, "1 3 0 0 9000 1 -1")
    with pytest.raises(InvalidArgumentError, match="record no voxel size; give --voxel-size"):
        score(blocks(1), blocks(2), skeletons=path)
    with pytest.raises(InputFileError, match=r"no node lies in the volume .* another unit"):
        score(blocks(1), blocks(2), skeletons=path, voxel_size_nm=(40, 10, 10))
