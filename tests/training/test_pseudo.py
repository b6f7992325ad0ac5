"""Pseudo-labels in training: they teach beside true labels, never judge, and keep away from held-out slices."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import tifffile
import torch

from dendsam_deploy.errors import InputFileError, InvalidArgumentError, VolumeError
from dendsam_deploy.training.batches import BatchRecipe, draw_batch
from dendsam_deploy.training.finetune import finetune_sam
from dendsam_deploy.training.lessons import BoxLesson
from dendsam_deploy.training.losses import DenseHints
from dendsam_deploy.training.pseudo import TrueLabels, open_pseudo_sources
from dendsam_deploy.training.sam_options import FinetuneSamOptions, SamTrainingOptions
from dendsam_deploy.training.source import open_sources
from dendsam_deploy.training.volume_list import LabelledPaths, read_volume_list
from dendsam_deploy.volume.pseudo_record import PseudoRecord

DEPTH = 20
SCHEDULE = SamTrainingOptions(
    minutes=None, steps=2, judge_steps=2, tiles_per_step=1, objects_per_tile=2, judge_slices=1, learning_rate=1e-3
)


def discs(depth: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[0:72, 0:80]
    labels = np.zeros((depth, 72, 80), np.uint16)
    for number, (row, column) in enumerate(((18, 20), (18, 58), (50, 20), (50, 58)), start=1):
        labels[:, (y - row) ** 2 + (x - column) ** 2 < 13**2] = number
    raw = np.where(labels > 0, 200, 60) + np.random.default_rng(seed).normal(0, 8, labels.shape)
    return raw.clip(0, 255).astype(np.uint8), labels


def write(path, stack):
    metadata = {"unit": "um", "spacing": 0.04, "axes": "ZYX"}
    tifffile.imwrite(path, stack, imagej=True, resolution=(100, 100), metadata=metadata)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twenty slices, of which 0 to 3 and 15 to 19 are labelled; pseudo-labels of two of the four discs in all."""
    folder = tmp_path_factory.mktemp("data")
    raw, labels = discs(DEPTH, 0)
    write(folder / "raw.tif", raw)
    write(folder / "copy.tif", raw)
    write(folder / "other.tif", discs(DEPTH, 1)[0])
    is_labelled = (np.arange(DEPTH) < 4) | (np.arange(DEPTH) >= 15)
    write(folder / "labels.tif", labels * is_labelled[:, None, None].astype(np.uint16))
    for name, volume in (("pseudo", "raw"), ("pseudo-copy", "copy"), ("pseudo-other", "other")):
        (folder / name).mkdir()
        write(folder / name / "labels.tif", np.where(labels < 3, labels, 0))
        PseudoRecord(
            "labels.tif", str(folder / f"{volume}.tif"), (DEPTH, 72, 80), (0, DEPTH), dict.fromkeys(range(DEPTH), 2),
            "toy", "0" * 64, name, {},
        ).write(folder / name)  # fmt: skip
    return folder


@pytest.fixture
def options(tmp_path):
    return FinetuneSamOptions(
        tmp_path / "sam.pt", from_scratch=True, image_size=64, gap=2, held_out=((15, 20),), schedule=SCHEDULE
    )


def opened(data, options, stack, *names, weight=0.5):
    volumes = (LabelledPaths(data / "raw.tif", data / "labels.tif"),)
    sources = stack.enter_context(open_sources(volumes, options, 64))
    true = TrueLabels(volumes, sources, options.gap)
    return sources, stack.enter_context(open_pseudo_sources([data / name for name in names], weight, true))


@pytest.fixture
def stack():
    from contextlib import ExitStack  # noqa: PLC0415

    with ExitStack() as entered:
        yield entered


@pytest.mark.parametrize("name", ["pseudo", "pseudo-copy"])
def test_held_out_slices_and_their_neighbours_are_never_touched(data, options, stack, name) -> None:
    _, (source,) = opened(data, options, stack, name)
    # 0 to 3 have true labels, 15 on are held out, and 13 and 14 lie within the gap. A copy is the same volume.
    assert tuple(source.train.slices) == tuple(range(4, 13))
    assert source.held_out is None
    assert not source.is_dense
    with pytest.raises(InvalidArgumentError, match="slice 15 is none of the slices"):
        source.train[15]


def test_another_volume_may_teach_everywhere(data, options, stack) -> None:
    sources, (source,) = opened(data, options, stack, "pseudo-other")
    assert tuple(source.train.slices) == tuple(range(DEPTH))
    assert source.recipe.zoom == pytest.approx(sources[0].recipe.zoom)


def test_weights_are_relative_to_all_true_labels(data, options, stack) -> None:
    sources, pseudo = opened(data, options, stack, "pseudo", "pseudo-other", weight=0.6)
    assert sum(source.weight for source in pseudo) == pytest.approx(0.6 * sum(source.weight for source in sources))
    rng = np.random.default_rng(0)
    batches = [draw_batch((*sources, *pseudo), BatchRecipe(), rng, use_points=False) for _ in range(300)]
    drawn = sum(len(batch.sparse) for batch in batches) / 300
    assert drawn == pytest.approx(0.6 / 1.6, abs=0.08)
    # On pseudo-labels only what is labelled is asked for: two discs of four.
    assert max(len(batch.numbers) for batch in batches if batch.sparse) <= 2
    assert max(len(batch.numbers) for batch in batches if not batch.sparse) > 2


def test_hints_do_not_call_unlabelled_objects_background(data, options, stack) -> None:
    sources, pseudo = opened(data, options, stack, "pseudo")
    rng = np.random.default_rng(1)
    dense, sparse = (draw_batch(of, BatchRecipe(tiles=2), rng, use_points=False) for of in (sources, pseudo))
    assert (dense.sparse, sparse.sparse) == ((), (0, 1))

    class NoMasks(BoxLesson):
        __slots__ = ()

        def _mask_losses(self, embeddings, batch):
            from dendsam_deploy.training.losses import MaskLosses  # noqa: PLC0415

            return MaskLosses(*(torch.zeros(1) for _ in range(4)))

    lesson = NoMasks(None, DenseHints(256))
    embeddings = torch.randn(2, 256, 4, 4)
    losses = [next(lesson.parts(embeddings, batch, rng)).loss for batch in (dense, sparse)]
    assert losses[0] > 0
    assert losses[1] == 0
    mixed = sparse._replace(sparse=(1,))
    assert next(lesson.parts(embeddings, mixed, rng)).loss > 0


def test_training_uses_and_records_them(data, options) -> None:
    lines = []

    def note(progress) -> None:
        if progress.stage == "plan":
            lines.append(progress.note)

    wishes = dataclasses.replace(options, pseudo=(data / "pseudo",), pseudo_weight=2.0)
    result = finetune_sam(data / "raw.tif", data / "labels.tif", wishes, note)
    assert "pseudo-labels of pseudo: slices 4:13" in lines
    assert result.held_out_slices == (15, 20)
    from dendsam_deploy.models.weights import load_sam  # noqa: PLC0415

    assert load_sam(options.out).record.summary["pseudo_labels"] == ["pseudo"]


def test_other_pseudo_labels_are_another_training(data, options, tmp_path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("labels.tif", "pseudo.json"):
        (folder / name).write_bytes((data / "pseudo" / name).read_bytes())
    wishes = dataclasses.replace(options, pseudo=(folder,), schedule=dataclasses.replace(SCHEDULE, steps=6))

    def stop(progress) -> None:
        if progress.stage == "train" and progress.done > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune_sam(data / "raw.tif", data / "labels.tif", wishes, stop)
    record = json.loads((folder / "pseudo.json").read_bytes())
    (folder / "pseudo.json").write_text(json.dumps(record | {"fingerprint": "other"}))
    from dendsam_deploy.errors import CheckpointError  # noqa: PLC0415

    with pytest.raises(CheckpointError, match="other settings"):
        finetune_sam(data / "raw.tif", data / "labels.tif", wishes)


def test_a_folder_without_a_free_slice_is_refused(data, options, stack) -> None:
    wide = dataclasses.replace(options, gap=11)
    with pytest.raises(InvalidArgumentError, match=r"may teach: .* lie within 11 of held-out slices"):
        opened(data, wide, stack, "pseudo")


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_senseless_weights_are_refused(data, options, stack, weight) -> None:
    with pytest.raises(InvalidArgumentError, match="weight of pseudo-labels"):
        opened(data, options, stack, "pseudo", weight=weight)


def test_folders_that_are_no_pseudo_labels_are_refused(data, options, stack, tmp_path) -> None:
    with pytest.raises(InputFileError, match="holds no finished pseudo-labels"):
        opened(data, options, stack, "labels.tif")
    folder = tmp_path / "small"
    folder.mkdir()
    write(folder / "labels.tif", np.ones((3, 72, 80), np.uint16))
    PseudoRecord(
        "labels.tif", str(data / "raw.tif"), (3, 72, 80), (0, 3), {0: 1, 5: 1}, "toy", "0", "x", {}
    ).write(folder)  # fmt: skip
    with pytest.raises(VolumeError, match="differs from"):
        opened(data, options, stack, folder)


def test_a_volume_that_has_moved_is_found_by_its_shape(data, options, stack, tmp_path) -> None:
    folder = tmp_path / "moved"
    folder.mkdir()
    (folder / "labels.tif").write_bytes((data / "pseudo" / "labels.tif").read_bytes())
    record = json.loads((data / "pseudo" / "pseudo.json").read_bytes())
    (folder / "pseudo.json").write_text(json.dumps(record | {"volume": "/gone/raw.tif"}))
    _, (source,) = opened(data, options, stack, folder)
    assert tuple(source.train.slices) == tuple(range(4, 13))


def test_a_list_names_the_slices_that_train(data, options, stack, tmp_path) -> None:
    lines = tmp_path / "data.txt"
    lines.write_text(f"{data / 'raw.tif'} {data / 'labels.tif'} train=0:3 held-out=15:20\n")
    volumes = read_volume_list(lines)
    (source,) = stack.enter_context(open_sources(volumes, dataclasses.replace(options, held_out=()), 64))
    assert tuple(source.train.slices) == (0, 1, 2)
    assert source.held_out is not None
    assert tuple(source.held_out.slices) == tuple(range(15, 20))
    lines.write_text(f"{data / 'raw.tif'} {data / 'labels.tif'} train=14:16 held-out=15:20\n")
    with pytest.raises(InvalidArgumentError, match="none of the slices 14:16 that are to train"):
        stack.enter_context(open_sources(read_volume_list(lines), options, 64))
