"""The packaged demonstration weights; see MODEL_CARD.md beside them."""

from __future__ import annotations

from pathlib import Path

PACKAGED_SAM = Path(__file__).parent / "sam_tiny.pt"
"""A `tiny` SAM that knows boxes: the start of `finetune sam --model tiny` and the model of `demo`."""

PACKAGED_DETECTOR = Path(__file__).parent / "detector.pt"
"""A small YOLO detector of dendrite profiles: the start of `finetune detector` and the detector of `demo`."""
