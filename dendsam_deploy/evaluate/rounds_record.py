"""What rounds of pseudo-labelling came to: one record for each round, and the verdict over all of them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dendsam_deploy.durable import write_text
from dendsam_deploy.errors import InputFileError
from dendsam_deploy.evaluate.compare_scores import bootstrap_interval

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

LEAST_JUDGING_SLICES = 3
"""Held-out slices below which no gain is told from chance: fewer have no spread to speak of."""

ROUND_FILE = "round.json"
"""Written last into the folder of a round."""


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """A finished round.

    Parameters
    ----------
    number : int
        0 is the model that was trained on true labels alone.
    checkpoint, bundle : str
        Paths relative to the folder of all rounds.
    box_iou : tuple of float
        Mean IoU of the masks of exact boxes with their objects, for each held-out slice.
    pq : tuple of float
        Panoptic quality of the automatic result, for each held-out slice.
    masks, kept : int
        Masks that were found in the slices to pseudo-label, and those that were kept and taught; 0 in round 0.
    mask_precision : float or None
        Part of right ones among the kept masks of the calibration slices, left out of the choice where that could be
        measured; None where there are no such slices.
    steps : int
        Training steps.
    seconds : float
        Duration of the round.
    """

    number: int
    checkpoint: str
    bundle: str
    box_iou: tuple[float, ...]
    pq: tuple[float, ...]
    masks: int
    kept: int
    mask_precision: float | None
    steps: int
    seconds: float

    @property
    def score(self) -> float:
        """Mean over the held-out slices of the IoU from exact boxes: what is being trained, and what decides."""
        return float(np.mean(self.box_iou))

    @property
    def automatic(self) -> float:
        """Mean over the held-out slices of the panoptic quality of the automatic result."""
        return float(np.mean(self.pq))

    def write(self, folder: Path, fingerprint: str) -> None:
        """Write the record of a finished round into its folder."""
        write_text(folder / ROUND_FILE, json.dumps({"fingerprint": fingerprint, **asdict(self)}, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path, fingerprint: str) -> RoundRecord | None:
        """Read the record of a round; None where the round is not finished or belongs to other settings.

        Raises
        ------
        InputFileError
            The record is damaged.
        """
        path = folder / ROUND_FILE
        if not path.is_file():
            return None
        try:
            document = json.loads(path.read_bytes())
            if document.pop("fingerprint") != fingerprint:
                return None
            return cls(**{**document, "box_iou": tuple(document["box_iou"]), "pq": tuple(document["pq"])})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputFileError(f"{path}: is damaged ({error!r}); delete it to do the round again") from error


def rounds_without_gain(scores: Sequence[float], least_gain: float) -> int:
    """Return how many of the last rounds in a row did not gain enough over the best one before them.

    Parameters
    ----------
    scores : sequence of float
        Held-out score of each round, from round 0, which has nothing to gain over.
    least_gain : float
        Gain that counts.

    Examples
    --------
    >>> rounds_without_gain([0.60, 0.65, 0.64, 0.651], 0.002)
    2
    """
    stalled = 0
    for number in range(1, len(scores)):
        stalled = 0 if scores[number] >= max(scores[:number]) + least_gain else stalled + 1
    return stalled


@dataclass(frozen=True, slots=True)
class RoundsResult:
    """All rounds.

    Parameters
    ----------
    out : Path
        Their folder.
    records : tuple of RoundRecord
        The rounds, from 0.
    slices : dict
        Slices of each role, as one would type them.
    reason : str
        Why there are no more rounds.
    wanted : int
        Rounds that were asked for.
    fingerprint : str
        Digest of everything that decides the result, but for the number of rounds.
    notices : tuple of str
        What a careful person should know.
    """

    out: Path
    records: tuple[RoundRecord, ...]
    slices: dict[str, str]
    reason: str
    wanted: int
    fingerprint: str
    notices: tuple[str, ...]

    @property
    def best(self) -> RoundRecord:
        """The round with the highest score, of equals the earlier one."""
        return max(self.records, key=lambda record: (record.score, -record.number))

    @property
    def gain(self) -> tuple[float, float, float]:
        """Gain of the best round over round 0, and the ends of its 95 % interval over held-out slices."""
        difference = np.array(self.best.box_iou) - np.array(self.records[0].box_iou)
        return float(difference.mean()), *bootstrap_interval(difference)

    @property
    def improved(self) -> bool:
        """Whether a round with pseudo-labels is better than round 0 by more than chance would explain."""
        return self.best.number > 0 and self.gain[1] > 0 and len(self.best.box_iou) >= LEAST_JUDGING_SLICES

    def verdict(self) -> str:
        """Say in plain words whether the rounds were worth it."""
        first, best = self.records[0], self.best
        if len(self.records) == 1:
            return f"No round with pseudo-labels was made: {self.reason}."
        if best.number == 0:
            rivals = max(record.score for record in self.records[1:])
            return (
                f"The rounds did not improve the model: without pseudo-labels the mean IoU from exact boxes on the "
                f"held-out slices is {first.score:.3f}, with them at most {rivals:.3f}. Keep round 0."
            )
        gain, low, high = self.gain
        text = (
            f"Round {best.number} is the best: mean IoU {best.score:.3f} from exact boxes on the held-out slices, "
            f"{first.score:.3f} without pseudo-labels; {gain:+.3f} ({low:+.3f} to {high:+.3f} over slices)"
        )
        if len(best.box_iou) < LEAST_JUDGING_SLICES:
            return f"{text}, which may be chance: hold out {LEAST_JUDGING_SLICES} slices or more to tell."
        return f"{text}." if self.improved else f"{text}, which may be chance."

    def to_document(self) -> dict[str, Any]:
        """Return everything as JSON values, with the keys of ``rounds --json``."""
        gain, low, high = self.gain
        return {
            "out": str(self.out),
            "verdict": self.verdict(),
            "improved": self.improved,
            "best_round": self.best.number,
            "best_checkpoint": str(self.out / self.best.checkpoint),
            "best_bundle": str(self.out / self.best.bundle),
            "gain": {"mean": gain, "low": low, "high": high},
            "reason": self.reason,
            "rounds_wanted": self.wanted,
            "slices": self.slices,
            "rounds": [
                {**asdict(record), "held_out_box_iou": record.score, "held_out_pq": record.automatic}
                for record in self.records
            ],
            "fingerprint": self.fingerprint,
            "notices": list(self.notices),
        }
