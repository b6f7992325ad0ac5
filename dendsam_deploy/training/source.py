"""Labelled volumes to learn from: which slices teach, which judge, and at which scale."""

from __future__ import annotations

import dataclasses
import math
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.errors import DendsamError, InvalidArgumentError, VolumeError
from dendsam_deploy.training.boxes import plan_zoom, slice_blocks, slices_text, split_blocks
from dendsam_deploy.training.samples import MIN_OBJECT_PX, LabelledVolume, TileRecipe
from dendsam_deploy.volume.open import open_labels, open_volume

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from dendsam_deploy.training.options import DataOptions
    from dendsam_deploy.training.volume_list import LabelledPaths
    from dendsam_deploy.volume.volume import VolumeReader


@dataclass(frozen=True, slots=True)
class TrainingSource:
    """One labelled volume to learn from: the slices to train on, those to judge by, and how tiles are cut.

    Parameters
    ----------
    train : LabelledVolume
        Slices that teach.
    held_out : LabelledVolume or None
        Slices that judge; None for a volume that only teaches.
    recipe : TileRecipe
        How tiles are cut.
    weight : float
        How often it is drawn from, relative to the others.
    model_pixel_size_nm : float or None
        Size of a model pixel, where the volume records its voxel size.
    name : str
        What a report calls it.
    is_dense : bool
        Whether pixels without a label show no object. Where some objects have no label, only what holds for each
        labelled object by itself may be learnt.
    """

    train: LabelledVolume
    held_out: LabelledVolume | None
    recipe: TileRecipe
    weight: float = 1.0
    model_pixel_size_nm: float | None = None
    name: str = ""
    is_dense: bool = True


@contextmanager
def open_sources(
    volumes: Sequence[LabelledPaths], options: DataOptions, tile_size_px: int, least_px: float = MIN_OBJECT_PX
) -> Iterator[tuple[TrainingSource, ...]]:
    """Open labelled volumes, divide the slices of each and choose their scales.

    Volumes whose pixel sizes are known are brought to one size of model pixels, because deployment goes by that size:
    the geometric mean of what would suit the objects of each, by their weights. The others are scaled by the size of
    their own objects.

    Parameters
    ----------
    volumes : sequence of LabelledPaths
        Images and instance labels of the same shape; closed again behind the block.
    options : DataOptions
        What holds for all volumes of which nothing else is said.
    tile_size_px : int
        Side S of the model's input.
    least_px : float
        Least area of an object in a slice, slice px.

    Raises
    ------
    InvalidArgumentError
        If the slices cannot be divided, or a volume that is named twice would judge what it teaches.
    VolumeError
        If a file cannot be used, or the slices for training or those held out show no object.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(_open(entry, options, tile_size_px, least_px)) for entry in volumes]
        sources = [dataclasses.replace(one, name=name) for one, name in zip(opened, _names(volumes), strict=True)]
        _check_apart(volumes, sources, options.gap)
        for volume in (part for source in sources for part in (source.train, source.held_out) if part is not None):
            volume.cache_bytes //= len(sources)  # together they keep no more than one would
        yield tuple(_to_common_scale(sources) if options.zoom is None else sources)


def recorded_scale(sources: Sequence[TrainingSource]) -> tuple[float, float | None]:
    """Return the zoom and the size of a model pixel, nm, that a checkpoint trained on these volumes is to record.

    Parameters
    ----------
    sources : sequence of TrainingSource
        At least one.

    Returns
    -------
    zoom : float
        Model px per slice px of the volume with the largest weight, the first of these.
    model_pixel_size_nm : float or None
        That of all volumes of which it is known; None where they differ or none is.
    """
    heaviest = max(sources, key=lambda source: source.weight)
    sizes = [source.model_pixel_size_nm for source in sources if source.model_pixel_size_nm is not None]
    agree = bool(sizes) and all(math.isclose(size, sizes[0], rel_tol=1e-6) for size in sizes)
    return heaviest.recipe.zoom, sizes[0] if agree else None


def judged_volumes(sources: Sequence[TrainingSource]) -> list[tuple[TrainingSource, LabelledVolume]]:
    """Return the sources that hold slices out, each with these slices."""
    return [(source, source.held_out) for source in sources if source.held_out is not None]


def hulls(sources: Sequence[TrainingSource]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return from where to where slices train and judge in the first volume that does both, as half-open ranges."""
    source, held_out = judged_volumes(sources)[0]
    train, judge = slice_blocks(source.train.slices), slice_blocks(held_out.slices)
    return (train[0][0], train[-1][1]), (judge[0][0], judge[-1][1])


@contextmanager
def _open(entry: LabelledPaths, options: DataOptions, tile_size_px: int, least_px: float) -> Iterator[TrainingSource]:
    """Open one volume; an error on the way there names the line that it stands in."""
    with ExitStack() as stack:
        try:
            image = stack.enter_context(open_volume(entry.volume, entry.voxel_size_nm or options.voxel_size_nm))
            labels = stack.enter_context(open_labels(entry.labels))
            source = _divided(entry, (image, labels), options, tile_size_px, least_px)
        except DendsamError as error:
            if not entry.place:
                raise
            raise type(error)(f"{entry.place}: {error}") from error
        yield source


def _divided(
    entry: LabelledPaths,
    opened: tuple[VolumeReader, VolumeReader],
    options: DataOptions,
    tile_size_px: int,
    least_px: float,
) -> TrainingSource:
    """Divide the slices of a volume and choose the scale that suits its objects."""
    image, labels = opened
    depth = image.info.shape_zyx[0]
    fraction = 0.0 if entry.only_teaches else options.holdout_fraction
    named = () if entry.only_teaches else entry.held_out or options.held_out
    train, judge = split_blocks(depth, fraction, options.gap, entry.slices or options.slices, named)
    if not judge and not entry.only_teaches:
        raise InvalidArgumentError("training needs slices to judge by, one of them held out at least; hold some out")
    if entry.train:
        train = _named_slices(train, entry)
    learn = LabelledVolume(image, labels, train, options.background_labels, least_px)
    held_out = LabelledVolume(image, labels, judge, options.background_labels, least_px) if judge else None
    areas = learn.object_areas()
    _require_objects(entry.labels, learn, areas)
    if held_out is not None:
        _require_objects(entry.labels, held_out, held_out.object_areas())
    zoom = options.zoom or plan_zoom(areas)
    voxel_size = image.info.voxel_size_nm
    # Training scales both axes alike. Where pixels are not square no one size describes what it saw, and deployment
    # has to go by the zoom.
    is_square = voxel_size is not None and voxel_size[1] == voxel_size[2]
    pixel_size_nm = voxel_size[1] / zoom if voxel_size is not None and is_square else None
    recipe = TileRecipe(tile_size_px, zoom, augment=options.augment)
    if options.augment == "none":
        recipe = dataclasses.replace(recipe, scale_octaves=0.0, stretch=0.0)
    return TrainingSource(learn, held_out, recipe, entry.weight, pixel_size_nm)


def _named_slices(allowed: Sequence[int], entry: LabelledPaths) -> Sequence[int]:
    """Return the slices that may train and that are named to."""
    named = {z for pair in entry.train for z in range(*pair)}
    train = tuple(z for z in allowed if z in named)
    if not train:
        raise InvalidArgumentError(
            f"{entry.volume}: none of the slices {slices_text(sorted(named))} that are to train may do so; "
            f"{slices_text(allowed)} may"
        )
    return train


def _names(volumes: Sequence[LabelledPaths]) -> list[str]:
    """Name each volume by its file, and by the folder too where another one has that name."""
    files = [entry.volume.name for entry in volumes]
    return [
        f"{entry.volume.resolve().parent.name}/{file}" if files.count(file) > 1 else file
        for entry, file in zip(volumes, files, strict=True)
    ]


def _require_objects(path: Path, volume: LabelledVolume, areas_px: NDArray[np.int64]) -> None:
    """Raise unless some slices show an object."""
    if not len(areas_px):
        raise VolumeError(
            f"{path}: no object of {volume.least_px:g} px or more in slices {slices_text(volume.slices)}; "
            "choose others with slices"
        )


def _check_apart(volumes: Sequence[LabelledPaths], sources: Sequence[TrainingSource], gap: int) -> None:
    """Raise where one of the volumes judges what another one, or its neighbour slice, teaches: they are the same."""
    if not any(source.held_out for source in sources):
        raise InvalidArgumentError("every volume only teaches; hold slices out of at least one of them to judge by")
    places = [{entry.volume.resolve(), entry.labels.resolve()} for entry in volumes]
    for judge, (source, paths) in enumerate(zip(sources, places, strict=True)):
        if source.held_out is None:
            continue
        near = {z + step for z in source.held_out.slices for step in range(-gap, gap + 1)}
        for teacher, other in enumerate(sources):
            if teacher == judge or not near & set(other.train.slices):
                continue
            if paths & places[teacher] or _show_the_same(source.held_out, other.train):
                named = " and ".join(entry.place or "the command line" for entry in (volumes[judge], volumes[teacher]))
                raise InvalidArgumentError(
                    f"{volumes[judge].volume} is named twice ({named}), and slices held out there "
                    f"({slices_text(source.held_out.slices)}) lie within {gap} of slices that train "
                    f"({slices_text(other.train.slices)}); name it once, or give both the same held-out slices"
                )


def _show_the_same(one: LabelledVolume, other: LabelledVolume) -> bool:
    """Tell whether two volumes, one of them perhaps a copy, show the same image in a slice that both may use."""
    for z in sorted(set(one.slices) & set(other.slices)):
        image = one[z].image
        if image.min() < image.max():  # blank slices are alike in all volumes
            return np.array_equal(image, other[z].image)
    return False


def _to_common_scale(sources: Sequence[TrainingSource]) -> list[TrainingSource]:
    """Bring all volumes whose pixel size is known to the same size of model pixels."""
    known = [source for source in sources if source.model_pixel_size_nm is not None]
    if len(known) < 2:
        return list(sources)
    sizes_nm = np.array([source.model_pixel_size_nm for source in known], float)
    common_nm = float(np.exp(np.average(np.log(sizes_nm), weights=[source.weight for source in known])))
    return [_rescaled(source, common_nm) for source in sources]


def _rescaled(source: TrainingSource, model_pixel_size_nm: float) -> TrainingSource:
    """Return a source at another size of model pixels; one without a known size stays as it is."""
    if source.model_pixel_size_nm is None:
        return source
    zoom = source.recipe.zoom * source.model_pixel_size_nm / model_pixel_size_nm
    recipe = dataclasses.replace(source.recipe, zoom=zoom)
    return dataclasses.replace(source, recipe=recipe, model_pixel_size_nm=model_pixel_size_nm)
