"""Export Segment Anything and a detector to ONNX, prove the graphs, and segment whole EM volumes with them.

Everything public is here, and is imported when it is first asked for: importing the package itself costs nothing, and
what fine-tunes or exports needs the extra ``train``.

Examples
--------
>>> from dendsam_deploy import Bundle, SegmentOptions, SessionOptions, open_session, segment_volume
>>> with open_session(Bundle.open("exports/ca1"), SessionOptions()) as session:  # doctest: +SKIP
...     result = segment_volume("ca1.tif", session, SegmentOptions())
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dendsam_deploy.bundle.bundle import Bundle as Bundle
    from dendsam_deploy.bundle.latency import LatencyReport as LatencyReport
    from dendsam_deploy.bundle.parity import ParityReport as ParityReport
    from dendsam_deploy.errors import BundleError as BundleError
    from dendsam_deploy.errors import CheckpointError as CheckpointError
    from dendsam_deploy.errors import DendsamError as DendsamError
    from dendsam_deploy.errors import IncompleteRunError as IncompleteRunError
    from dendsam_deploy.errors import InputFileError as InputFileError
    from dendsam_deploy.errors import InvalidArgumentError as InvalidArgumentError
    from dendsam_deploy.errors import MissingCapabilityError as MissingCapabilityError
    from dendsam_deploy.errors import ParityError as ParityError
    from dendsam_deploy.errors import StorageError as StorageError
    from dendsam_deploy.errors import UnsafeFileError as UnsafeFileError
    from dendsam_deploy.errors import VolumeError as VolumeError
    from dendsam_deploy.evaluate.comparison_report import Comparison as Comparison
    from dendsam_deploy.evaluate.labelled_slices import CompareOptions as CompareOptions
    from dendsam_deploy.evaluate.latency import benchmark_bundle as benchmark_bundle
    from dendsam_deploy.evaluate.latency_plan import BenchmarkOptions as BenchmarkOptions
    from dendsam_deploy.evaluate.parity import VerifyOptions as VerifyOptions
    from dendsam_deploy.evaluate.parity import verify_bundle as verify_bundle
    from dendsam_deploy.evaluate.prompt_comparison import compare_prompts as compare_prompts
    from dendsam_deploy.evaluate.pseudo_labels import PseudoLabels as PseudoLabels
    from dendsam_deploy.evaluate.pseudo_labels import pseudo_label_volume as pseudo_label_volume
    from dendsam_deploy.evaluate.pseudo_options import PseudoLabelOptions as PseudoLabelOptions
    from dendsam_deploy.evaluate.rounds import run_rounds as run_rounds
    from dendsam_deploy.evaluate.rounds_options import RoundsOptions as RoundsOptions
    from dendsam_deploy.evaluate.rounds_record import RoundsResult as RoundsResult
    from dendsam_deploy.evaluate.score_report import EvaluateOptions as EvaluateOptions
    from dendsam_deploy.evaluate.score_report import ScoreReport as ScoreReport
    from dendsam_deploy.evaluate.scores import evaluate_labels as evaluate_labels
    from dendsam_deploy.export.bundle import export_bundle as export_bundle
    from dendsam_deploy.export.options import ExportOptions as ExportOptions
    from dendsam_deploy.pipeline.job import SegmentOptions as SegmentOptions
    from dendsam_deploy.pipeline.record import SegmentResult as SegmentResult
    from dendsam_deploy.pipeline.run import segment_volume as segment_volume
    from dendsam_deploy.progress import Progress as Progress
    from dendsam_deploy.report.run_folder import report_from_run as report_from_run
    from dendsam_deploy.runtimes.session import Session as Session
    from dendsam_deploy.runtimes.session import SessionOptions as SessionOptions
    from dendsam_deploy.runtimes.session import open_session as open_session
    from dendsam_deploy.training.detector import DetectorTrainingResult as DetectorTrainingResult
    from dendsam_deploy.training.detector import finetune_detector as finetune_detector
    from dendsam_deploy.training.finetune import FinetunedSam as FinetunedSam
    from dendsam_deploy.training.finetune import finetune_sam as finetune_sam
    from dendsam_deploy.training.options import DetectorSchedule as DetectorSchedule
    from dendsam_deploy.training.options import DetectorTrainingOptions as DetectorTrainingOptions
    from dendsam_deploy.training.sam_options import FinetuneSamOptions as FinetuneSamOptions
    from dendsam_deploy.training.sam_options import SamTrainingOptions as SamTrainingOptions
    from dendsam_deploy.volume.boxes import open_boxes as open_boxes
    from dendsam_deploy.volume.open import open_labels as open_labels
    from dendsam_deploy.volume.open import open_volume as open_volume
    from dendsam_deploy.volume.phantom import PhantomOptions as PhantomOptions
    from dendsam_deploy.volume.phantom import make_phantom as make_phantom

__version__ = "0.1.0"

_HOMES = {
    "BenchmarkOptions": "evaluate.latency_plan",
    "Bundle": "bundle.bundle",
    "BundleError": "errors",
    "CheckpointError": "errors",
    "CompareOptions": "evaluate.labelled_slices",
    "Comparison": "evaluate.comparison_report",
    "DendsamError": "errors",
    "DetectorSchedule": "training.options",
    "DetectorTrainingOptions": "training.options",
    "DetectorTrainingResult": "training.detector",
    "EvaluateOptions": "evaluate.score_report",
    "ExportOptions": "export.options",
    "FinetuneSamOptions": "training.sam_options",
    "FinetunedSam": "training.finetune",
    "IncompleteRunError": "errors",
    "InputFileError": "errors",
    "InvalidArgumentError": "errors",
    "LatencyReport": "bundle.latency",
    "MissingCapabilityError": "errors",
    "ParityError": "errors",
    "ParityReport": "bundle.parity",
    "PhantomOptions": "volume.phantom",
    "Progress": "progress",
    "PseudoLabelOptions": "evaluate.pseudo_options",
    "PseudoLabels": "evaluate.pseudo_labels",
    "RoundsOptions": "evaluate.rounds_options",
    "RoundsResult": "evaluate.rounds_record",
    "SamTrainingOptions": "training.sam_options",
    "ScoreReport": "evaluate.score_report",
    "SegmentOptions": "pipeline.job",
    "SegmentResult": "pipeline.record",
    "Session": "runtimes.session",
    "SessionOptions": "runtimes.session",
    "StorageError": "errors",
    "UnsafeFileError": "errors",
    "VerifyOptions": "evaluate.parity",
    "VolumeError": "errors",
    "benchmark_bundle": "evaluate.latency",
    "compare_prompts": "evaluate.prompt_comparison",
    "evaluate_labels": "evaluate.scores",
    "export_bundle": "export.bundle",
    "finetune_detector": "training.detector",
    "finetune_sam": "training.finetune",
    "make_phantom": "volume.phantom",
    "open_boxes": "volume.boxes",
    "open_labels": "volume.open",
    "open_session": "runtimes.session",
    "open_volume": "volume.open",
    "pseudo_label_volume": "evaluate.pseudo_labels",
    "report_from_run": "report.run_folder",
    "run_rounds": "evaluate.rounds",
    "segment_volume": "pipeline.run",
    "verify_bundle": "evaluate.parity",
}
"""Where each public name lives; the imports above say the same to type checkers."""

__all__ = list(_HOMES)


if not TYPE_CHECKING:  # a type checker that saw this would let every misspelt name pass

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value: object = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return __all__
