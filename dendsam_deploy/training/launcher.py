"""Several processes that train one model together; the home of ``lightning_fabric``.

Each process learns from batches of its own; before every optimiser step the gradients are averaged over all, so that
every process has the same weights at any time. The first one judges and writes; it decides whatever depends on clocks.
"""

from __future__ import annotations

import signal
import threading
import warnings
from dataclasses import dataclass
from functools import partial
from multiprocessing import active_children
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
import torch.multiprocessing
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from dendsam_deploy.errors import DendsamError, IncompleteRunError, MissingCapabilityError
from dendsam_deploy.progress import no_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.queues import SimpleQueue

    from torch import nn

    from dendsam_deploy.progress import ProgressCallback
    from dendsam_deploy.training.sam_options import SamTrainingOptions

Value = TypeVar("Value")


class Team(Protocol):
    """The processes that train a model, as one of them sees it."""

    @property
    def rank(self) -> int:
        """Which of them this is; 0 judges and writes."""

    @property
    def size(self) -> int:
        """How many there are."""

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace the gradients of parameters by their means over all processes.

        A parameter that has a gradient in some processes only counts as zero in the others; one that has none anywhere
        is left without.
        """

    def mean(self, values: tuple[float, float]) -> tuple[float, float]:
        """Return the means of two numbers over all processes."""

    def agree(self, value: Value) -> Value:
        """Return the value of the first process."""


class Alone:
    """A team of one."""

    rank, size = 0, 1

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """See `Team`."""

    def mean(self, values: tuple[float, float]) -> tuple[float, float]:
        """See `Team`."""
        return values

    def agree(self, value: Value) -> Value:
        """See `Team`."""
        return value


class FabricTeam:
    """A team that Lightning Fabric has launched.

    Parameters
    ----------
    fabric : lightning_fabric.Fabric
        Of this process.
    """

    def __init__(self, fabric: Any) -> None:  # noqa: ANN401 - the library is optional
        self._fabric = fabric
        self.rank, self.size = int(fabric.global_rank), int(fabric.world_size)

    @torch.no_grad()
    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """See `Team`."""
        device = parameters[0].device
        has_gradient = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=device)
        anywhere = self._fabric.all_reduce(has_gradient, reduce_op="sum") > 0
        shared = [p for p, some in zip(parameters, anywhere.tolist(), strict=True) if some]
        for parameter in shared:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([p.grad.flatten() for p in shared if p.grad is not None])
        mean = self._fabric.all_reduce(flat, reduce_op="mean")
        for parameter, part in zip(shared, mean.split([p.numel() for p in shared]), strict=True):
            parameter.grad = part.view_as(parameter).clone()

    def mean(self, values: tuple[float, float]) -> tuple[float, float]:
        """See `Team`."""
        device = self._fabric.device
        first, second = self._fabric.all_reduce(torch.tensor(values, device=device), reduce_op="mean").tolist()
        return first, second

    def agree(self, value: Value) -> Value:
        """See `Team`."""
        result: Value = self._fabric.broadcast(value, src=0)
        return result


def run_in_team(
    work: Callable[..., Any], arguments: tuple[Any, ...], schedule: SamTrainingOptions, progress: ProgressCallback
) -> Any:  # noqa: ANN401 - whatever the work returns
    """Run a function in several new processes and return what it returns in the first.

    Parameters
    ----------
    work : callable
        A function of a module, called as ``work(team, progress, *arguments)``.
    arguments : tuple
        What can be pickled.
    schedule : SamTrainingOptions
        Its `devices` processes on its `device`, ``cpu`` or ``cuda``; on GPUs one for each.
    progress : callable
        Called here with the progress of the first process.

    Raises
    ------
    MissingCapabilityError
        If lightning-fabric is not installed, or there are fewer GPUs.
    DendsamError
        What the function raised; `IncompleteRunError` where a process died.
    """
    try:
        from lightning_fabric import Fabric  # noqa: PLC0415 - only several devices need it
    except ModuleNotFoundError as error:
        raise MissingCapabilityError(
            "training on several devices needs the package 'lightning_fabric', which is not installed here; "
            "run: pip install 'dendsam-deploy[train]'"
        ) from error
    accelerator = "cpu" if schedule.device == "cpu" else "cuda"
    if accelerator == "cuda" and schedule.devices > torch.cuda.device_count():
        raise MissingCapabilityError(
            f"{schedule.devices} GPUs were asked for, and torch sees {torch.cuda.device_count()} here; "
            "choose fewer devices"
        )
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    listener = _Listener(queue, progress)
    others = set(active_children())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about hosts and ports, which are not the user's
            fabric = Fabric(accelerator=accelerator, devices=schedule.devices, strategy="ddp_spawn")
            fabric.launch(partial(_member, work=work, arguments=arguments, queue=queue))
    except (ProcessRaisedException, ProcessExitedException) as error:
        listener.stop()
        if listener.failure is not None:
            raise listener.failure from error
        last = str(error).strip().splitlines()[-1]
        raise IncompleteRunError(f"a training process ended unexpectedly ({last}); run again to go on") from error
    finally:
        for child in set(active_children()) - others:
            child.terminate()  # an interruption may have reached this process alone
        listener.stop()
    if listener.broken is not None:
        raise listener.broken
    return listener.result


@dataclass(frozen=True, slots=True)
class _Result:
    """What the work returned in the first process."""

    value: Any


def _member(fabric: Any, work: Callable[..., Any], arguments: tuple[Any, ...], queue: SimpleQueue[Any]) -> None:  # noqa: ANN401 - the library is optional
    """Do the work in one process; the first one reports.

    Its result goes the way of the reports. What a process returns is read only when it has ended, and it does not end
    before all is read that does not fit into a pipe.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it, without a traceback
    try:
        is_first = fabric.global_rank == 0
        result = work(FabricTeam(fabric), queue.put if is_first else no_progress, *arguments)
        if is_first:
            queue.put(_Result(result))
    except DendsamError as error:
        queue.put(error)
        raise


class _Listener(threading.Thread):
    """Hands on what the first process reports, until it is stopped."""

    def __init__(self, queue: SimpleQueue[Any], progress: ProgressCallback) -> None:
        super().__init__(daemon=True)
        self._queue, self._progress = queue, progress
        self.failure: DendsamError | None = None
        self.result: Any = None
        self.broken: Exception | None = None
        self.start()

    def run(self) -> None:
        """Listen."""
        while (message := self._queue.get()) is not None:
            if isinstance(message, DendsamError):
                self.failure = self.failure or message
            elif isinstance(message, _Result):
                self.result = message.value
            elif self.broken is None:
                try:
                    self._progress(message)
                except Exception as error:
                    self.broken = error

    def stop(self) -> None:
        """End listening once everything has been heard."""
        if self.is_alive():
            self._queue.put(None)
            self.join()
