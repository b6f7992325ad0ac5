"""The phantom is the truth of other tests, so its own labels are checked against brute force."""

import numpy as np
import pytest
from scipy import ndimage

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.volume.phantom import Phantom, PhantomOptions, make_phantom

SMALL = (8, 160, 192)


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return make_phantom(PhantomOptions(shape_zyx=(12, 256, 288), seed=7))


@pytest.fixture(scope="module")
def dense() -> Phantom:
    return make_phantom(PhantomOptions(shape_zyx=SMALL, seed=3, dense=True))


def components(mask, corners=True):
    structure = np.ones((3,) * mask.ndim) if corners else None
    return ndimage.label(mask, structure=structure)


def ids(labels):
    found = np.unique(labels)
    return found[found > 0]


def test_types_and_shapes(phantom):
    assert phantom.raw.shape == phantom.labels.shape == phantom.labels_2d.shape == (12, 256, 288)
    assert phantom.raw.dtype == np.uint8
    assert phantom.labels.dtype == phantom.labels_2d.dtype == np.uint32
    assert phantom.voxel_size_nm == (40.0, 15.0, 15.0)
    assert phantom.missing_slices == ()


def test_same_seed_same_bytes_and_other_seed_other_stack():
    first, again, other = (make_phantom(PhantomOptions(shape_zyx=SMALL, seed=seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.raw, again.raw)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert (first.raw != other.raw).mean() > 0.5
    assert (first.labels != other.labels).any()


def test_overriding_the_look_keeps_the_geometry():
    plain = make_phantom(PhantomOptions(shape_zyx=SMALL, seed=1))
    loud = make_phantom(PhantomOptions(shape_zyx=SMALL, seed=1, noise=40.0, contrast=1.2, membrane_width_px=4.0))
    np.testing.assert_array_equal(plain.labels, loud.labels)

    def roughness(p):
        return np.abs(np.diff(p.raw.astype(int), axis=2)).mean()

    assert roughness(loud) > 1.5 * roughness(plain)


@pytest.mark.parametrize("which", ["phantom", "dense"])
def test_each_id_is_one_connected_object(which, request):
    labels = request.getfixturevalue(which).labels
    assert ids(labels).tolist() == list(range(1, labels.max() + 1))
    for number in ids(labels):
        assert components(labels == number)[1] == 1


@pytest.mark.parametrize("which", ["phantom", "dense"])
def test_2d_labels_are_exactly_the_pieces_of_objects_in_a_slice(which, request):
    made = request.getfixturevalue(which)
    for plane, plane_2d in zip(made.labels, made.labels_2d, strict=True):
        pieces = []
        for number in ids(plane):
            found, count = components(plane == number)
            pieces += [found == k for k in range(1, count + 1)]
        assert ids(plane_2d).tolist() == list(range(1, len(pieces) + 1))
        for piece in pieces:
            (label,) = np.unique(plane_2d[piece])
            assert label > 0
            np.testing.assert_array_equal(plane_2d == label, piece)


def test_no_labelled_piece_is_a_sliver(phantom):
    for plane in phantom.labels_2d:
        assert np.bincount(plane.ravel())[1:].min() >= 50


def test_touching_dendrites_share_a_membrane_that_belongs_to_neither(phantom):
    labels = phantom.labels
    beside = [(labels[:, :, :-1], labels[:, :, 1:]), (labels[:, :-1], labels[:, 1:])]
    beside += [(labels[:, :-1, :-1], labels[:, 1:, 1:]), (labels[:, 1:, :-1], labels[:, :-1, 1:])]
    for first, second in beside:
        assert not ((first != second) & (first > 0) & (second > 0)).any()
    left, right = labels[:, :, :-3], labels[:, :, 3:]
    between = (labels[:, :, 1:-2] == 0) & (labels[:, :, 2:-1] == 0)
    assert ((left != right) & (left > 0) & (right > 0) & between).sum() > 50


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_dendrite_branches(seed):
    labels = make_phantom(PhantomOptions(shape_zyx=(16, 192, 192), seed=seed)).labels
    pieces = [[components(plane == number)[1] for plane in labels] for number in ids(labels)]
    assert any(max(counts) >= 2 for counts in pieces)
    assert any(1 in counts and max(counts) >= 2 for counts in pieces)


def test_membranes_are_darker_than_interiors(phantom):
    border, inner = [], []
    for raw, plane in zip(phantom.raw, phantom.labels, strict=True):
        for number in ids(plane):
            depth = ndimage.distance_transform_edt(np.pad(plane == number, 1, mode="edge"))[1:-1, 1:-1]
            border.append(raw[(depth > 0) & (depth <= 1)])
            inner.append(raw[depth > 4])
    assert np.concatenate(border).mean() < np.concatenate(inner).mean() - 20


def test_unlabelled_tissue_looks_different_from_dendrites(phantom):
    labelled = phantom.labels > 0
    assert phantom.raw[~labelled].mean() < phantom.raw[labelled].mean() - 8


def test_a_missing_slice_is_blank_but_keeps_its_truth():
    whole = make_phantom(PhantomOptions(shape_zyx=SMALL, seed=4))
    holed = make_phantom(PhantomOptions(shape_zyx=SMALL, seed=4, missing_slice=3))
    assert holed.missing_slices == (3,)
    assert not holed.raw[3].any()
    rest = np.arange(SMALL[0]) != 3
    np.testing.assert_array_equal(holed.raw[rest], whole.raw[rest])
    np.testing.assert_array_equal(holed.labels, whole.labels)


def test_dense_labels_fill_the_field(dense):
    assert (dense.labels > 0).mean() > 0.75  # the rest is membrane
    assert dense.labels.max() > 30


def test_dendrite_fraction_is_kept_roughly():
    for share in (0.0, 0.2, 0.5):
        labels = make_phantom(PhantomOptions(shape_zyx=(4, 256, 256), seed=1, dendrite_fraction=share)).labels
        assert (labels > 0).mean() == pytest.approx(share, abs=0.13)


def test_one_slice_is_enough():
    made = make_phantom(PhantomOptions(shape_zyx=(1, 64, 64), seed=5))
    assert made.raw.std() > 0
    assert made.labels.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape_zyx": (0, 128, 128)}, "too small"),
        ({"shape_zyx": (4, 128, 63)}, "too small"),
        ({"seed": -1}, "seed is -1"),
        ({"voxel_size_nm": (40.0, 0.0, 15.0)}, "voxel size"),
        ({"missing_slice": 16}, "missing slice is 16, expected 0 to 15"),
        ({"membrane_width_px": 0.0}, "membrane_width_px is 0.0, expected at least 0.1"),
        ({"noise": float("nan")}, "noise is nan"),
        ({"dendrite_fraction": 0.9}, "dendrite fraction"),
    ],
)
def test_impossible_options_are_refused(change, message):
    with pytest.raises(InvalidArgumentError, match=message):
        PhantomOptions(**change)
