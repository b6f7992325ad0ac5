"""A finished run to report on, made by the pipeline with synthetic graphs."""

import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

sys.path.append(str(Path(__file__).parents[1] / "pipeline"))

from pages import FIRST_Z, STOP_Z, VOXEL_NM
from synthetic_session import draw_discs, make_session

from dendsam_deploy.pipeline.run import SegmentOptions, segment_volume


@pytest.fixture(scope="session")
def stack(tmp_path_factory):
    """Three dendrites along z; slices 7 and 8 are empty."""
    path = tmp_path_factory.mktemp("volume") / "CA1 <b>&.tif"
    discs = [(24, 20, 9), (70, 80, 11), (30, 70, 6)]
    drawn = [draw_discs((96, 110), [(y, x + z, r) for y, x, r in discs]) for z in range(7)]
    tifffile.imwrite(path, np.stack([*drawn, *[np.zeros_like(drawn[0])] * 2]))
    return path


def segment(stack, out, **options):
    return segment_volume(stack, make_session(), SegmentOptions(out=out, **options)).out


@pytest.fixture(scope="session")
def run_folder(stack, tmp_path_factory):
    """Slices 2 to 7 of the stack, segmented; tests leave it as it is."""
    return segment(stack, tmp_path_factory.mktemp("run") / "out", slices=(FIRST_Z, STOP_Z), voxel_size_nm=VOXEL_NM)


@pytest.fixture(scope="session")
def unscaled_run_folder(stack, tmp_path_factory):
    """The same without a voxel size, and one slice only."""
    return segment(stack, tmp_path_factory.mktemp("run") / "out", slices=(0, 1))


@pytest.fixture(scope="session")
def empty_run_folder(stack, tmp_path_factory):
    """A run that found nothing."""
    return segment(stack, tmp_path_factory.mktemp("run") / "out", slices=(7, 9))
