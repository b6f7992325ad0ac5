"""Several labelled volumes for one training: slices that never leak, one physical scale, errors that name the line."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import tifffile

from dendsam_deploy.errors import InvalidArgumentError, VolumeError
from dendsam_deploy.training.boxes import slice_blocks
from dendsam_deploy.training.options import DataOptions
from dendsam_deploy.training.source import hulls, open_sources, recorded_scale
from dendsam_deploy.training.volume_list import LabelledPaths, read_volume_list

OPTIONS = DataOptions(gap=1)


def write(folder, name, side_px=12, pixel_nm=None, depth=12):
    """Write a volume with squares of a given side, of pixels of a given size."""
    labels = np.zeros((depth, 64, 96), np.uint16)
    for number, (y, x) in enumerate([(4, 4), (4, 50), (34, 4), (34, 50)], start=1):
        labels[:, y : y + side_px, x : x + side_px] = number
    # Every volume has a grey of its own, as no two pieces of tissue look the same.
    raw = np.where(labels > 0, 200, 60 + sum(name.encode()) % 50).astype(np.uint8)
    for kind, stack in (("raw", raw), ("labels", labels)):
        physical = {} if pixel_nm is None else {"resolution": (1000 / pixel_nm,) * 2}
        metadata = {"axes": "ZYX"} | ({"unit": "um", "spacing": 0.04} if pixel_nm else {})
        tifffile.imwrite(folder / f"{name}-{kind}.tif", stack, imagej=True, metadata=metadata, **physical)
    return LabelledPaths(folder / f"{name}-raw.tif", folder / f"{name}-labels.tif")


def test_each_volume_is_divided_by_itself(tmp_path):
    one = write(tmp_path, "one")
    two = dataclasses.replace(write(tmp_path, "two", depth=20), slices=(0, 18), held_out=((4, 6),), weight=3.0)
    three = dataclasses.replace(write(tmp_path, "three", depth=3), only_teaches=True)
    with open_sources([one, two, three], OPTIONS, 64) as sources:
        train = [slice_blocks(source.train.slices) for source in sources]
        assert train == [((0, 9),), ((0, 3), (7, 18)), ((0, 3),)]
        assert [source.held_out and slice_blocks(source.held_out.slices) for source in sources] == [
            ((10, 12),),
            ((4, 6),),
            None,
        ]
        assert [source.weight for source in sources] == [1, 3, 1]
        assert [source.name for source in sources] == ["one-raw.tif", "two-raw.tif", "three-raw.tif"]
        assert hulls(sources) == ((0, 9), (10, 12))
        with pytest.raises(InvalidArgumentError, match="slice 5 is none of the slices 0:3\\+7:18 in use"):
            sources[1].train[5]
        budgets = {part.cache_bytes for source in sources for part in (source.train, source.held_out) if part}
        assert budgets == {(2 << 30) // 3}


def test_volumes_of_known_pixel_size_share_one_scale(tmp_path):
    """Objects of 12 px of 20 nm and of 24 px of 10 nm are equally large, so both volumes get the same model pixels."""
    coarse, fine = write(tmp_path, "coarse", 12, 20.0), write(tmp_path, "fine", 24, 10.0)
    unknown = write(tmp_path, "unknown", 24)
    with open_sources([coarse, fine, unknown], OPTIONS, 64) as sources:
        sizes = [source.model_pixel_size_nm for source in sources]
        assert sizes[0] == pytest.approx(sizes[1])
        assert sizes[2] is None
        assert sources[0].recipe.zoom == pytest.approx(2 * sources[1].recipe.zoom)
        assert sources[2].recipe.zoom == pytest.approx(sources[1].recipe.zoom)
        zoom, pixel_nm = recorded_scale(sources)
        assert (zoom, pixel_nm) == (sources[0].recipe.zoom, pytest.approx(sizes[0]))


def test_the_common_scale_is_a_mean_by_weight(tmp_path):
    """Alone the volumes would have model pixels of 5 and 10 nm; one weighs three times as much as the other."""
    coarse = write(tmp_path, "coarse", 22, 20.0)
    fine = dataclasses.replace(write(tmp_path, "fine", 22, 10.0), weight=3.0)
    alone = []
    for entry in (coarse, fine):
        with open_sources([entry], OPTIONS, 64) as (source,):
            alone.append(source.model_pixel_size_nm)
            assert source.recipe.zoom == 2.0
    assert alone == pytest.approx([10.0, 5.0])
    with open_sources([coarse, fine], OPTIONS, 64) as sources:
        assert [source.model_pixel_size_nm for source in sources] == pytest.approx([10**0.25 * 5**0.75] * 2)
        for source, pixel_nm in zip(sources, (20, 10), strict=True):
            assert source.recipe.zoom * source.model_pixel_size_nm == pytest.approx(pixel_nm)
    with open_sources([coarse, fine], dataclasses.replace(OPTIONS, zoom=1.5), 64) as sources:
        assert [source.recipe.zoom for source in sources] == [1.5, 1.5]
        assert recorded_scale(sources) == (1.5, None)  # one number cannot tell both


def test_one_volume_under_two_names_does_not_leak(tmp_path):
    entry = write(tmp_path, "one")
    first, rest = dataclasses.replace(entry, slices=(0, 6)), dataclasses.replace(entry, slices=(6, 12))
    message = r"named twice .* slices held out there \(5:6\) lie within 1 of slices"
    with pytest.raises(InvalidArgumentError, match=message), open_sources([first, rest], OPTIONS, 64):
        pass
    with pytest.raises(InvalidArgumentError, match="named twice"), open_sources([entry, entry, rest], OPTIONS, 64):
        pass
    apart = dataclasses.replace(entry, slices=(7, 12))
    with open_sources([first, apart], OPTIONS, 64) as sources:
        assert len(sources) == 2
    for path in (entry.volume, entry.labels):
        shutil.copy(path, tmp_path / f"copy-{path.name}")
    copy = LabelledPaths(tmp_path / "copy-one-raw.tif", tmp_path / "copy-one-labels.tif", only_teaches=True)
    with pytest.raises(InvalidArgumentError, match="named twice"), open_sources([entry, copy], OPTIONS, 64):
        pass
    only = dataclasses.replace(entry, only_teaches=True)
    with pytest.raises(InvalidArgumentError, match="every volume only teaches"), open_sources([only], OPTIONS, 64):
        pass


def test_volumes_of_one_name_are_told_apart(tmp_path):
    entries = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        entries.append(write(tmp_path / folder, "x", side_px=12 + len(entries)))
    with open_sources(entries, OPTIONS, 64) as sources:
        assert [source.name for source in sources] == ["a/x-raw.tif", "b/x-raw.tif"]


@pytest.mark.parametrize(
    ("line", "error", "part"),
    [
        ("none.tif one-labels.tif", VolumeError, "line 2: .*none.tif"),
        ("one-raw.tif two-labels.tif", VolumeError, "line 2: .*two-labels.tif: its shape"),
        ("one-raw.tif one-labels.tif slices=0:40", InvalidArgumentError, "line 2: slices 0:40 do not lie in a volume"),
        ("one-raw.tif one-labels.tif held-out=11:13", InvalidArgumentError, "line 2: slices 11:13 cannot be held out"),
    ],
)
def test_an_error_names_the_line_of_its_volume(tmp_path, line, error, part):
    write(tmp_path, "one")
    write(tmp_path, "two", depth=5)
    (tmp_path / "data.txt").write_text(f"two-raw.tif two-labels.tif held-out=none\n{line}\n")
    volumes = read_volume_list(tmp_path / "data.txt")
    with pytest.raises(error, match=f"data.txt: {part}"), open_sources(volumes, OPTIONS, 64):
        pass


@pytest.mark.parametrize("strength", ["none", "light", "em"])
def test_tiles_are_varied_as_wanted(tmp_path, strength):
    with open_sources([write(tmp_path, "one")], dataclasses.replace(OPTIONS, augment=strength), 64) as (source,):
        assert source.recipe.augment == strength
        assert (source.recipe.scale_octaves > 0) == (strength != "none")
    with pytest.raises(InvalidArgumentError, match="choose one of none, light, em"):
        DataOptions(augment="much")
