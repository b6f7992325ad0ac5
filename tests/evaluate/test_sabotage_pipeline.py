"""The pipeline's own arithmetic, spoilt: no tensor of any graph shows it, and `verify` fails all the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from sabotage import failures

from dendsam_deploy.evaluate.compare_frames import compare_frames
from dendsam_deploy.evaluate.compare_preprocessing import compare_preprocessing, resampled_as_sam_does
from dendsam_deploy.evaluate.limits import METRICS
from dendsam_deploy.geometry import Frame, Tile, bilinear_matrix
from dendsam_deploy.pipeline import decode, detect, prepare, segment, upsample
from dendsam_deploy.pipeline.prepare import PreparedSlice, prepare_slice
from dendsam_deploy.volume import intensity
from dendsam_deploy.volume.raster import resize_bilinear


def broken(findings) -> set[str]:
    """Return the metrics that break their limit in fp32."""
    return {finding.metric for finding in findings if not METRICS[finding.metric].judge(finding.value, "fp32")[1]}


@pytest.fixture
def level_one(session, truth):
    def call() -> set[str]:
        manifest = session.manifest
        return broken([*compare_preprocessing(manifest.preprocessing, truth.inputs), *compare_frames(manifest)])

    return call


def test_the_pipeline_itself_passes(level_one):
    assert level_one() == set()


@pytest.mark.parametrize("shape_hw", [(40, 31), (201, 300), (90, 77), (1, 1), (111, 77)])
def test_the_oracle_of_resampling_is_pillow_to_the_byte(shape_hw):
    image = np.random.default_rng(2).integers(0, 256, (111, 77), np.uint8)
    np.testing.assert_array_equal(resampled_as_sam_does(image, shape_hw), resize_bilinear(image, shape_hw))


def without_antialiasing(image, shape_hw):
    """The way of OpenCV and of torch's default: four neighbours whatever the ratio."""
    rows, columns = (
        bilinear_matrix(length, (np.arange(wanted) + 0.5) * length / wanted, 0, 1)
        for length, wanted in zip(image.shape, shape_hw, strict=True)
    )
    return np.rint(rows @ image.astype(np.float32) @ columns.T).astype(np.uint8)


def corners_aligned(image, shape_hw):
    rows, columns = (
        bilinear_matrix(length, np.linspace(0.5, length - 0.5, wanted), 0, 1)
        for length, wanted in zip(image.shape, shape_hw, strict=True)
    )
    return np.rint(rows @ image.astype(np.float32) @ columns.T).astype(np.uint8)


def half_a_pixel_off(image, shape_hw):
    resized = resize_bilinear(image, shape_hw).astype(np.float32)
    return ((resized + np.roll(resized, 1, axis=1)) / 2).astype(np.uint8)


def bicubic(image, shape_hw):
    return np.asarray(Image.fromarray(image).resize(shape_hw[::-1], Image.Resampling.BICUBIC))


@pytest.mark.parametrize("resize", [without_antialiasing, corners_aligned, half_a_pixel_off, bicubic])
def test_another_resampling_is_found(level_one, monkeypatch, resize):
    monkeypatch.setattr(prepare, "resize_bilinear", resize)
    assert "bytes_differing" in level_one()


def rounded(image, name=""):
    low = image.min()
    return np.rint((image - low) / (image.max() - low) * 255.0).astype(np.uint8)


def by_percentile(image, name=""):
    low, high = np.percentile(image, [1, 99])
    return (np.clip((image - low) / (high - low), 0, 1) * 255).astype(np.uint8)


@pytest.mark.parametrize("stretch", [rounded, by_percentile])
def test_another_contrast_is_found(session, truth, monkeypatch, stretch):
    monkeypatch.setattr("dendsam_deploy.evaluate.compare_preprocessing.to_uint8", stretch)
    assert intensity.to_uint8 is not stretch
    assert "bytes_differing" in broken(compare_preprocessing(session.manifest.preprocessing, truth.inputs))


def test_padding_with_grey_is_found(session, truth, monkeypatch):
    def pad(image, plan) -> PreparedSlice:
        prepared = prepare_slice(image, plan)
        for tile, (height, width) in zip(prepared.tiles, prepared.sizes, strict=True):
            tile[height:] = 114
            tile[:, width:] = 114
        return prepared

    monkeypatch.setattr("dendsam_deploy.evaluate.compare_preprocessing.prepare_slice", pad)
    assert "bytes_differing" in broken(compare_preprocessing(session.manifest.preprocessing, truth.inputs))


def test_half_a_pixel_in_the_upsampling_is_found(level_one, session, truth, monkeypatch):
    def shifted(length, centres, origin, step):
        return bilinear_matrix(length, centres + 0.5, origin, step)

    monkeypatch.setattr(upsample, "bilinear_matrix", shifted)
    assert "drawn_objects_shift_px" in level_one()
    assert {"mask_iou_mean", "mask_iou_min"} <= failures(session, truth)


def test_half_a_pixel_in_the_boxes_is_found(level_one, monkeypatch):
    to_model = Frame.boxes_to_model
    monkeypatch.setattr(Frame, "boxes_to_model", lambda self, boxes: to_model(self, boxes) + np.float32(0.5))
    assert "drawn_objects_shift_px" in level_one()


def test_a_forgotten_scale_is_found(level_one, monkeypatch):
    monkeypatch.setattr(Frame, "boxes_to_slice", lambda self, boxes: boxes)
    assert "drawn_objects_lost" in level_one()


def test_boxes_in_the_frame_of_the_tile_are_found(level_one, monkeypatch):
    """Right in the first tile, wrong in all others."""
    monkeypatch.setattr(segment, "boxes_in_tiles", lambda boxes, tile_index, plan: plan.frame.boxes_to_model(boxes))
    assert "drawn_objects_lost" in level_one()


def test_detections_in_the_frame_of_the_tile_are_found(level_one, session, truth, monkeypatch):
    def owned(plan, index, boxes, scores, least_score):
        tile = plan.tiles[index]
        window = replace(tile.read, y0=0, x0=0)
        moved = replace(plan, tiles=(Tile(window, window),))
        return detect_owned(moved, 0, boxes, scores, least_score)

    detect_owned = detect._owned
    monkeypatch.setattr(detect, "_owned", owned)
    assert "drawn_objects_lost" in level_one()
    assert "detections_unmatched" in failures(session, truth)


def test_swapped_axes_of_tiles_are_found(level_one, monkeypatch):
    def swapped(boxes, tile_index, plan):
        corners = np.array([(tile.read.y0, tile.read.x0) * 2 for tile in plan.tiles], np.float32)[tile_index]
        return plan.frame.boxes_to_model(boxes) - corners

    monkeypatch.setattr(segment, "boxes_in_tiles", swapped)
    assert "drawn_objects_lost" in level_one()


def test_duplicates_that_are_kept_are_found(session, truth, monkeypatch):
    monkeypatch.setattr(detect, "suppress_duplicates", lambda found, limit: np.arange(len(found)))
    assert "detections_unmatched" in failures(session, truth)


def test_a_raised_threshold_is_found(session, truth, monkeypatch):
    claim = segment.claim_from_logits

    def stingy(patch, mask_logit):
        return claim(patch, mask_logit + 0.01 * float(patch.logits.std() if patch.logits.size else 0))

    monkeypatch.setattr("dendsam_deploy.evaluate.compare_masks.claim_from_logits", stingy)
    assert "mask_iou_mean" in failures(session, truth)


def test_regions_cropped_too_tight_are_found(level_one, monkeypatch):
    monkeypatch.setattr(decode, "region_cells", lambda box, margin_px, sizes: 1)
    assert {"drawn_objects_lost", "drawn_objects_shift_px"} & level_one()
