"""Which names an Ultralytics checkpoint may mention, and which of them it may call."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from dendsam_deploy.errors import UnsafeFileError

if TYPE_CHECKING:
    from pathlib import Path

    from dendsam_deploy.models.inert_pickle import Unpickled

_DATA = (
    r"torch\.(\w+Storage|Size|device|(b?float|u?int|complex)\d*\w*|double|half|long|bool)",
    r"torch\.storage\.UntypedStorage|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2",
    r"torch\.nn\.parameter\.Parameter|collections\.OrderedDict|builtins\.set|_codecs\.encode",
    r"numpy(\._?core)?\.multiarray\.(scalar|_reconstruct)|numpy\.(dtype|ndarray)|numpy\.dtypes\.\w+DType",
    r"pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path",
)
# Layers, whose names of v8.0 had fewer parts, and losses that a training leaves at them. Functions are in lower case;
# some classes begin with the version that brought them.
_CLASS = r"(v\d+)?[A-Z]\w*"
_LAYER = (
    rf"(torch\.nn\.modules|ultralytics\.nn\.modules)(\.\w+)*\.{_CLASS}|ultralytics\.nn\.tasks\.{_CLASS}"
    rf"|ultralytics\.(yolo\.)?(utils\.(loss|tal)|v8\.\w+\.\w+)\.{_CLASS}"
)
_LEFT_BEHIND = r"ultralytics\.(yolo\.)?utils\.IterableSimpleNamespace"
_FORWARD = rf"({_LAYER})(\(\))?\.forward(_fuse)?"

_MENTIONED = re.compile("|".join((*_DATA, _LAYER, _LEFT_BEHIND, _FORWARD, r"builtins\.getattr")))
_CALLED = re.compile("|".join((*_DATA, _LEFT_BEHIND, r"builtins\.getattr")))


def check_detector_names(path: Path, pickled: Unpickled) -> None:
    """Refuse a checkpoint that mentions anything but tensors and layers of networks, or constructs a layer.

    A YOLO constructor evaluates strings of its description; layers in a proper checkpoint are rebuilt from their state.

    Raises
    ------
    UnsafeFileError
        With the name.
    """
    for name in sorted(pickled.names):
        if _MENTIONED.fullmatch(name) is None:
            raise UnsafeFileError(
                f"{path}: would look up {name}, which is no part of a network; "
                "refused because opening it could run code"
            )
    for name in sorted(pickled.calls):
        if _CALLED.fullmatch(name) is None:
            raise UnsafeFileError(f"{path}: would call {name}; refused because that could run code")
