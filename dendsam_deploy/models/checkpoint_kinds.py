"""What kind of SAM checkpoint a file is, told from its content alone.

==========================  ===========================================================================================
layout                      content
==========================  ===========================================================================================
``plain``                   SAM's tensors: ``image_encoder.*``, ``prompt_encoder.*``, ``mask_decoder.*``
``training``                training of torch_em/micro-sam: ``{"model_state": ..., "optimizer_state": ...}``, names led
                            by ``sam.``, perhaps by ``_orig_mod.`` or ``module.``
``with-decoder``            an export of micro-sam: ``{"model_state": ..., "decoder_state": ...}``
``wrapped``                 SAM's tensors under one of the keys that other trainings use, such as ``model``
``unetr``                   a UNETR of torch_em, whose ``encoder.*`` is SAM's image encoder; it has neither prompt
                            encoder nor mask decoder
``own``                     this program's: ``{"model_state": ..., "dendsam": record}``
==========================  ===========================================================================================

Each may have low-rank adapters (`models.adapters`), and each may be a MobileSAM (`vit_t`).
"""

from __future__ import annotations

import re
import struct
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dendsam_deploy.errors import CheckpointError
from dendsam_deploy.models.adapters import AdapterFacts, adapter_facts, other_adapters
from dendsam_deploy.models.architectures import ENCODER_SHAPES, default_image_size
from dendsam_deploy.models.inert_values import Name, Placeholder
from dendsam_deploy.models.pickled_names import check_names
from dendsam_deploy.models.stored_tensor import STATISTICS, StoredTensor
from dendsam_deploy.models.tensor_file import open_tensor_file
from dendsam_deploy.models.training_record import TrainingRecord, checked_record

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from dendsam_deploy.models.architectures import ModelType
    from dendsam_deploy.models.inert_pickle import Unpickled
    from dendsam_deploy.models.tensor_file import TensorFile

Layout = Literal["plain", "training", "with-decoder", "wrapped", "unetr", "own"]
LAYOUTS: dict[Layout, str] = {
    "plain": "SAM state dict",
    "training": "training checkpoint of torch_em/micro-sam",
    "with-decoder": "micro-sam export with segmentation decoder",
    "wrapped": "SAM state dict in a training's wrapper",
    "unetr": "UNETR of torch_em: image encoder only",
    "own": "checkpoint of dendsam-deploy",
}

RECORD_KEY = "dendsam"
STATE_KEY = "model_state"
DECODER_KEY = "decoder_state"
NORMALISATION = {"pixel_mean": (123.675, 116.28, 103.53), "pixel_std": (58.395, 57.12, 57.375)}
_LONGEST_KEY = 300
_OTHER_FAMILIES = {
    "sam_mask_decoder.": "a SAM 2, whose encoder is another one",
    "vision_encoder.": "a SAM under the names of Hugging Face's transformers, which has the original file as well",
}
PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")

_STATE_KEYS = (STATE_KEY, "state_dict", "model_state_dict", "model", "sam", "ema", "net", "network")
_LEADERS = ("sam.", "model.", "sam_model.", "net.")
_WRAPPERS = re.compile(
    r"(^|\.)(_orig_mod|module|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)"
)
"""What torch puts around a model, or around any part of it: compilation, data parallelism, checkpointing."""
_TRAINING_KEYS = ("optimizer_state", "scheduler_state", "init", "best_metric", "iteration", "scaler_state")
_PROGRESS_KEYS = ("epoch", "best_epoch", "iteration", "best_metric", "current_metric", "train_time", "timestamp")
_TRAINERS = ("micro_sam", "torch_em", "lightning", "pytorch_lightning", "accelerate", "monai", "detectron2", "mmengine")


@dataclass(frozen=True, slots=True)
class SamFile:
    """What a checkpoint of SAM holds; its tensors are still in the file.

    Parameters
    ----------
    layout : str
        A key of `LAYOUTS`.
    tensors : dict of str to StoredTensor
        By SAM's names, except that adapted layers keep theirs (`models.adapters`).
    adapters : AdapterFacts or None
        What is adapted.
    has_segmentation_decoder : bool
        Whether a decoder of micro-sam for automatic segmentation is there as well; it is not used here.
    normalisation : dict of str to StoredTensor
        The mean and the deviation that images are normalised by, where the file has them; SAM's are fixed.
    record : object
        This program's own record of a training, as it stands in the file; None without.
    progress : dict
        What a training noted about itself: epoch, iteration, best metric ...
    trained_by : str
        The package that the training's own objects come from; empty where nothing tells.
    foreign : tuple of str
        Names of the objects beside the tensors, none of which was looked up.
    """

    layout: Layout
    tensors: dict[str, StoredTensor]
    adapters: AdapterFacts | None
    has_segmentation_decoder: bool
    normalisation: dict[str, StoredTensor]
    record: object
    progress: dict[str, str | float]
    trained_by: str
    foreign: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Number of parameters of SAM and its adapters; the running statistics of normalisation are none."""
        return sum(tensor.size for key, tensor in self.tensors.items() if not key.endswith(STATISTICS))

    def training_record(self, path: Path) -> TrainingRecord:
        """Return this program's own record, or what the tensors tell.

        Raises
        ------
        CheckpointError
            Where the record, or the width of the encoder, is unknown.
        """
        if self.layout == "own":
            return checked_record(self.record, path)
        return TrainingRecord(*architecture(self.tensors, path))


@contextmanager
def open_sam_file(path: Path) -> Iterator[tuple[TensorFile, SamFile]]:
    """Open a checkpoint of SAM and tell its kind; nothing that it names is imported or called.

    Raises
    ------
    CheckpointError
        If the file is missing, cut off, damaged, or not a SAM.
    UnsafeFileError
        If it names what no weights need.
    """
    with open_tensor_file(path) as file:
        check_names(path, file.pickled.names)
        if not file.is_torch:
            raise CheckpointError(f"{path}: not a torch checkpoint; give a .pt or .pth file with a SAM state dict")
        yield file, recognise(file.pickled, path)


def recognise(pickled: Unpickled, path: Path) -> SamFile:
    """Tell the kind of a checkpoint, and bring its names into SAM's form.

    Parameters
    ----------
    pickled : Unpickled
        What the file says.
    path : Path
        For the message.

    Raises
    ------
    CheckpointError
        Where it is no SAM.
    """
    content = pickled.value
    if isinstance(content, Placeholder):
        raise _whole_object(content, path)
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path}: holds a {_kind_of(content)}, expected a state dict of tensors")
    wrapper, tensors = _state(content, path)
    tensors = _renamed(tensors, path)
    has_decoder = isinstance(content.get(DECODER_KEY), dict) or any(key.startswith("decoder.") for key in tensors)
    layout = _layout(content, wrapper, tensors)
    normalisation = {key: tensors[key] for key in NORMALISATION if key in tensors}
    tensors = _of_sam(tensors, layout, path)
    if kind := other_adapters(tensors):
        raise CheckpointError(f"{path}: has adapters of the kind {kind}, which cannot be merged; expected LoRA or none")
    return SamFile(
        layout=layout,
        tensors=tensors,
        adapters=adapter_facts(tensors),
        has_segmentation_decoder=has_decoder,
        normalisation=normalisation,
        record=content.get(RECORD_KEY),
        progress={key: value for key in _PROGRESS_KEYS if (value := _plain(content.get(key))) is not None},
        trained_by=_trainer(content, pickled.names),
        foreign=_foreign(pickled.names),
    )


def architecture(tensors: Mapping[str, StoredTensor], path: Path) -> tuple[ModelType, int]:
    """Tell the model type and the side of the input, px, from the shapes of an image encoder's tensors.

    Raises
    ------
    CheckpointError
        Where no known encoder is as wide.
    """
    patches = tensors.get("image_encoder.patch_embed.proj.weight")
    if patches is None:
        return "vit_t", default_image_size("vit_t")
    width = patches.shape[0] if len(patches.shape) == 4 else 0
    model_type = next((name for name, shape in ENCODER_SHAPES.items() if shape.width == width), None)
    if model_type is None:
        known = ", ".join(f"{shape.width} ({name})" for name, shape in ENCODER_SHAPES.items())
        raise CheckpointError(f"{path}: its patch embedding is {width} wide, expected one of {known}")
    position = tensors.get("image_encoder.pos_embed")
    grid = position.shape[1] if position is not None and len(position.shape) == 4 else 64
    return model_type, grid * patches.shape[-1]


def _state(content: Mapping[object, object], path: Path) -> tuple[str, dict[str, StoredTensor]]:
    """Return the tensors, and the key under which they are; empty where nothing is around them."""
    if direct := _tensors(content):
        return "", direct
    for key in _STATE_KEYS:
        inner = content.get(key)
        if isinstance(inner, dict) and (found := _tensors(inner)):
            return key, found
        if isinstance(inner, Placeholder):
            raise _whole_object(inner, path)
    names = ", ".join(f"{key!s:.40}" for key in list(content)[:3])
    expected = ", ".join(f"{part}.*" for part in PARTS)
    raise CheckpointError(f"{path}: holds {names}, expected the tensors {expected}")


def _whole_object(found: Placeholder, path: Path) -> CheckpointError:
    """Say that the file holds an object of a class, of which nothing is rebuilt here."""
    if found.maker.startswith("ultralytics."):
        return CheckpointError(f"{path}: holds an Ultralytics network, expected SAM; give it as the detector")
    return CheckpointError(f"{path}: holds a whole pickled {found.maker}; save its state_dict() instead")


def _tensors(content: Mapping[object, object]) -> dict[str, StoredTensor]:
    found = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, StoredTensor)}
    if any(len(key) > _LONGEST_KEY or not key.isprintable() for key in found):
        raise CheckpointError("a tensor has a name that is none; save the checkpoint again")
    return found


def _renamed(tensors: Mapping[str, StoredTensor], path: Path) -> dict[str, StoredTensor]:
    """Strip what trainings and compilers put before SAM's names, and what repeats or does not belong to the weights."""
    renamed: dict[str, StoredTensor] = {}
    for key, tensor in tensors.items():
        name = _WRAPPERS.sub("", key).lstrip(".")
        while leader := next((leader for leader in _LEADERS if name.startswith(leader)), None):
            name = name.removeprefix(leader)
        if name.startswith("peft_blocks."):  # micro-sam's list of the adapters that are in the encoder as well
            continue
        if renamed.setdefault(name, tensor) != tensor:
            raise CheckpointError(f"{path}: holds {name} twice, with different values; save one of them alone")
    return renamed


def _layout(content: Mapping[object, object], wrapper: str, tensors: Iterable[str]) -> Layout:
    """Tell what is around the tensors."""
    if RECORD_KEY in content:
        return "own"
    if not any(key.startswith("image_encoder.") for key in tensors) and any(
        key.startswith("encoder.") for key in tensors
    ):
        return "unetr"
    if not wrapper:
        return "plain"
    if wrapper == STATE_KEY and any(key in content for key in _TRAINING_KEYS):
        return "training"
    return "with-decoder" if DECODER_KEY in content else "wrapped"


def _of_sam(tensors: dict[str, StoredTensor], layout: Layout, path: Path) -> dict[str, StoredTensor]:
    """Keep SAM's own tensors, under its names."""
    if layout == "unetr":
        found = {f"image_{key}": value for key, value in tensors.items() if key.startswith("encoder.")}
    else:
        found = {key: value for key, value in tensors.items() if key not in NORMALISATION}
    # Some versions of MobileSAM keep a table of positions there, which the window's size decides.
    found = {key: value for key, value in found.items() if not key.endswith(".attention_bias_idxs")}
    parts = [part for part in PARTS if any(key.startswith(f"{part}.") for key in found)]
    if "image_encoder" not in parts and tensors.keys() and all(_is_of_decoder(key) for key in tensors):
        raise CheckpointError(
            f"{path}: holds only a segmentation decoder of micro-sam; give the file of the SAM that it belongs to"
        )
    for leader, family in _OTHER_FAMILIES.items():
        if any(key.startswith(leader) for key in tensors):
            raise CheckpointError(f"{path}: not a SAM checkpoint: it is {family}; expected {', '.join(PARTS)}")
    if len(parts) < len(PARTS) and layout != "unetr":
        present = ", ".join(parts) or f"{next(iter(tensors))} and others"
        raise CheckpointError(f"{path}: not a SAM checkpoint: expected {', '.join(PARTS)}, found {present}")
    return found


def _is_of_decoder(key: str) -> bool:
    return key.startswith(("decoder.", "out_conv.", "deconv", "base.", "conv_out.", "decoder_head."))


def _foreign(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names that do not belong to tensors and plain containers."""
    plain = ("torch._utils.", "torch._tensor.", "torch.storage.", "collections.", "builtins.", "_codecs.")
    return tuple(
        sorted(
            name
            for name in names
            if not name.startswith(plain) and not re.fullmatch(r"torch\.(\w+Storage|Size|device|[a-z]+\d*)", name)
        )
    )


def _plain(value: object) -> str | float | None:
    """Return a word or a number, also where it is one of NumPy, as trainers leave them; None for anything else."""
    if isinstance(value, str):
        return value[:_LONGEST_KEY]
    if isinstance(value, int | float):
        return value if abs(value) < 1 << 63 else None
    if not isinstance(value, Placeholder) or not value.maker.endswith("multiarray.scalar"):
        return None
    match value.arguments:
        case (Placeholder(maker="numpy.dtype", arguments=(str(kind), *_)), bytes(stored)):
            pass
        case (
            Placeholder(maker="numpy.dtype", arguments=(str(kind), *_)),
            Placeholder(arguments=(str(text), "latin1")),
        ):
            stored = text.encode("latin1", "replace")
        case _:
            return None
    code = {"f8": "<d", "f4": "<f", "f2": "<e", "i8": "<q", "i4": "<i"}.get(kind, "")
    return float(struct.unpack(code, stored)[0]) if code and struct.calcsize(code) == len(stored) else None


def _trainer(content: Mapping[object, object], names: Iterable[str]) -> str:
    """Return the package whose training this was."""
    if RECORD_KEY in content:
        return "dendsam-deploy"
    roots = {name.partition(".")[0] for name in names}
    if known := next((trainer for trainer in _TRAINERS if trainer in roots), None):
        return known
    return "torch_em" if STATE_KEY in content and "optimizer_state" in content else ""


def _kind_of(value: object) -> str:
    if isinstance(value, StoredTensor):
        return "Tensor"
    return value.dotted if isinstance(value, Name) else type(value).__name__
