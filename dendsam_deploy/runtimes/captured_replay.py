"""Programs on a GPU that are recorded once and replayed from then on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Program = Callable[..., tuple[torch.Tensor, ...]]
"""Takes and returns tensors of the device; what it returned is valid until the next program is executed."""


class Recorder:
    """Records programs on a GPU into memory that they share.

    None of the recordings needs what another left there: their results are copied before the next one is replayed.
    """

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()

    def record(self, program: Program, inputs: tuple[torch.Tensor, ...]) -> Recording:
        """Execute a program aside, which compiles it and fills the caches of libraries, then record it."""
        held = tuple(value.clone() for value in inputs)
        main = torch.cuda.current_stream()
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch declares no types here
        aside.wait_stream(main)
        with torch.cuda.stream(aside):
            for _ in range(2):
                program(*held)
        main.wait_stream(aside)
        recording = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recording, self._memory, capture_error_mode="thread_local"):
            outputs = program(*held)
        return Recording(recording, held, outputs)


@dataclass(frozen=True, slots=True)
class Recording:
    """What a GPU replays, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]


class Replayed:
    """A program that is recorded when it is first executed: replaying it costs one launch instead of hundreds."""

    def __init__(self, program: Program, recorder: Recorder) -> None:
        self._program, self._recorder = program, recorder
        self._recording: Recording | None = None

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Execute the program on copies of the inputs."""
        if self._recording is None:
            self._recording = self._recorder.record(self._program, inputs)
        for held, given in zip(self._recording.inputs, inputs, strict=True):
            held.copy_(given)
        self._recording.graph.replay()
        return self._recording.outputs
