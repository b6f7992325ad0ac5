"""Export Segment Anything and a detector to ONNX, prove the graphs, and segment whole EM volumes with them."""

__version__ = "0.1.0"
