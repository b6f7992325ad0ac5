"""The linkers on real tissue: 2-D pieces of expert labels are linked again and compared with the 3-D truth."""

from __future__ import annotations

import numpy as np
import pytest
from painted_slices import link_volume, relabelled
from skimage.measure import label

from dendsam_deploy.metrics.contingency import ContingencyTable
from dendsam_deploy.metrics.partition import variation_of_information
from dendsam_deploy.volume.open import open_labels

MEMBRANE = 249
SMALLEST_PX = 25


def truth_and_pieces(path, slices):
    """Return connected 3-D objects, and the pieces that they have in each slice, without specks."""
    with open_labels(path) as volume:
        labels = np.stack([volume.read(z) for z in slices])
    labels[labels == MEMBRANE] = 0
    pieces = np.stack([label(image, connectivity=1) for image in labels])
    for image in pieces:
        image[np.bincount(image.ravel())[image] < SMALLEST_PX] = 0
    return np.where(pieces > 0, label(labels, connectivity=3), 0), pieces


def information(truth, pieces, **options):
    ids = relabelled(pieces, link_volume(pieces, **options))
    return variation_of_information(ContingencyTable.from_labels(truth, ids))


@pytest.fixture(scope="module")
def medulla(shared_data):
    """Isotropic voxels of 10 nm, every second slice."""
    return truth_and_pieces(shared_data / "em_fibsem_medulla" / "neurites.tif", range(60, 120, 2))


@pytest.fixture(scope="module")
def nerve_cord(shared_data):
    """Sections of 50 nm; three of them lie tens of pixels away from their neighbours."""
    return truth_and_pieces(shared_data / "em_sstem_vnc" / "neurites.tif", range(5, 15))


def test_the_overlap_graph_cuts_less_than_the_baseline_and_hardly_joins(medulla):
    graph, greedy = information(*medulla), information(*medulla, method="iou-greedy")
    assert graph.split < 0.65 * greedy.split
    assert graph.merge < 0.1


def test_undoing_shifts_of_sections_helps_both_linkers(nerve_cord):
    for method in ("overlap-graph", "iou-greedy"):
        aligned, as_they_lie = (information(*nerve_cord, method=method, align=align) for align in (True, False))
        assert aligned.split + aligned.merge < 0.8 * (as_they_lie.split + as_they_lie.merge)


def test_the_overlap_graph_beats_the_baseline_where_sections_jump(nerve_cord):
    graph, greedy = information(*nerve_cord), information(*nerve_cord, method="iou-greedy")
    assert graph.split + graph.merge < greedy.split + greedy.merge
