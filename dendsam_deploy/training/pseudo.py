"""Pseudo-labels to learn from: they teach beside true labels, never judge, and keep away from what judges.

In a slice of pseudo-labels 0 means "unlabelled". That is no harm to a decoder of prompts: each prompt asks for one
labelled object and is compared with the mask of that object alone. What describes the whole tile, the dense hints of
young encoders, is left out for them (`TrainingSource.is_dense`).
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.training.boxes import plan_zoom, slices_text
from dendsam_deploy.training.samples import LabelledVolume
from dendsam_deploy.training.source import TrainingSource
from dendsam_deploy.volume.open import open_labels, open_volume
from dendsam_deploy.volume.pseudo_record import PseudoRecord

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dendsam_deploy.training.samples import TileRecipe
    from dendsam_deploy.training.volume_list import LabelledPaths
    from dendsam_deploy.volume.volume import VolumeReader


@dataclass(frozen=True, slots=True)
class TrueLabels:
    """What is trained on besides: volumes with true labels, and how far pseudo-labels keep away from what judges.

    Parameters
    ----------
    volumes : sequence of LabelledPaths
        Where they lie.
    sources : sequence of TrainingSource
        The same, open.
    gap : int
        Slices on either side of a held-out one that pseudo-labels must not teach either.
    """

    volumes: Sequence[LabelledPaths]
    sources: Sequence[TrainingSource]
    gap: int


@contextmanager
def open_pseudo_sources(
    folders: Sequence[Path], weight: float, true: TrueLabels
) -> Iterator[tuple[TrainingSource, ...]]:
    """Open folders of pseudo-labels as sources that only teach.

    Of the slices with kept masks those are used that hold no true label of the training, and of which no held-out slice
    of the same volume is at most `gap` away. Whether it is the same volume is told by its content, not by its name.

    Parameters
    ----------
    folders : sequence of Path
        What `pseudo-label` wrote; closed again behind the block.
    weight : float
        How often all of them together are drawn from, relative to all true labels together.
    true : TrueLabels
        What is trained on besides.

    Raises
    ------
    InvalidArgumentError
        If the weight is not positive, or no slice of a folder may be used.
    InputFileError, VolumeError
        If a folder is not finished or cannot be read.
    """
    if not weight > 0 or not np.isfinite(weight):
        raise InvalidArgumentError(f"the weight of pseudo-labels is {weight}, expected a positive number")
    each = weight * sum(source.weight for source in true.sources) / max(len(folders), 1)
    with ExitStack() as stack:
        yield tuple(_open(folder, each, true, stack) for folder in folders)


def pseudo_fingerprints(folders: Sequence[Path]) -> list[str]:
    """Return what decided the content of folders of pseudo-labels, for the fingerprint of a training."""
    return [PseudoRecord.read(folder)[1].fingerprint for folder in folders]


def _open(folder: Path, weight: float, true: TrueLabels, stack: ExitStack) -> TrainingSource:
    """Open one folder."""
    labels_path, record = PseudoRecord.read(folder)
    image = stack.enter_context(open_volume(_volume_of(record, true)))
    labels = stack.enter_context(open_labels(labels_path))
    same = [source for entry, source in zip(true.volumes, true.sources, strict=True) if _is_same(image, entry.volume)]
    judging = {z for source in same if source.held_out is not None for z in source.held_out.slices}
    near = {z + step for z in judging for step in range(-true.gap, true.gap + 1)}
    labelled = {z for source in same for z in source.train.slices if z in record.kept_masks and _shows(source, z)}
    slices = tuple(sorted(set(record.kept_masks) - near - labelled))
    if not slices:
        raise InvalidArgumentError(
            f"{folder}: none of its slices with masks ({slices_text(sorted(record.kept_masks)) or 'none at all'}) may "
            f"teach: {len(near & set(record.kept_masks))} lie within {true.gap} of held-out slices and "
            f"{len(labelled)} have true labels; make pseudo-labels of others, or train on fewer true slices"
        )
    volume = LabelledVolume(image, labels, slices, least_px=true.sources[0].train.least_px)
    recipe, pixel_size_nm = _scale(volume, image, same or true.sources, is_same=bool(same))
    return TrainingSource(
        volume, None, recipe, weight, pixel_size_nm, f"pseudo-labels of {folder.name}", is_dense=False
    )


def _volume_of(record: PseudoRecord, true: TrueLabels) -> Path:
    """Return where the volume of some pseudo-labels lies: where it was, or else the only one of that shape."""
    recorded = Path(record.volume)
    if recorded.exists():
        return recorded
    alike = {
        entry.volume
        for entry, source in zip(true.volumes, true.sources, strict=True)
        if source.train.depth == record.shape_zyx[0]
    }
    if len(alike) == 1:
        return alike.pop()
    raise InvalidArgumentError(
        f"{record.volume}: the volume of the pseudo-labels is no longer there, and {len(alike)} of the volumes to "
        "train on have its shape; put it back"
    )


def _is_same(image: VolumeReader, other_path: Path) -> bool:
    """Tell whether a file shows the same volume: the same shape, and the same first, middle and last slice."""
    with open_volume(other_path) as other:
        depth = image.info.shape_zyx[0]
        return image.info.shape_zyx == other.info.shape_zyx and all(
            np.array_equal(image.read(z), other.read(z)) for z in sorted({0, depth // 2, depth - 1})
        )


def _shows(source: TrainingSource, z: int) -> bool:
    """Tell whether a slice has true labels."""
    return bool(source.train[z].objects.any())


def _scale(
    volume: LabelledVolume, image: VolumeReader, sources: Sequence[TrainingSource], *, is_same: bool
) -> tuple[TileRecipe, float | None]:
    """Return how tiles are cut, and the size of a model pixel: as of the same volume, or by the size of pixels."""
    recipe, size_nm = sources[0].recipe, sources[0].model_pixel_size_nm
    if is_same:
        return recipe, size_nm
    voxel_nm = image.info.voxel_size_nm
    if size_nm is not None and voxel_nm is not None and voxel_nm[1] == voxel_nm[2]:
        return replace(recipe, zoom=voxel_nm[1] / size_nm), size_nm
    return replace(recipe, zoom=plan_zoom(volume.object_areas())), None
