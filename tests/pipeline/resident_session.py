"""A session whose tensors stay on a device that exists only in name, and a record of all that crosses its bus."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from dendsam_deploy.bundle.manifest import GraphSpec
    from dendsam_deploy.runtimes.runner import Runner
    from dendsam_deploy.runtimes.session import Session


@dataclass(frozen=True)
class FarTensor:
    """Rows of an array that nobody else looks into."""

    hidden: NDArray[np.generic]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.hidden.shape

    @property
    def dtype(self) -> np.dtype[np.generic]:
        return self.hidden.dtype

    def __getitem__(self, rows: slice) -> FarTensor:
        return FarTensor(self.hidden[rows])

    def numpy(self) -> NDArray[np.generic]:
        raise AssertionError("this tensor was to stay on its device")


@dataclass
class Bus:
    """What went up and came down, as (role, name of the tensor, number of rows)."""

    up: list[tuple[str, str, int]] = field(default_factory=list)
    down: list[tuple[str, str, int]] = field(default_factory=list)


@dataclass
class FarRunner:
    """A runner of the host that pretends to be far away."""

    near: Runner
    bus: Bus
    rows_per_call: int = 3
    engine: str = "far"
    device: str = "far:0"
    borrows_outputs: bool = False

    @property
    def spec(self) -> GraphSpec:
        return self.near.spec

    def run(self, inputs: Mapping[str, NDArray[np.generic] | FarTensor]) -> dict[str, NDArray[np.generic]]:
        outputs = self._outputs(inputs)
        self.bus.down += [(self.spec.role, name, len(values)) for name, values in outputs.items()]
        return outputs

    def run_into(self, inputs: Mapping[str, NDArray[np.generic] | FarTensor], outputs: Mapping[str, FarTensor]) -> None:
        for name, values in self._outputs(inputs).items():
            outputs[name].hidden[...] = values

    def upload(self, array: NDArray[np.generic]) -> FarTensor:
        self.bus.up.append((self.spec.role, "upload", len(array)))
        return FarTensor(array.copy())

    def allocate(self, output: str, rows: int) -> FarTensor:
        shape = next(tensor.shape for tensor in self.spec.outputs if tensor.name == output)
        return FarTensor(np.full((rows, *shape[1:]), np.nan, np.float32))

    def _outputs(self, inputs: Mapping[str, NDArray[np.generic] | FarTensor]) -> dict[str, NDArray[np.generic]]:
        near = {name: value.hidden if isinstance(value, FarTensor) else value for name, value in inputs.items()}
        self.bus.up += [(self.spec.role, name, len(value)) for name, value in inputs.items() if value is near[name]]
        return self.near.run(near)

    def __enter__(self) -> FarRunner:
        return self

    def __exit__(self, *error: object) -> None:
        return None


def move_away(session: Session, bus: Bus, roles: tuple[str, ...] = ("detector", "encoder", "decoder")) -> Session:
    """Return a session of which some runners are far away."""
    return replace(session, **{role: FarRunner(getattr(session, role), bus) for role in roles})
