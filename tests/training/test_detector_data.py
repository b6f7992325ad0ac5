"""Which tiles an epoch shows, and how they are varied: a matter of seed and epoch alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dendsam_deploy.models.detector import load_detector, new_trainer
from dendsam_deploy.training.detector import DEFAULT_ARCHITECTURE
from dendsam_deploy.training.detector_data import EpochSampler, RepeatableTiles
from dendsam_deploy.training.detector_loop import LoopPlan, training_settings
from dendsam_deploy.training.detector_tiles import TileAt, write_tiles
from dendsam_deploy.training.options import DetectorSchedule
from dendsam_deploy.training.samples import Tile

TILES = 6


def drawn(sampler):
    """Return epoch, whether tiles are shown plainly, and the tiles, of the next epoch."""
    turns, tiles = zip(*(divmod(index, TILES) for index in sampler), strict=True)
    assert len(set(turns)) == 1
    return *divmod(turns[0], 2), list(tiles)


def test_an_epoch_is_drawn_without_replacement():
    sampler = EpochSampler(TILES, 4, 0, lambda: 5)
    assert len(sampler) == 4
    epochs = [drawn(sampler) for _ in range(5)]
    assert [epoch for epoch, _, _ in epochs] == [0, 1, 2, 3, 4]
    assert [plain for _, plain, _ in epochs] == [0, 0, 1, 1, 1]
    assert all(len(set(tiles)) == 4 for _, _, tiles in epochs)
    assert len({tuple(tiles) for _, _, tiles in epochs}) > 1


def test_an_epoch_does_not_depend_on_those_before_it():
    whole, resumed = (EpochSampler(TILES, 4, 3, lambda: 20) for _ in range(2))
    for _ in range(7):
        list(whole)
    resumed.epoch = 7
    assert list(whole) == list(resumed)
    assert list(EpochSampler(TILES, 4, 3, lambda: 20)) != list(EpochSampler(TILES, 4, 4, lambda: 20))


def plan_of(folder, *, joins_tiles):
    return LoopPlan(
        folder=folder,
        tile_size_px=64,
        most_boxes=2,
        from_scratch=True,
        schedule=DetectorSchedule(minutes=None, epochs=1),
        batch=2,
        held_out=(),
        elapsed_s=0.0,
        joins_tiles=joins_tiles,
    )


@pytest.fixture(scope="module")
def dataset(request, tmp_path_factory):
    """Return ultralytics' own dataset of six tiles, each of one grey and with one box, and its trainer."""
    folder = tmp_path_factory.mktemp("tiles")
    objects = np.zeros((64, 64), np.int32)
    objects[10:30, 20:50] = 1
    tiles = [TileAt(Tile(np.full((64, 64), 40 * n, np.uint8), objects, (64, 64)), 10) for n in range(1, TILES + 1)]
    for split in ("train", "val"):
        write_tiles(folder, split, tiles)
    trainer = new_trainer(training_settings(plan_of(folder, joins_tiles=request.param)))
    trainer.model = load_detector(DEFAULT_ARCHITECTURE).network
    return trainer, trainer.build_dataset(str(folder / "images" / "train"), "train", 2)


@pytest.mark.parametrize(("dataset", "is_varied"), [(True, True), (False, False)], indirect=["dataset"])
def test_a_tile_of_an_epoch_does_not_depend_on_what_was_shown_before(dataset, is_varied):
    trainer, tiles = dataset
    shown = RepeatableTiles(tiles, trainer.args, seed=1)
    order = [*range(3 * TILES), *reversed(range(3 * TILES))]
    seen = {}
    for index in order:
        item = shown[index]
        image, boxes = seen.setdefault(index, (item["img"], item["bboxes"]))
        assert torch.equal(item["img"], image)
        assert torch.equal(item["bboxes"], boxes)
    first, second = (seen[epoch * 2 * TILES][0] for epoch in (0, 1))
    assert torch.equal(first, second) != is_varied
    if is_varied:
        other = RepeatableTiles(tiles, trainer.args, seed=2)
        assert any(not torch.equal(other[n]["img"], seen[n][0]) for n in range(TILES))
        joined = [seen[n][0] for n in range(TILES) if len(seen[n][0].unique()) > 2]
        assert joined  # some tiles are joined of several,
    for n in range(TILES):  # but none in the last epochs
        assert len(seen[TILES + n][1]) == 1
        greys = set(seen[TILES + n][0].unique().tolist())
        assert 40 * (n + 1) in greys


@pytest.mark.parametrize("dataset", [False], indirect=True)
def test_without_variation_a_tile_is_shown_as_it_lies_on_disk(dataset):
    trainer, tiles = dataset
    item = RepeatableTiles(tiles, trainer.args, seed=1)[2]
    assert (item["img"] == 120).all()
    np.testing.assert_allclose(item["bboxes"][0], [35 / 64, 20 / 64, 30 / 64, 20 / 64], atol=1e-6)
