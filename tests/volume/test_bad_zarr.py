"""Zarr groups and arrays that are no volume."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import zarr

RNG = np.random.default_rng(7)
STACK = RNG.integers(1, 200, (4, 40, 30), np.uint8)


def cut(path, keep: float):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    return path


def ome_zarr(folder, data: np.ndarray, **changes: object):
    path = folder / "v.zarr"
    axes = "tczyx"[-data.ndim :]
    multiscale = {
        "axes": [{"name": name, "type": "space"} for name in axes],
        "datasets": [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1.0] * data.ndim}]}],
    } | changes
    group = zarr.create_group(path, zarr_format=3, attributes={"ome": {"version": "0.5", "multiscales": [multiscale]}})
    group.create_array("0", data=data, chunks=(1,) * (data.ndim - 2) + data.shape[-2:])
    return path


def zarr_broken_json(folder):
    path = ome_zarr(folder, STACK)
    (path / "zarr.json").write_text('{"zarr_format": 3, "node')
    return path


def zarr_no_array(folder):
    path = ome_zarr(folder, STACK)
    shutil.rmtree(path / "0")
    return path


def zarr_channels(folder):
    return ome_zarr(folder, np.stack([STACK, STACK]))


def zarr_wrong_axis_order(folder):
    return ome_zarr(folder, STACK, axes=[{"name": name, "type": "space"} for name in "xyz"])


def zarr_too_few_axes(folder):
    return ome_zarr(folder, STACK, axes=[{"name": name, "type": "space"} for name in "yx"])


def zarr_no_datasets(folder):
    return ome_zarr(folder, STACK, datasets=[])


def zarr_escapes(folder):
    return ome_zarr(folder, STACK, datasets=[{"path": "../other.zarr/0"}])


def zarr_two_arrays(folder):
    group = zarr.create_group(folder / "v.zarr")
    group.create_array("a", data=STACK)
    group.create_array("b", data=STACK)
    return folder / "v.zarr"


def zarr_empty_group(folder):
    zarr.create_group(folder / "v.zarr")
    return folder / "v.zarr"


def zarr_plate(folder):
    zarr.create_group(folder / "v.zarr", attributes={"ome": {"plate": {"columns": []}}})
    return folder / "v.zarr"


def zarr_many_series(folder):
    group = zarr.create_group(folder / "v.zarr", zarr_format=2, attributes={"bioformats2raw.layout": 3})
    for name in "01":
        group.create_group(name)
    return folder / "v.zarr"


def zarr_zero_slices(folder):
    zarr.create_array(folder / "v.zarr", shape=(0, 10, 10), chunks=(1, 10, 10), dtype="u1")
    return folder / "v.zarr"


def zarr_one_dimension(folder):
    zarr.create_array(folder / "v.zarr", data=np.zeros(5))
    return folder / "v.zarr"


def zarr_complex(folder):
    zarr.create_array(folder / "v.zarr", data=STACK.astype(np.complex64))
    return folder / "v.zarr"


def zarr_bomb(folder):
    zarr.create_array(folder / "v.zarr", shape=(3, 200_000, 100_000), chunks=(1, 1000, 1000), dtype="u1")
    return folder / "v.zarr"


def zarr_absurd(folder):
    zarr.create_array(folder / "v.zarr", shape=(3, 10**9, 10**9), chunks=(1, 1000, 1000), dtype="u1")
    return folder / "v.zarr"


def zarr_absurdly_deep(folder):
    zarr.create_array(folder / "v.zarr", shape=(10**12, 10, 10), chunks=(1, 10, 10), dtype="u1")
    return folder / "v.zarr"


def zarr_damaged_chunk(folder):
    path = ome_zarr(folder, STACK)
    (path / "0/c/2/0/0").write_bytes(b"\x28\xb5\x2f\xfd garbage")
    return path


def zarr_cut_chunk(folder):
    path = ome_zarr(folder, STACK)
    cut(path / "0/c/1/0/0", 0.5)
    return path


def zarr_unknown_codec(folder):
    path = ome_zarr(folder, STACK)
    metadata = json.loads((path / "0/zarr.json").read_text())
    metadata["codecs"].append({"name": "no.such.codec", "configuration": {}})
    (path / "0/zarr.json").write_text(json.dumps(metadata))
    return path


def zarr_nan(folder):
    data = STACK.astype(np.float32)
    data[3] = np.nan
    return ome_zarr(folder, data)


BAD = {
    zarr_broken_json: ["reading its metadata failed"],
    zarr_no_array: ["lacks the array '0'"],
    zarr_channels: ["axis c", "length 2"],
    zarr_wrong_axis_order: ["axes x, y, z", "expected"],
    zarr_too_few_axes: ["names 2 axes"],
    zarr_no_datasets: ["reading its metadata failed"],
    zarr_escapes: ["'../other.zarr/0'", "inside"],
    zarr_two_arrays: ["2 arrays", "'a', 'b'"],
    zarr_empty_group: ["0 arrays"],
    zarr_plate: ["plate"],
    zarr_many_series: ["holds 2 images"],
    zarr_zero_slices: ["is empty"],
    zarr_one_dimension: ["axes"],
    zarr_complex: ["complex"],
    zarr_bomb: ["stored bytes claim to hold"],
    zarr_absurd: ["claims the shape"],
    zarr_absurdly_deep: ["claims the shape"],
    zarr_damaged_chunk: ["slice 2"],
    zarr_cut_chunk: ["slice 1"],
    zarr_unknown_codec: ["no.such.codec"],
    zarr_nan: ["slice 3", "NaN"],
}


@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
def test_bad_zarr_is_refused_in_one_line_that_names_it(make, tmp_path, assert_refused):
    assert_refused(make(tmp_path), BAD[make])
