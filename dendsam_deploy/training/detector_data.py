"""The order and the variation of training tiles as a function of seed and epoch alone.

ultralytics' own loader draws from generators that run on through a training, and joins tiles that it happened to load
before: after an interruption nobody could say where it was. Here every tile of every epoch has a generator of its own.
"""

from __future__ import annotations

import copy
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_LAST_PLAIN_EPOCHS = 3
"""The last epochs show whole tiles only, as deployment does, and none that are joined of four."""


class EpochSampler(Sampler[int]):
    """Draws some tiles of each epoch; what it yields names epoch and tile, see `RepeatableTiles`.

    Parameters
    ----------
    tiles : int
        Tiles to draw from.
    count : int
        Tiles to draw for an epoch.
    seed : int
        Source of the draw.
    epochs : callable
        Returns how many epochs there will be; asked at the beginning of each.
    """

    def __init__(self, tiles: int, count: int, seed: int, epochs: Callable[[], int]) -> None:
        self.tiles, self.count, self.seed, self._epochs = tiles, count, seed, epochs
        self.epoch = 0
        """The epoch that is drawn next."""

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        """Draw the next epoch without replacement."""
        epoch = self.epoch
        self.epoch += 1
        is_plain = epoch >= self._epochs() - _LAST_PLAIN_EPOCHS
        order = np.random.default_rng([self.seed, epoch]).permutation(self.tiles)[: self.count]
        first = (2 * epoch + is_plain) * self.tiles
        yield from (first + order).tolist()


class RepeatableTiles(Dataset[dict[str, Any]]):
    """ultralytics' training tiles, varied and joined depending on seed, epoch and tile alone.

    Parameters
    ----------
    tiles : Dataset
        ultralytics' dataset; everything that is not said here is its own.
    settings : namespace
        What ultralytics was told.
    seed : int
        Source of every random choice.
    """

    def __init__(self, tiles: Any, settings: Any, seed: int) -> None:  # noqa: ANN401 - untyped classes of ultralytics
        self.tiles, self.seed = tiles, seed
        plain = copy.copy(settings)
        plain.mosaic = 0.0
        self.joined = _without_guests(tiles.transforms)
        self.plain = _without_guests(tiles.build_transforms(plain))

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - as above
        if name == "tiles":  # not yet there while it is unpickled
            raise AttributeError(name)
        return getattr(self.tiles, name)

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a tile of an epoch as `EpochSampler` names it."""
        turn, tile = divmod(index, len(self.tiles))
        epoch, is_plain = divmod(turn, 2)
        _seed_everything(np.random.SeedSequence([self.seed, epoch, tile]))
        # Partners to join with come from what the dataset keeps of earlier tiles: let that be all of them, anew.
        self.tiles.buffer = list(range(len(self.tiles)))
        self.tiles.ims = [None] * len(self.tiles)
        transforms = self.plain if is_plain else self.joined
        varied: dict[str, Any] = transforms(self.tiles.get_image_and_label(tile))
        return varied


def _without_guests(transforms: Any) -> Any:  # noqa: ANN401 - an untyped class of ultralytics
    """Drop what ultralytics adds where another library happens to be installed: results must not depend on that."""
    transforms.transforms = [step for step in transforms.transforms if type(step).__name__ != "Albumentations"]
    return transforms


def _seed_everything(seed: np.random.SeedSequence) -> None:
    """Seed the generators that ultralytics' variations draw from."""
    words = seed.generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))  # noqa: NPY002 - ultralytics draws from the global generator
    torch.manual_seed(int(words[2]))
