"""The detector: reads Ultralytics YOLO checkpoints without trusting them, and is the home of that library.

YOLOv8, YOLO11, YOLO26: github.com/ultralytics/ultralytics (AGPL-3.0; so are models made with it).
"""

from __future__ import annotations

import atexit
import builtins
import copy
import dataclasses
import logging
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dendsam_deploy.errors import CheckpointError, UnsafeFileError
from dendsam_deploy.models.detector_file import COCO_IMAGE_SIZE_PX, DetectorRecord, read_detector_file
from dendsam_deploy.models.weights import save_with_torch, sha256_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from dendsam_deploy.models.detector_file import DetectorFile

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
from ultralytics.nn import tasks  # noqa: E402 - likewise
from ultralytics.nn.modules import OBB, Conv, Detect  # noqa: E402 - likewise

if _OMP_NUM_THREADS is None:
    os.environ.pop("OMP_NUM_THREADS", None)  # ultralytics sets it to 1, for every process started from here as well
logging.getLogger("ultralytics").setLevel(logging.CRITICAL)  # it logs to stdout, which belongs to results

__all__ = [
    "COCO_IMAGE_SIZE_PX",
    "RECORD_KEY",
    "DetectorRecord",
    "YoloDetector",
    "check_description",
    "load_detector",
    "new_trainer",
    "save_detector",
]

RECORD_KEY = "dendsam"

# What building a network from an odd description, or fitting other weights into it, raises.
_BUILDING_ERRORS = (
    *(KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, AssertionError, NameError),
    *(ArithmeticError, MemoryError, SyntaxError),
)

_YAML_NAME = re.compile(r"yolo(v8|11|26)([nsmlx])(-p2|-p6)?\.yaml")
_BUILDERS = ("DetectionModel", "SegmentationModel", "PoseModel")
_LARGEST_NUMBER = 1 << 16
"""Of channels and the like in a description; larger ones would only exhaust the memory."""


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
    file = read_detector_file(path)
    return YoloDetector(
        network=_ready(_rebuilt(file, path)),
        architecture=file.architecture,
        image_size_px=file.image_size_px,
        class_names=file.class_names,
        record=file.record,
        sha256=sha256_of(path),
    )


def _rebuilt(file: DetectorFile, path: Path) -> nn.Module:
    """Build the network that a file describes, and give it the file's weights."""
    head = getattr(ultralytics.nn.modules, file.head, None)
    if not (isinstance(head, type) and issubclass(head, Detect)) or issubclass(head, OBB):
        raise CheckpointError(
            f"{path}: its head is {file.head or 'missing'}, expected one that predicts upright boxes (Detect)"
        )
    if file.model_class not in _BUILDERS:
        raise CheckpointError(f"{path}: holds a {file.model_class}, expected one of {', '.join(_BUILDERS)}")
    check_description(file.description, path)
    state = {key: torch.from_numpy(array) for key, array in file.tensors.items()}
    try:
        network: nn.Module = _new_network(dict(file.description), file.model_class)
        _fit_class_branches(network, state, file)
        if not any(key.endswith(".bn.weight") for key in state):
            _fuse(network)
        network.load_state_dict(state)
    except _BUILDING_ERRORS as error:
        raise CheckpointError(
            f"{path}: its weights do not fit its description ({_first_line(error)}); was it pruned or edited? "
            "Give it in ONNX instead"
        ) from error
    layers = dict(network.named_modules())
    for name in file.fused:
        if hasattr(layers.get(name), "forward_fuse"):
            layers[name].forward = layers[name].forward_fuse
    known: Any = network  # ultralytics keeps these at its networks
    known.names, known.args = dict(enumerate(file.class_names)), dict(file.train_args)
    return network


def _fit_class_branches(network: nn.Module, state: Mapping[str, torch.Tensor], file: DetectorFile) -> None:
    """Widen the branches that score classes to those of a file.

    Their width depends on the number of classes, but a network that was fine-tuned for fewer ones keeps its old width.
    """
    name, head = list(network.get_submodule("model").named_children())[-1]
    for branch in ("cv3", "one2one_cv3"):
        layers = getattr(head, branch, None)
        stored = state.get(f"model.{name}.{branch}.0.2.weight")
        if layers is None or stored is None or stored.shape[1] == layers[0][2].in_channels:
            continue
        wider = _new_network(dict(file.description) | {"nc": int(stored.shape[1])}, file.model_class)
        *_, donor = wider.get_submodule("model").children()
        replacement = getattr(donor, branch)
        for new, old in zip(replacement, layers, strict=True):
            new[2] = nn.Conv2d(new[2].in_channels, old[2].out_channels, 1)
        setattr(head, branch, replacement)


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
        except _BUILDING_ERRORS as error:
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
    if any(number > _LARGEST_NUMBER for number in _numbers(description)):
        raise CheckpointError(
            f"{path}: describes a network that no memory holds; expected numbers up to {_LARGEST_NUMBER}"
        )
    for name in names:
        layer = getattr(nn, name.removeprefix("nn."), None) if name.startswith("nn.") else getattr(tasks, name, None)
        if layer is None and name.isidentifier() and name not in dir(builtins):
            raise CheckpointError(
                f"{path}: needs the layer {name}, which ultralytics {ultralytics.__version__} lacks; update ultralytics"
            )
        if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
            raise UnsafeFileError(f"{path}: {name!r} is no layer of torch or ultralytics; refused")


def _numbers(value: object) -> Iterator[float]:
    """Walk the numbers of a description."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float):
        yield value


def _ready(network: nn.Module) -> nn.Module:
    """Return a network in float32 and evaluation mode, repaired where older versions saved it otherwise."""
    for module in network.modules():
        if isinstance(module, nn.Upsample) and not hasattr(module, "recompute_scale_factor"):
            module.recompute_scale_factor = None
    return network.float().eval().requires_grad_(False)


def _fuse(network: Any) -> None:  # noqa: ANN401 - an untyped method of ultralytics
    """Merge the normalisation behind every convolution into its weights, as ultralytics does for inference."""
    network.fuse(verbose=False)


def _new_network(description: dict[str, Any], model_class: str = "DetectionModel") -> Any:  # noqa: ANN401 - untyped
    """Build a network with random weights."""
    build: Callable[..., Any] = getattr(tasks, model_class)
    # In older versions, a description that names an activation changes that of every network built after it.
    before: Any = Conv.default_act
    try:
        return build(copy.deepcopy(description), verbose=False)
    finally:
        Conv.default_act = before


def _check_head(network: nn.Module, path: Path) -> None:
    """Raise unless a network ends in a head that predicts upright boxes."""
    *_, head = network.get_submodule("model").children()
    if not isinstance(head, Detect) or isinstance(head, OBB) or not hasattr(head, "cv2"):
        raise CheckpointError(
            f"{path}: its head is {type(head).__name__}, expected one that predicts upright boxes (Detect)"
        )


def _class_names(network: nn.Module) -> tuple[str, ...]:
    """Return the names of a network's classes."""
    names = getattr(network, "names", {})
    return tuple(str(name) for name in (names.values() if isinstance(names, dict) else names))


def _first_line(error: BaseException) -> str:
    """Return the most telling line of a message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[min(1, len(lines) - 1)][:160]
