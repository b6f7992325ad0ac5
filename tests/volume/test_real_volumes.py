"""Real stacks: shapes, types, voxel sizes and published numbers."""

from __future__ import annotations

import numpy as np
import pytest

from dendsam_deploy.errors import VolumeError
from dendsam_deploy.volume.open import open_labels, open_volume

STACKS = {
    "em_fibsem_medulla/raw.tif": ((167, 250, 250), "uint8", (10, 10, 10)),
    "em_fibsem_medulla/neurites.tif": ((167, 250, 250), "uint32", (10, 10, 10)),
    "em_sstem_vnc/raw.tif": ((20, 512, 512), "uint8", (50, 4, 4)),
    "em_sstem_vnc/neurites.tif": ((20, 512, 512), "uint8", (50, 4, 4)),
    "em_sstem_vnc/mitochondria.tif": ((20, 512, 512), "uint8", (50, 4, 4)),
    "labels_mouse_v1/neurites.tif": ((512, 512, 512), "uint32", (40, 32, 32)),
}


@pytest.mark.parametrize("name", STACKS)
def test_stack_is_what_its_readme_says(name, shared_data):
    with open_volume(shared_data / name) as volume:
        info = volume.info
        assert (info.shape_zyx, info.dtype.name, info.voxel_size_nm) == STACKS[name]
        for z in (0, info.shape_zyx[0] - 1):
            assert volume.read(z).shape == info.shape_zyx[1:]


def test_number_of_objects_of_the_medulla(shared_data):
    with open_labels(shared_data / "em_fibsem_medulla/neurites.tif") as volume:
        slices = [volume.read(z) for z in range(volume.info.shape_zyx[0])]
    labels = set().union(*(np.unique(image).tolist() for image in slices))
    assert len(labels - {0}) == 393
    assert sum(int((image == 0).sum()) for image in slices) == 167


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("images/truck.jpg", "JPEG"),
        ("sam/mobile_sam_truncated.pt", "zip archive"),
        ("yolo/yolov8n_int8.onnx", "no image"),
        ("README.md", "text file"),
        ("images", "holds no slices"),
    ],
)
def test_other_real_files_are_refused(name, message, shared_data):
    with pytest.raises(VolumeError, match=message):
        open_volume(shared_data / name)
