"""At which size a detector sees the tiles of a SAM, so that objects appear to it as large as they did in training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dendsam_deploy.bundle.manifest import Preprocessing
    from dendsam_deploy.models.detector import YoloDetector


def detector_input_size(detector: YoloDetector, preprocessing: Preprocessing) -> int | None:
    """Return the side, in px, of the network's input for one tile.

    Parameters
    ----------
    detector : YoloDetector
        A loaded detector.
    preprocessing : Preprocessing
        How the bundle prepares tiles.

    Returns
    -------
    int or None
        A multiple of the network's coarsest stride. None for a detector that this program has not trained: it sees
        every image at the size that its own training used.
    """
    record = detector.record
    if record is None:
        return None
    network: Any = detector.network
    stride = int(max(network.model[-1].stride))
    # A detector that does not know its scale was trained on tiles like these.
    ratio = 1.0
    if record.model_pixel_size_nm is not None and preprocessing.model_pixel_size_nm is not None:
        ratio = preprocessing.model_pixel_size_nm / record.model_pixel_size_nm
    elif record.zoom is not None and preprocessing.zoom is not None:
        ratio = record.zoom / preprocessing.zoom
    return max(1, round(preprocessing.tile_size_px * ratio / stride)) * stride
