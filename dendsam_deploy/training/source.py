"""Labelled volumes to learn from: which slices teach, which judge, and at which scale."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dendsam_deploy.errors import InvalidArgumentError, VolumeError
from dendsam_deploy.training.boxes import plan_zoom, split_blocks
from dendsam_deploy.training.samples import MIN_OBJECT_PX, LabelledVolume, TileRecipe
from dendsam_deploy.volume.open import open_labels, open_volume

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dendsam_deploy.training.options import DataOptions


@dataclass(frozen=True, slots=True)
class TrainingSource:
    """One labelled volume to learn from: the slices to train on, those to judge by, and how tiles are cut."""

    train: LabelledVolume
    held_out: LabelledVolume
    recipe: TileRecipe
    weight: float = 1.0
    model_pixel_size_nm: float | None = None


@contextmanager
def open_source(
    volume_path: Path, labels_path: Path, options: DataOptions, tile_size_px: int
) -> Iterator[TrainingSource]:
    """Open a labelled volume, divide its slices and choose the scale.

    Parameters
    ----------
    volume_path, labels_path : Path
        Image and instance labels of the same shape; closed again behind the block.
    options : DataOptions
        See there.
    tile_size_px : int
        Side S of the model's input.

    Raises
    ------
    InvalidArgumentError
        If the slices cannot be divided.
    VolumeError
        If a file cannot be used, or either block shows no object.
    """
    with open_volume(volume_path, options.voxel_size_nm) as image, open_labels(labels_path) as labels:
        train, held_out = split_blocks(image.info.shape_zyx[0], options.holdout_fraction, options.gap, options.slices)
        if not held_out:
            raise InvalidArgumentError("training needs at least two slices, one of them held out; give more slices")
        learn, judge = (LabelledVolume(image, labels, block, options.background_labels) for block in (train, held_out))
        areas = learn.object_areas()
        for block, found in ((train, areas), (held_out, judge.object_areas())):
            if not len(found):
                raise VolumeError(
                    f"{labels_path}: no object of {MIN_OBJECT_PX} px or more in slices {block.start}:{block.stop}; "
                    "choose others with slices"
                )
        zoom = options.zoom or plan_zoom(areas)
        voxel_size = image.info.voxel_size_nm
        # Training scales both axes alike. Where pixels are not square no one size describes what it saw, and deployment
        # has to go by the zoom.
        is_square = voxel_size is not None and voxel_size[1] == voxel_size[2]
        pixel_size_nm = voxel_size[1] / zoom if voxel_size is not None and is_square else None
        yield TrainingSource(learn, judge, TileRecipe(tile_size_px, zoom), model_pixel_size_nm=pixel_size_nm)
