"""What holds for all scores together: perfection, names of labels, exchange of roles."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dendsam_deploy.metrics.contingency import ContingencyTable
from dendsam_deploy.metrics.matching import MSA_THRESHOLDS, S_INST_THRESHOLDS, segmentation_accuracy
from dendsam_deploy.metrics.overlaps import ObjectOverlaps
from dendsam_deploy.metrics.summary import score_objects, score_partition

ERRORS = {"oce", "e_gs", "e_sg", "vi_split", "vi_merge", "arand_error"}


def images(least: int = 0) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.uint16, (4, 6), elements=st.integers(least, 4))


def all_scores(truth: np.ndarray, segmentation: np.ndarray) -> dict[str, float]:
    table = ContingencyTable.from_labels(truth, segmentation)
    return asdict(score_objects(table)) | asdict(score_partition(table))


@settings(deadline=None)
@given(images())
def test_identical_labellings_are_perfect(labels):
    found = all_scores(labels, labels)
    assert found == pytest.approx({name: float(name not in ERRORS) for name in found}, abs=1e-12)


@settings(deadline=None)
@given(images(), images())
def test_shares_lie_between_zero_and_one_and_nothing_is_nan(truth, segmentation):
    found = all_scores(truth, segmentation)
    assert all(value >= 0 for value in found.values())
    assert all(value <= 1 for name, value in found.items() if not name.startswith("vi"))


@settings(deadline=None)
@given(images(), images(), st.permutations(range(1, 5)), st.permutations(range(1, 5)))
def test_the_names_of_labels_do_not_matter(truth, segmentation, truth_names, segment_names):
    renamed = np.array([0, *truth_names])[truth], np.array([0, *segment_names])[segmentation]
    assert all_scores(*renamed) == pytest.approx(all_scores(truth, segmentation), abs=1e-12)


@settings(deadline=None)
@given(images(least=1), images(least=1))
def test_exchanging_the_roles_exchanges_the_directions(truth, segmentation):
    there, back = all_scores(truth, segmentation), all_scores(segmentation, truth)
    partner = {"e_gs": "e_sg", "vi_split": "vi_merge", "arand_precision": "arand_recall"}
    partner |= {second: first for first, second in partner.items()}
    assert back == pytest.approx({name: there[partner.get(name, name)] for name in there}, abs=1e-12)


def test_accuracies_are_means_over_their_own_thresholds():
    # One object of 20 voxels, of which 13 were found: IoU .65.
    truth, segmentation = np.ones(20, int), np.repeat([1, 0], [13, 7])
    found = all_scores(truth, segmentation)
    assert found["s_inst"] == pytest.approx(12 / 17)  # .10 to .65 of .10 to .90
    assert found["msa"] == pytest.approx(4 / 10)  # .50 to .65 of .50 to .95
    assert (found["sa50"], found["sa75"]) == (1, 0)


def test_means_agree_with_the_accuracies_themselves():
    rng = np.random.default_rng(3)
    truth = np.kron(rng.integers(0, 9, (6, 6)), np.ones((4, 4), int))
    segmentation = np.roll(truth, 1, axis=1)
    overlaps = ObjectOverlaps.from_table(ContingencyTable.from_labels(truth, segmentation))
    found = all_scores(truth, segmentation)
    assert found["s_inst"] == pytest.approx(segmentation_accuracy(overlaps, S_INST_THRESHOLDS).mean())
    assert found["msa"] == pytest.approx(segmentation_accuracy(overlaps, MSA_THRESHOLDS).mean())
    assert found["sa75"] == segmentation_accuracy(overlaps, [0.75])[0]
