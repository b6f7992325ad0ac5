"""The detector: reads Ultralytics YOLO checkpoints without trusting them, and is the home of that library.

YOLOv8, YOLO11, YOLO26: github.com/ultralytics/ultralytics (AGPL-3.0; so are models made with it).
"""

from __future__ import annotations

import atexit
import copy
import dataclasses
import importlib
import logging
import os
import pickle
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dendsam_deploy.errors import CheckpointError, UnsafeFileError
from dendsam_deploy.models.pickled_names import pickled_names
from dendsam_deploy.models.weights import save_with_torch, sha256_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# ultralytics reads these once, when it is imported. It would otherwise install packages, look for updates, report its
# use, and keep settings (which decide about reporting) in the user's home.
_SETTINGS_FOLDER = tempfile.mkdtemp(prefix="dendsam-deploy-")
atexit.register(shutil.rmtree, _SETTINGS_FOLDER, ignore_errors=True)
os.environ.update(
    YOLO_AUTOINSTALL="false",
    YOLO_OFFLINE="true",
    YOLO_VERBOSE="false",
    YOLO_CONFIG_DIR=_SETTINGS_FOLDER,
    ULTRALYTICS_SAFE_LOAD="true",
)
_OMP_NUM_THREADS = os.environ.get("OMP_NUM_THREADS")
import ultralytics  # noqa: E402 - after the environment that it reads
from ultralytics.nn import tasks  # noqa: E402
from ultralytics.nn.modules import OBB, Detect  # noqa: E402
from ultralytics.utils import IterableSimpleNamespace  # noqa: E402

if _OMP_NUM_THREADS is None:
    os.environ.pop("OMP_NUM_THREADS", None)  # ultralytics sets it to 1, for every process started from here as well
logging.getLogger("ultralytics").setLevel(logging.CRITICAL)  # it logs to stdout, which belongs to results

RECORD_KEY = "dendsam"
COCO_IMAGE_SIZE_PX = 640

_TENSOR_NAMES = re.compile(
    r"torch\.(\w+Storage|Size|device|(b?float|u?int|complex)\d*\w*|double|half|long|bool)"
    r"|torch\._utils\._rebuild_\w+|torch\.nn\.parameter\.Parameter|collections\.OrderedDict|builtins\.set|_codecs\.encode"
)
_MODULE_CLASSES = re.compile(r"(torch\.nn\.modules|ultralytics\.nn\.modules)(\.\w+)*|ultralytics\.nn\.tasks")
_LOSS_CLASSES = re.compile(r"ultralytics\.utils\.(loss|tal)")
_NAMESPACE = re.compile(r"ultralytics\.(yolo\.)?utils\.IterableSimpleNamespace")
_PATH_CLASSES = re.compile(r"pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path")
_YAML_NAME = re.compile(r"yolo(v8|11|26)([nsmlx])(-p2|-p6)?\.yaml")


@dataclass(frozen=True, slots=True)
class DetectorRecord:
    """How a detector of ours came about.

    Parameters
    ----------
    tile_size_px : int
        Side of the tiles that it was trained on.
    model_pixel_size_nm : float or None
        Size of a tile pixel in training, where the training volume recorded its voxel size.
    zoom : float or None
        Tile px per slice px of the training volume.
    score_threshold : float or None
        Least score at which precision and recall balanced best on held-out tiles.
    summary : dict
        Plain values about the training: data, slices used and held out, scores, statistics of the boxes.
    """

    tile_size_px: int
    model_pixel_size_nm: float | None = None
    zoom: float | None = None
    score_threshold: float | None = None
    summary: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class YoloDetector:
    """A YOLO network in evaluation mode, float32, and what its checkpoint says about itself.

    Parameters
    ----------
    network : DetectionModel
        The network as ultralytics builds it, not fused.
    architecture : str
        Such as ``yolo11n``.
    image_size_px : int
        Side of the square images that it was trained on.
    class_names : tuple of str
        One name per class.
    record : DetectorRecord or None
        Present in checkpoints that this program trained.
    sha256 : str
        Digest of the file; empty for random weights of a named architecture.
    """

    network: nn.Module
    architecture: str
    image_size_px: int
    class_names: tuple[str, ...]
    record: DetectorRecord | None
    sha256: str


def load_detector(path: Path, seed: int = 0) -> YoloDetector:
    """Load a YOLO 8, 11 or 26 detector.

    Parameters
    ----------
    path : Path
        A ``.pt`` checkpoint; or the name of an architecture or a file of its description (``yolo11n.yaml``), which gets
        random weights.
    seed : int
        Decides about random weights.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged, or holds another kind of model.
    UnsafeFileError
        If the file names anything that is not part of a network.
    """
    if path.suffix in (".yaml", ".yml"):
        return _random_detector(path, seed)
    content = read_checkpoint(path)
    network = content.get("ema") or content.get("model")
    if not isinstance(network, tasks.DetectionModel):
        kind = (
            f"a {type(network).__name__}" if network is not None else "tensors without a network, such as SAM weights"
        )
        raise CheckpointError(f"{path}: holds {kind}, expected an Ultralytics detector (DetectionModel)")
    _check_head(network, path)
    arguments = content.get("train_args")
    trained_px = arguments.get("imgsz", COCO_IMAGE_SIZE_PX) if isinstance(arguments, dict) else COCO_IMAGE_SIZE_PX
    return YoloDetector(
        network=_ready(network),
        architecture=_architecture(network),
        image_size_px=int(max(trained_px) if isinstance(trained_px, list | tuple) else trained_px),
        class_names=_class_names(network),
        record=_record(content.get(RECORD_KEY), path),
        sha256=sha256_of(path),
    )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Unpickle a checkpoint that may name tensors and layers of networks, and nothing else.

    Two gates, one behind the other: the names in the pickle are compared with what belongs to a network before it is
    opened, and torch's restricted unpickler then knows no other names. Layers are rebuilt without calling their
    constructors, because a YOLO constructor evaluates strings of its description.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged or not a checkpoint.
    UnsafeFileError
        If it names anything else.
    """
    shells = {name: shell for name in sorted(pickled_names(path)) if (shell := _stand_in(name, path)) is not None}
    try:
        with torch.serialization.safe_globals([(shell, name) for name, shell in shells.items()]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not a readable Ultralytics checkpoint ({reason}); save it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected an Ultralytics checkpoint")
    for entry in content.values():
        if isinstance(entry, nn.Module):
            for module in entry.modules():
                if type(module) in shells.values():
                    module.__class__ = type(module).__mro__[1]
    return content


def save_detector(path: Path, trained: nn.Module, record: DetectorRecord) -> None:
    """Write a checkpoint of ours, half precision, that ultralytics reads too; temporary name, then rename.

    Raises
    ------
    StorageError
        If the file system refuses.
    """
    arguments = {"task": "detect", "imgsz": record.tile_size_px}
    network: Any = copy.deepcopy(trained).half()
    network.args = arguments  # those of a training hold paths of the machine that it ran on
    content = {
        "model": network,
        "train_args": arguments,
        "version": ultralytics.__version__,
        "license": "AGPL-3.0 (https://ultralytics.com/license)",
        RECORD_KEY: dataclasses.asdict(record),
    }
    save_with_torch(path, content)


def new_trainer(settings: Mapping[str, object]) -> Any:  # noqa: ANN401 - an untyped class of ultralytics
    """Return ultralytics' detection trainer; settings that name a file are the caller's to check."""
    # It brings half of the library along, which inference does not need.
    from ultralytics.models.yolo.detect import DetectionTrainer  # noqa: PLC0415 - see above

    # Reports of trainings to services, where their packages happen to be installed.
    services: Any = ultralytics.settings
    services.update(dict.fromkeys(("clearml", "comet", "dvc", "mlflow", "raytune"), False))
    make: Callable[..., Any] = DetectionTrainer
    return make(overrides=dict(settings))


def _random_detector(path: Path, seed: int) -> YoloDetector:
    """Build the network that a description names, with random weights."""
    description = _description(path)
    check_description(description, path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            network = _new_network(description)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{path}: describes no network that can be built ({error!r})") from error
    _check_head(network, path)
    return YoloDetector(_ready(network), path.stem, COCO_IMAGE_SIZE_PX, _class_names(network), None, "")


def _description(path: Path) -> dict[str, Any]:
    """Return the layers that a YAML file lists, or those of an architecture that ultralytics knows by name."""
    if not path.is_file() and _YAML_NAME.fullmatch(path.name) is None:
        raise CheckpointError(
            f"{path}: no such file, nor the name of an architecture; give a .pt file or a name such as yolo11n.yaml"
        )
    load: Callable[[Path], dict[str, Any]] = tasks.yaml_model_load
    try:
        return load(path if path.is_file() else Path(path.name))
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a YAML file of a network ({str(error).splitlines()[0][:100]})") from error


def check_description(description: Mapping[str, Any], path: Path) -> None:
    """Refuse the description of a network that names more than layers: ultralytics evaluates it.

    Parameters
    ----------
    description : mapping
        With ``backbone`` and ``head``, lists of ``[from, repeats, layer, arguments]``.
    path : Path
        For the message.

    Raises
    ------
    CheckpointError
        If it is not a description.
    UnsafeFileError
        If something in it is no layer.
    """
    try:
        names = [str(layer[2]) for part in ("backbone", "head") for layer in description[part]]
    except (KeyError, TypeError, IndexError) as error:
        raise CheckpointError(
            f"{path}: not the description of a network; expected the keys backbone and head"
        ) from error
    activation = str(description.get("activation") or "nn.SiLU()")
    if re.fullmatch(r"(torch\.)?nn\.\w+\([\w\s=.,-]*\)", activation) is None:
        raise UnsafeFileError(f"{path}: its activation {activation!r} is no layer of torch.nn; refused")
    for name in names:
        layer = getattr(nn, name.removeprefix("nn."), None) if name.startswith("nn.") else getattr(tasks, name, None)
        if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
            raise UnsafeFileError(f"{path}: {name!r} is no layer of torch or ultralytics; refused")


def _stand_in(name: str, path: Path) -> Callable[..., object] | None:
    """Return what a pickled name is resolved to; None where torch itself knows it as harmless.

    Raises
    ------
    UnsafeFileError
        If the name does not belong to a network.
    """
    module_name, _, attribute = name.rpartition(".")
    if _TENSOR_NAMES.fullmatch(name):
        return None
    if name == "builtins.getattr":
        return _forward_of
    if _PATH_CLASSES.fullmatch(name):
        return _joined
    if _NAMESPACE.fullmatch(name):
        return IterableSimpleNamespace  # holds the arguments of a training; its constructor only stores them
    # Names of v8.0, before the package was rearranged.
    module_name = module_name.replace("ultralytics.yolo.utils", "ultralytics.utils")
    if _MODULE_CLASSES.fullmatch(module_name) or _LOSS_CLASSES.fullmatch(module_name):
        try:
            original = getattr(importlib.import_module(module_name), attribute, None)
        except ImportError:
            original = None
        if original is None:
            raise CheckpointError(
                f"{path}: needs {name}, which ultralytics {ultralytics.__version__} lacks; update ultralytics"
            )
        is_loss = getattr(original, "__module__", "") == module_name and _LOSS_CLASSES.fullmatch(module_name)
        if isinstance(original, type) and (issubclass(original, nn.Module) or is_loss):
            return _shell(original)
    raise UnsafeFileError(
        f"{path}: would look up {name}, which is no part of a network; refused because opening it could run code"
    )


def _shell(original: type[Any]) -> type[Any]:
    """Return a subclass that can be rebuilt from its state but not constructed."""

    def refuse(self: object, *arguments: object) -> None:
        raise UnsafeFileError(
            f"the checkpoint would construct {original.__name__}; refused because that could run code"
        )

    return type(original.__name__, (original,), {"__init__": refuse, "__module__": original.__module__})


def _forward_of(owner: object, name: str) -> object:
    """Stand in for ``getattr``: checkpoints saved after inference refer to the forward method of a layer."""
    is_layer = isinstance(owner, nn.Module) or (isinstance(owner, type) and issubclass(owner, nn.Module))
    if not is_layer or name not in ("forward", "forward_fuse"):
        raise UnsafeFileError(
            f"the checkpoint would look up {name!r} of {owner!r:.60}; refused because that could run code"
        )
    return getattr(owner, name)


def _joined(*parts: str) -> str:
    """Stand in for a path class: nothing here opens files by paths of a checkpoint."""
    return "/".join(str(part) for part in parts)


def _ready(network: nn.Module) -> nn.Module:
    """Return a network in float32 and evaluation mode, repaired where older versions saved it otherwise."""
    for module in network.modules():
        if isinstance(module, nn.Upsample) and not hasattr(module, "recompute_scale_factor"):
            module.recompute_scale_factor = None
    return network.float().eval().requires_grad_(False)


def _new_network(description: dict[str, Any]) -> nn.Module:
    """Build a network with random weights."""
    build: Callable[..., nn.Module] = tasks.DetectionModel
    return build(description, verbose=False)


def _check_head(network: nn.Module, path: Path) -> None:
    """Raise unless a network ends in a head that predicts upright boxes."""
    *_, head = network.get_submodule("model").children()
    if not isinstance(head, Detect) or isinstance(head, OBB) or not hasattr(head, "cv2"):
        raise CheckpointError(
            f"{path}: its head is {type(head).__name__}, expected one that predicts upright boxes (Detect)"
        )


def _architecture(network: nn.Module) -> str:
    """Name a network's architecture as ultralytics does, or by its class."""
    description = getattr(network, "yaml", None)
    recorded = description.get("yaml_file") if isinstance(description, dict) else None
    file = recorded or getattr(network, "yaml_file", None)
    return Path(str(file)).stem if file else type(network).__name__


def _class_names(network: nn.Module) -> tuple[str, ...]:
    """Return the names of a network's classes."""
    names = getattr(network, "names", {})
    return tuple(str(name) for name in (names.values() if isinstance(names, dict) else names))


def _record(raw: object, path: Path) -> DetectorRecord | None:
    """Read our own record of a checkpoint's training, if it has one."""
    if raw is None:
        return None
    known = {entry.name for entry in dataclasses.fields(DetectorRecord)}
    if not isinstance(raw, dict) or raw.keys() - known or "tile_size_px" not in raw:
        raise CheckpointError(f"{path}: written by another version of dendsam-deploy; its record cannot be read")
    return DetectorRecord(**raw)
