"""One slice from pixels to labelled objects, without any file: detect, encode, decode, paint."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.errors import InvalidArgumentError, MissingCapabilityError
from dendsam_deploy.instances import Detections, Instances, Masks
from dendsam_deploy.pipeline.claims import claim_from_logits, united
from dendsam_deploy.pipeline.clock import StageClock
from dendsam_deploy.pipeline.decode import BoxDecoder, DecodeOptions, boxes_in_tiles, decode_masks, encode_tiles
from dendsam_deploy.pipeline.detect import DetectOptions, clip_to_slice, detect_objects
from dendsam_deploy.pipeline.infer import on_device
from dendsam_deploy.pipeline.paint import PaintOptions, paint_masks
from dendsam_deploy.pipeline.prepare import PreparedSlice, TilePlan, plan_tiles, prepare_slice
from dendsam_deploy.pipeline.upsample import upsample_masks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dendsam_deploy.bundle.manifest import Manifest
    from dendsam_deploy.geometry import Window
    from dendsam_deploy.runtimes.runner import Runner
    from dendsam_deploy.runtimes.session import Session


@dataclass(frozen=True, slots=True)
class SliceOptions:
    """How a slice is segmented; None takes what the bundle's manifest says.

    Parameters
    ----------
    voxel_size_nm : (float, float, float) or None
        Voxel size ``(z, y, x)``; None where it is unknown.
    zoom : float or None
        Model px per slice px.
    detection_score : float or None
        Least detection score of a box, 0 to 1.
    nms_iou : float or None
        Largest IoU of two boxes of one slice, 0 to 1.
    min_area_px : float or None
        Least area of an object, slice px.
    """

    voxel_size_nm: tuple[float, float, float] | None = None
    zoom: float | None = None
    detection_score: float | None = None
    nms_iou: float | None = None
    min_area_px: float | None = None

    def __post_init__(self) -> None:
        for name in ("detection_score", "nms_iou"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise InvalidArgumentError(f"{name} is {value}, expected 0 to 1")
        if self.min_area_px is not None and not 0 <= self.min_area_px < math.inf:
            raise InvalidArgumentError(f"min_area_px is {self.min_area_px}, expected a number of 0 or more")


@dataclass(frozen=True, slots=True)
class SliceRecipe:
    """Everything that is decided before the first slice of a volume is seen; made by `make_recipe`."""

    plan: TilePlan
    detect: DetectOptions
    decode: DecodeOptions
    paint: PaintOptions


def make_recipe(slice_hw: tuple[int, int], manifest: Manifest, options: SliceOptions) -> SliceRecipe:
    """Settle how slices of a given shape are segmented.

    Raises
    ------
    InvalidArgumentError
        Where the zoom that follows from the voxel size is absurd.
    """
    plan = plan_tiles(slice_hw, manifest.preprocessing, options.voxel_size_nm, options.zoom)
    defaults = manifest.thresholds
    scale_y, scale_x = plan.frame.scale_yx
    min_area = defaults.min_area_px / (scale_y * scale_x) if options.min_area_px is None else options.min_area_px
    return SliceRecipe(
        plan,
        DetectOptions(
            score=defaults.detection_score if options.detection_score is None else options.detection_score,
            nms_iou=defaults.nms_iou if options.nms_iou is None else options.nms_iou,
        ),
        DecodeOptions(manifest.decoding),
        PaintOptions(mask_logit=defaults.mask_logit, min_area_px=min_area),
    )


def segment_slice(
    image_u8: NDArray[np.uint8], session: Session, detections: Detections | None, options: SliceOptions
) -> tuple[NDArray[np.uint32], Instances]:
    """Segment one slice.

    Parameters
    ----------
    image_u8 : ndarray, shape (Y, X), uint8
        The slice.
    session : Session
        An open session.
    detections : Detections or None
        Boxes in slice px that are taken as they are; None asks the session's detector.
    options : SliceOptions
        How.

    Returns
    -------
    labels : ndarray, shape (Y, X), uint32
        0 is background.
    instances : Instances
        The objects; row ``i`` has the label ``i + 1``.

    Raises
    ------
    MissingCapabilityError
        Where neither boxes nor a detector are there.
    ParityError
        Where a graph returns NaN or infinity.
    """
    recipe = make_recipe(_shape_hw(image_u8), session.manifest, options)
    return segment_prepared(prepare_slice(image_u8, recipe.plan), session, detections, recipe)


def segment_prepared(
    prepared: PreparedSlice,
    session: Session,
    detections: Detections | None,
    recipe: SliceRecipe,
    clock: StageClock | None = None,
) -> tuple[NDArray[np.uint32], Instances]:
    """Segment a slice that is already in the model's pixels; see `segment_slice`."""
    clock = clock or StageClock()
    detections, masks = find_masks(prepared, session, detections, recipe, clock)
    with clock.measure("paint"):
        return paint_masks(detections, masks, recipe.plan, recipe.paint)


def find_masks(
    prepared: PreparedSlice, session: Session, detections: Detections | None, recipe: SliceRecipe, clock: StageClock
) -> tuple[Detections, Masks]:
    """Run the graphs on a slice: what is left is to paint; see `segment_slice`."""
    with clock.measure("detect"):
        if detections is None:
            detector = require_detector(session)
            prepared = on_device(prepared, detector, session.encoder)
            detections = detect_objects(prepared, detector, recipe.detect)
        else:
            detections = clip_to_slice(detections, recipe.plan)
    return detections, _decode(prepared, session, detections, recipe, clock)


@dataclass(frozen=True, slots=True)
class BoxMask:
    """The mask that one box prompts, before it competes with others.

    Parameters
    ----------
    window : Window
        Where the mask lies, slice px; empty where the mask is.
    mask : ndarray, shape (window.height, window.width), bool
        Its pixels.
    predicted_iou : float
        The model's own estimate of the mask's IoU.
    """

    window: Window
    mask: NDArray[np.bool_]
    predicted_iou: float


def decode_boxes(
    image_u8: NDArray[np.uint8], session: Session, boxes_xyxy: NDArray[np.float32], options: SliceOptions
) -> list[BoxMask]:
    """Return what the model makes of each box by itself, for judging the graphs without the painting.

    Parameters
    ----------
    image_u8 : ndarray, shape (Y, X), uint8
        The slice.
    session : Session
        An open session; its detector is not used.
    boxes_xyxy : ndarray, shape (N, 4), float32
        Boxes inside the slice, at least one model px wide and high, slice px.
    options : SliceOptions
        Only the zoom matters.

    Returns
    -------
    list of BoxMask
        One for each box, in their order.

    Raises
    ------
    InvalidArgumentError
        For a box that is empty or lies outside the slice.
    """
    recipe = make_recipe(_shape_hw(image_u8), session.manifest, options)
    prepared = prepare_slice(image_u8, recipe.plan)
    given = Detections(boxes_xyxy, np.ones(len(boxes_xyxy), np.float32))
    detections = clip_to_slice(given, recipe.plan)
    if len(detections) < len(given):
        raise InvalidArgumentError(
            f"{len(given) - len(detections)} of {len(given)} boxes are empty or outside the slice of "
            f"{recipe.plan.frame.slice_hw} px; leave them out"
        )
    masks = _decode(prepared, session, detections, recipe, StageClock())
    threshold = recipe.paint.mask_logit
    claims = [claim_from_logits(patch, threshold) for patch in upsample_masks(masks, recipe.plan, threshold)]
    found = []
    for box in range(len(detections)):
        (parts,) = np.nonzero(masks.box_index == box)
        whole = united([claims[part] for part in parts])
        areas_px = [max(claims[part].area_px, 1) for part in parts]
        found.append(
            BoxMask(whole.window, whole.evidence > 0, float(np.average(masks.predicted_iou[parts], weights=areas_px)))
        )
    return found


def require_detector(session: Session) -> Runner:
    """Return the session's detector.

    Raises
    ------
    MissingCapabilityError
        Where the bundle has none.
    """
    if session.detector is None:
        raise MissingCapabilityError(
            f"the bundle {session.manifest.name!r} has no detector; give boxes with --boxes, "
            "or export the bundle again with --detector"
        )
    return session.detector


def _decode(
    prepared: PreparedSlice, session: Session, detections: Detections, recipe: SliceRecipe, clock: StageClock
) -> Masks:
    """Encode the tiles that look at a box, and decode all boxes; without boxes no graph runs."""
    if len(detections) == 0:
        return Masks(
            (), np.zeros((0, 2), np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.int64)
        )
    box_index, tile_index = recipe.plan.views(detections.boxes_xyxy)
    with clock.measure("encode"):
        embeddings = encode_tiles(prepared, tile_index, session.encoder, session.decoder)
    with clock.measure("decode"):
        boxes = boxes_in_tiles(detections.boxes_xyxy[box_index], tile_index, recipe.plan)
        return decode_masks(boxes, box_index, tile_index, embeddings, BoxDecoder(session.decoder, recipe.decode))


def _shape_hw(image: NDArray[np.uint8]) -> tuple[int, int]:
    """Return the shape of a slice."""
    if image.ndim != 2 or 0 in image.shape:
        raise InvalidArgumentError(f"a slice has the shape (Y, X) with at least one pixel, not {image.shape}")
    return image.shape[0], image.shape[1]
