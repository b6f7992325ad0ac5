"""What is measured: slices with a known number of objects, and a detector that works but finds just these."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.instances import Detections

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType
    from typing import Self

    from numpy.typing import NDArray

    from dendsam_deploy.bundle.manifest import GraphSpec
    from dendsam_deploy.pipeline.prepare import TilePlan
    from dendsam_deploy.runtimes.runner import Runner, Tensor
    from dendsam_deploy.runtimes.session import Session

_SMALLEST_PX, _LARGEST_PX = 24.0, 160.0
_MOST_OF_CELL = 1.25


def spread_boxes(size_hw: tuple[int, int], count: int, seed: int = 0) -> NDArray[np.float32]:
    """Return boxes of the sizes of dendrites, spread over an image without hiding each other.

    Centres lie in the cells of a lattice; sides are drawn from 24 to 160 px, small ones more often, but are not much
    longer than a cell: many objects of a slice are small ones.

    Parameters
    ----------
    size_hw : (int, int)
        Height and width of the image, model px.
    count : int
        Number of boxes.
    seed : int
        Same arguments, same boxes.

    Returns
    -------
    ndarray, shape (count, 4), float32
        Corners ``(x0, y0, x1, y1)``, inside the image.
    """
    rng = np.random.default_rng(seed)
    height, width = size_hw
    columns = max(1, int(np.ceil(np.sqrt(count * width / height))))
    rows = -(-count // columns)
    cell = np.array([width / columns, height / max(rows, 1)])
    place = np.stack([np.arange(count) % columns, np.arange(count) // columns], axis=1)
    centres = (place + rng.uniform(0.4, 0.6, (count, 2))) * cell
    sides = np.exp(rng.uniform(np.log(_SMALLEST_PX), np.log(_LARGEST_PX), (count, 2)))
    sides = np.clip(np.minimum(sides, _MOST_OF_CELL * cell), 2.0, None)
    corners = np.concatenate([centres - sides / 2, centres + sides / 2], axis=1)
    boxes: NDArray[np.float32] = np.clip(corners, 0, np.array([width, height, width, height])).astype(np.float32)
    return boxes


def spread_detections(plan: TilePlan, count: int, seed: int = 0) -> Detections:
    """Return `spread_boxes` for the slices of a volume, in slice px."""
    boxes = plan.frame.boxes_to_slice(spread_boxes(plan.frame.model_hw, count, seed))
    return Detections(boxes.astype(np.float32), np.ones(count, np.float32))


@dataclass(frozen=True, slots=True)
class SpreadBoxes:
    """A source of boxes that are the same in every slice; for bundles without a detector."""

    detections: Detections

    def for_slice(self, z: int) -> Detections:
        """Return the boxes of slice `z`."""
        return self.detections

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None


class FixedDetector:
    """A detector that does all its work and then answers with given boxes.

    Random weights find nothing or everything, and trained ones what is there: neither allows a benchmark with a chosen
    number of objects.

    Parameters
    ----------
    runner : Runner
        The detector.
    plan : TilePlan
        How slices are cut; the tiles of a slice must come in their order.
    detections : Detections
        The boxes of every slice, slice px.
    """

    def __init__(self, runner: Runner, plan: TilePlan, detections: Detections) -> None:
        self._runner = runner
        self._answers = _answers(plan, detections)
        self._next_tile = 0

    @property
    def spec(self) -> GraphSpec:
        """Those of the detector."""
        return self._runner.spec

    @property
    def engine(self) -> str:
        """That of the detector."""
        return self._runner.engine

    @property
    def device(self) -> str:
        """That of the detector."""
        return self._runner.device

    @property
    def borrows_outputs(self) -> bool:
        """Its answers are its own; what the detector returned is dropped."""
        return False

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, NDArray[np.generic]]:
        """Run the detector and answer with the boxes of these tiles, in tile px."""
        self._runner.run(inputs)  # type: ignore[arg-type]  # what it takes is what the caller found it to take
        wanted = [(self._next_tile + k) % len(self._answers) for k in range(inputs["tiles"].shape[0])]
        self._next_tile = (wanted[-1] + 1) % len(self._answers)
        most = max(len(boxes) for boxes in self._answers)
        boxes = np.zeros((len(wanted), most, 4), np.float32)
        scores = np.zeros((len(wanted), most), np.float32)
        for row, tile in enumerate(wanted):
            found = self._answers[tile]
            boxes[row, : len(found)], scores[row, : len(found)] = found, 1.0
        return {"boxes": boxes, "scores": scores}

    def __getattr__(self, name: str) -> object:
        """Have what else the detector has: one that keeps tensors on its device (`runner.keeps_tensors`) still does."""
        return getattr(self._runner, name)

    def __enter__(self) -> Self:
        self._runner.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._runner.__exit__(kind, error, traceback)


def with_fixed_boxes(session: Session, plan: TilePlan, detections: Detections) -> Session:
    """Return a session whose detector, if it has one, works but finds just these boxes in every slice."""
    if session.detector is None:
        return session
    return replace(session, detector=FixedDetector(session.detector, plan, detections))


def _answers(plan: TilePlan, detections: Detections) -> list[NDArray[np.float32]]:
    """Return the boxes that each tile owns, in its own px."""
    owner = plan.owners(detections.boxes_xyxy)
    boxes = plan.frame.boxes_to_model(detections.boxes_xyxy)
    return [
        boxes[owner == index] - np.array([tile.read.x0, tile.read.y0] * 2, np.float32)
        for index, tile in enumerate(plan.tiles)
    ]
