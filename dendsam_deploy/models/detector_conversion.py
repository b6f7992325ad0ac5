"""Turns an Ultralytics checkpoint into a plain description and plain arrays: the part that runs in a closed process.

No class of the file is needed for that: a module of torch is its state, whose parameters and children have fixed names.

References
----------
``torch.nn.Module.__setstate__``; ``ultralytics.nn.tasks`` for what its models keep.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from dendsam_deploy.errors import CheckpointError
from dendsam_deploy.models.detector_names import check_detector_names
from dendsam_deploy.models.inert_values import Name, Placeholder
from dendsam_deploy.models.plain_values import PlainValues
from dendsam_deploy.models.stored_tensor import StoredTensor
from dendsam_deploy.models.tensor_file import open_tensor_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ARRAYS_FILE, DESCRIPTION_FILE = "arrays.npz", "description.json"

_DEEPEST, _MOST_MODULES = 40, 20_000
_FIELDS = ("epoch", "date", "version", "license", "best_fitness", "dendsam")


def convert(source: Path, folder: Path) -> None:
    """Write the description and the arrays of a checkpoint into a folder.

    Raises
    ------
    CheckpointError
        If the file is damaged, or holds another kind of model.
    UnsafeFileError
        If it mentions what is no part of a network.
    """
    with open_tensor_file(source) as file:
        check_detector_names(source, file.pickled)
        content = file.pickled.value
        if not isinstance(content, dict):
            raise CheckpointError(f"{source}: holds a {_kind(content)}, expected an Ultralytics checkpoint")
        network = content.get("ema") or content.get("model")
        if not isinstance(network, Placeholder) or not isinstance(network.state, dict):
            kind = f"a {_kind(network)}" if network is not None else "tensors without a network, such as SAM weights"
            raise CheckpointError(f"{source}: holds {kind}, expected an Ultralytics detector (DetectionModel)")
        description = _describe(content, network)
        tensors = dict(_tensors(network))
        description["tensors"] = list(tensors)
        arrays = {f"t{index}": file.array(tensor) for index, tensor in enumerate(tensors.values())}
        with (folder / ARRAYS_FILE).open("wb") as out:
            np.savez(out, **arrays)  # type: ignore[arg-type]  # NumPy's stubs take a keyword of its own for one of these
    (folder / DESCRIPTION_FILE).write_text(json.dumps(description), encoding="utf-8")


def _describe(content: dict[Any, Any], network: Placeholder) -> dict[str, Any]:
    """Return everything about a network that is not a tensor."""
    state: dict[str, Any] = network.state if isinstance(network.state, dict) else {}
    modules = dict(_modules(network))
    layers = [module for name, module in modules.items() if name.startswith("model.") and name.count(".") == 1]
    plain = PlainValues()
    return {
        "class": network.maker.rpartition(".")[2],
        "head": layers[-1].maker.rpartition(".")[2] if layers else "",
        "description": plain.of(state.get("yaml")),
        "file": plain.of(state.get("yaml_file")),
        "names": plain.of(state.get("names")),
        "train_args": plain.of(_attributes(content.get("train_args"))),
        "fused": [name for name, module in modules.items() if _is_fused(module)],
        **{key: plain.of(content.get(key)) for key in _FIELDS},
    }


def _modules(root: Placeholder) -> Iterator[tuple[str, Placeholder]]:
    """Walk a network as ``named_modules`` does, each name with its module."""
    waiting, seen = [("", root, 0)], 0
    while waiting:
        name, module, depth = waiting.pop()
        seen += 1
        if depth > _DEEPEST or seen > _MOST_MODULES:
            raise CheckpointError("the network has more modules within one another than any detector")
        yield name, module
        children = _part(module, "_modules")
        waiting += [
            (f"{name}.{key}" if name else str(key), child, depth + 1)
            for key, child in reversed(children.items())
            if isinstance(child, Placeholder)
        ]


def _tensors(root: Placeholder) -> Iterator[tuple[str, StoredTensor]]:
    """Walk the tensors of a network as ``state_dict`` does."""
    for name, module in _modules(root):
        left_out = module.state.get("_non_persistent_buffers_set") if isinstance(module.state, dict) else None
        kept_out = left_out.arguments if isinstance(left_out, Placeholder) else left_out
        for part in ("_parameters", "_buffers"):
            for key, tensor in _part(module, part).items():
                if isinstance(tensor, StoredTensor) and not _mentions(kept_out, key):
                    yield (f"{name}.{key}" if name else str(key)), tensor


def _mentions(values: object, key: object) -> bool:
    """Tell whether a set, or the list in the arguments that one would have been made of, has a key."""
    if isinstance(values, tuple) and values and isinstance(values[0], list):
        values = values[0]
    return isinstance(values, set | list | tuple) and key in values


def _part(module: Placeholder, key: str) -> dict[Any, Any]:
    found = module.state.get(key) if isinstance(module.state, dict) else None
    return found if isinstance(found, dict) else {}


def _is_fused(module: Placeholder) -> bool:
    """Tell whether a layer was saved with its fused forward method in place of its own."""
    forward = module.state.get("forward") if isinstance(module.state, dict) else None
    return isinstance(forward, Name) and forward.dotted.endswith(".forward_fuse")


def _attributes(value: object) -> object:
    """Return the attributes of a namespace as a dict."""
    return value.state if isinstance(value, Placeholder) else value


def _kind(value: object) -> str:
    return value.maker if isinstance(value, Placeholder) else type(value).__name__
