"""What rounds of pseudo-labelling are asked for, and which slices serve what; known without loading torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.errors import InvalidArgumentError, VolumeError
from dendsam_deploy.evaluate.mask_choice import MaskCriteria
from dendsam_deploy.training.boxes import slices_text
from dendsam_deploy.training.sam_options import SamTrainingOptions

if TYPE_CHECKING:
    from pathlib import Path

    from dendsam_deploy.models.architectures import ModelType
    from dendsam_deploy.volume.volume import VolumeReader

_HELD_OUT_PART = 0.15
"""Part of the labelled slices, their last block, that judges where nothing is said."""

Block = tuple[int, int]


@dataclass(frozen=True, slots=True)
class RoundsOptions:
    """How train -> pseudo-label -> train is repeated.

    Parameters
    ----------
    out : Path
        Folder of all rounds.
    rounds : int
        Most rounds with pseudo-labels. Round 0 has none; it is what the others are compared with.
    labelled_slices, unlabelled_slices, held_out_slices : (int, int) or None
        Half-open ranges that train with true labels, that are pseudo-labelled, and that judge and never train. None:
        the slices that show labels, but for the last 15 % of these, which judge; all others are unlabelled.
    calibration_slices : (int, int) or None
        Labelled slices that choose the thresholds of the masks in every round, and neither train nor judge. None: the
        thresholds are those of `criteria`.
    wanted_precision : float
        Precision of the kept masks on the calibration slices.
    criteria : MaskCriteria
        Thresholds of the masks without calibration slices.
    gap : int
        Slices on either side of a held-out one that serve nothing.
    model_type : str
        Architecture.
    start : Path or None
        Checkpoint that every round starts from; needed for the official architectures.
    image_size : int or None
        Side of the model's input, px; None: that of the starting weights.
    carry_on : bool
        Start each round from the weights of the one before in place of `start`. Rounds then differ by the length of
        their training, too, and a gain is not that of the pseudo-labels alone.
    schedule : SamTrainingOptions
        Length and kind of each round's training, alike for all.
    detector : Path or None
        Checkpoint or ONNX that finds the boxes, as `export --detector` takes it. None: one is trained on the labelled
        slices first, once for all rounds.
    detector_minutes : float
        Time for that.
    background_labels : tuple of int
        Labels that are not objects, such as a membrane class.
    voxel_size_nm : (float, float, float) or None
        Overrides what the file records.
    pseudo_weight : float
        How often pseudo-labels are drawn from, true labels being 1.
    least_gain : float
        Gain in the held-out score, over the best round so far, that counts as one.
    patience : int
        Rounds in a row without a gain after which to stop.
    restart : bool
        Discard earlier rounds in the same folder.
    """

    out: Path
    rounds: int = 3
    labelled_slices: Block | None = None
    unlabelled_slices: Block | None = None
    held_out_slices: Block | None = None
    calibration_slices: Block | None = None
    wanted_precision: float = 0.9
    criteria: MaskCriteria = field(default_factory=MaskCriteria)
    gap: int = 2
    model_type: ModelType = "tiny"
    start: Path | None = None
    image_size: int | None = None
    carry_on: bool = False
    schedule: SamTrainingOptions = field(default_factory=SamTrainingOptions)
    detector: Path | None = None
    detector_minutes: float = 20.0
    background_labels: tuple[int, ...] = ()
    voxel_size_nm: tuple[float, float, float] | None = None
    pseudo_weight: float = 0.5
    least_gain: float = 0.002
    patience: int = 1
    restart: bool = False

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.patience < 1 or self.gap < 0:
            raise InvalidArgumentError(
                f"{self.rounds} rounds, a patience of {self.patience} and a gap of {self.gap}; expected at least 1, 1 "
                "and 0"
            )
        if not 0 < self.wanted_precision <= 1:
            raise InvalidArgumentError(
                f"the wanted precision is {self.wanted_precision}, expected more than 0 and at most 1"
            )
        if not (self.pseudo_weight > 0 and self.detector_minutes > 0 and self.least_gain >= 0):
            raise InvalidArgumentError(
                f"a weight of {self.pseudo_weight}, {self.detector_minutes} minutes for the detector and a least gain "
                f"of {self.least_gain}; expected more than 0, more than 0, and 0 or more"
            )


@dataclass(frozen=True, slots=True)
class SliceRoles:
    """Which slices serve what; no slice serves twice, and none near a held-out one serves anything.

    Parameters
    ----------
    labelled, calibration, held_out, unlabelled : tuple of int
        Ascending.
    """

    labelled: tuple[int, ...]
    calibration: tuple[int, ...]
    held_out: tuple[int, ...]
    unlabelled: tuple[int, ...]

    def texts(self) -> dict[str, str]:
        """Return the slices of each role as one would type them."""
        return {name: slices_text(getattr(self, name)) or "none" for name in self.__slots__}

    def looked_at(self) -> Block:
        """Return the range of slices in which masks are sought: the unlabelled ones, and those that calibrate."""
        wanted = sorted({*self.unlabelled, *self.calibration})
        return wanted[0], wanted[-1] + 1


def plan_roles(labels: VolumeReader, options: RoundsOptions) -> SliceRoles:
    """Decide which slices serve what.

    Parameters
    ----------
    labels : VolumeReader
        True labels of the whole volume, 0 in slices that nobody labelled.
    options : RoundsOptions
        What was asked for.

    Raises
    ------
    InvalidArgumentError
        If ranges overlap or leave the volume, or nothing is left for a role.
    VolumeError
        If no slice is labelled.
    """
    depth = labels.info.shape_zyx[0]
    shown = tuple(z for z in range(depth) if _shows(labels, z, options.background_labels))
    if not shown:
        raise VolumeError(f"{labels.info.source}: no slice shows an object; label some sections first")
    calibration = _within(options.calibration_slices, depth, "calibration")
    held_out = _within(options.held_out_slices, depth, "held-out")
    if options.held_out_slices is None:
        left = [z for z in shown if z not in calibration]
        held_out = tuple(left[len(left) - max(1, round(_HELD_OUT_PART * len(left))) :])
    near = {z + step for z in held_out for step in range(-options.gap, options.gap + 1)}
    labelled = _within(options.labelled_slices, depth, "labelled")
    if options.labelled_slices is None:
        labelled = tuple(z for z in shown if z not in near and z not in calibration)
    unlabelled = _within(options.unlabelled_slices, depth, "unlabelled")
    if options.unlabelled_slices is None:
        unlabelled = tuple(z for z in range(depth) if z not in {*near, *labelled, *calibration})
    roles = SliceRoles(labelled, calibration, held_out, unlabelled)
    _check(roles, near, set(shown), options.gap)
    return roles


def _shows(labels: VolumeReader, z: int, background: tuple[int, ...]) -> bool:
    """Tell whether a slice shows an object."""
    return bool((~np.isin(labels.read(z), (0, *background))).any())


def _within(block: Block | None, depth: int, name: str) -> tuple[int, ...]:
    """Return the slices of a range, which lies in the volume."""
    if block is None:
        return ()
    if not 0 <= block[0] < block[1] <= depth:
        raise InvalidArgumentError(
            f"the {name} slices {block[0]}:{block[1]} do not lie in a volume of {depth} slices; give a part of "
            f"0:{depth}"
        )
    return tuple(range(*block))


def _check(roles: SliceRoles, near: set[int], shown: set[int], gap: int) -> None:
    """Raise where a role has no slice, or slices serve two roles or lie too near to those that judge."""
    texts = roles.texts()
    for name in ("labelled", "calibration", "held_out"):
        if not shown & set(getattr(roles, name)) and getattr(roles, name):
            raise InvalidArgumentError(f"the {name.replace('_', '-')} slices {texts[name]} show no labelled object")
    for name in ("labelled", "calibration", "unlabelled"):
        if clash := sorted(near & set(getattr(roles, name))):
            raise InvalidArgumentError(
                f"slices {slices_text(clash)} are {name} and lie within {gap} of the held-out slices "
                f"{texts['held_out']}; what judges must not be near what teaches"
            )
    for one, other in (("labelled", "unlabelled"), ("labelled", "calibration"), ("unlabelled", "calibration")):
        if clash := sorted(set(getattr(roles, one)) & set(getattr(roles, other))):
            raise InvalidArgumentError(f"slices {slices_text(clash)} are both {one} and {other}; give each one role")
    said = ", ".join(f"{name}: {text}" for name, text in texts.items())
    for name in ("labelled", "held_out", "unlabelled"):
        if not getattr(roles, name):
            raise InvalidArgumentError(
                f"no slice is left for the role {name.replace('_', '-')} ({said}, {gap} apart); name other ranges, "
                "or a smaller gap"
            )


def data_line(volume: Path, labels: Path, roles: SliceRoles) -> str:
    """Return the line of a list of volumes that trains on the labelled slices and judges by the held-out ones."""
    train, judge = slices_text(roles.labelled), slices_text(roles.held_out)
    quoted = (f'"{path.resolve()}"' for path in (volume, labels))
    return f"{' '.join(quoted)} train={train} held-out={judge}\n"
