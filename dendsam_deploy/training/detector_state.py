"""What a detector's training needs to go on exactly where it was; ultralytics' own files round to half precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dendsam_deploy.errors import CheckpointError
from dendsam_deploy.models.weights import read_tensors, write_tensors

if TYPE_CHECKING:
    from pathlib import Path

STATE_FILE = "state.pt"
"""Its name in the folder of a training."""


def store_state(path: Path, trainer: Any) -> None:  # noqa: ANN401 - ultralytics' trainer is untyped
    """Write the state of a training behind an epoch; temporary name, then rename.

    Raises
    ------
    StorageError
        If the file system refuses.
    """
    content = {
        "epoch": int(trainer.epoch),
        "epochs": int(trainer.epochs),
        "batch": int(trainer.batch_size),
        "model": trainer.model.state_dict(),
        "average": trainer.ema.ema.state_dict(),
        "updates": int(trainer.ema.updates),
        "optimiser": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "best_fitness": None if trainer.best_fitness is None else float(trainer.best_fitness),
    }
    write_tensors(path, content)


def read_state(folder: Path) -> dict[str, Any] | None:
    """Read what `store_state` wrote into the folder of a training; None where there is nothing.

    Raises
    ------
    CheckpointError
        If the file is damaged.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        return None
    state = read_tensors(path)
    if not (isinstance(state.get("epoch"), int) and isinstance(state.get("epochs"), int)):
        raise CheckpointError(f"{path}: the state of an interrupted training is damaged; start anew with --no-resume")
    return state


def restore_state(trainer: Any, state: dict[str, Any]) -> None:  # noqa: ANN401 - as above
    """Let a trainer that is ready to begin go on behind the epoch of a state.

    Raises
    ------
    CheckpointError
        If the state belongs to another network.
    """
    try:
        trainer.model.load_state_dict(state["model"])
        trainer.ema.ema.load_state_dict(state["average"])
        trainer.optimizer.load_state_dict(state["optimiser"])
        trainer.scaler.load_state_dict(state["scaler"])
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"the state of an interrupted training does not fit the network ({str(error).splitlines()[0][:120]}); "
            "start anew with --no-resume"
        ) from error
    trainer.ema.updates = state["updates"]
    trainer.best_fitness = state["best_fitness"]
    trainer.start_epoch = state["epoch"] + 1
    trainer.scheduler.last_epoch = trainer.start_epoch - 1
