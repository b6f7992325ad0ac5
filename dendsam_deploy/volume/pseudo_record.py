"""The record of a folder of pseudo-labels: what they are, where they came from, and which slices have any."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dendsam_deploy.durable import write_text
from dendsam_deploy.errors import InputFileError

if TYPE_CHECKING:
    from pathlib import Path

RECORD_FILE = "pseudo.json"
"""Written last: without it a folder of pseudo-labels is not finished."""

SCHEMA_VERSION = 1

UNLABELLED_POLICY = (
    "0 means unlabelled, not background: what was not found or not kept is missing. Train with box or point prompts on "
    "the labelled objects alone; never train a detector on these labels, and never judge by them."
)
"""What a reader has to know about the pixels without a label; part of the record."""


@dataclass(frozen=True, slots=True)
class PseudoRecord:
    """What a folder of pseudo-labels holds.

    Parameters
    ----------
    labels : str
        The label volume, relative to the folder; it has the shape of the whole input volume.
    volume : str
        The input volume as it was named.
    shape_zyx : (int, int, int)
        Its shape.
    slices : (int, int)
        Half-open range of slices that were looked at.
    kept_masks : dict
        Number of kept masks by slice; slices without any are left out.
    bundle : str
        Name of the bundle that made them.
    bundle_sha256 : str
        Digest of the digests of its graphs.
    fingerprint : str
        Digest of everything that decided the masks.
    criteria : dict
        Least values of a kept mask.
    truth_slices : tuple of int
        Slices whose truth chose the thresholds.
    choice : dict or None
        What the thresholds achieve there, see `evaluate.mask_choice.MaskChoice`.
    """

    labels: str
    volume: str
    shape_zyx: tuple[int, int, int]
    slices: tuple[int, int]
    kept_masks: dict[int, int]
    bundle: str
    bundle_sha256: str
    fingerprint: str
    criteria: dict[str, float]
    truth_slices: tuple[int, ...] = ()
    choice: dict[str, Any] | None = None

    def write(self, folder: Path) -> None:
        """Write the record into a folder, whole or not at all.

        Raises
        ------
        StorageError
            Where the file system refuses.
        """
        document = {"schema_version": SCHEMA_VERSION, "unlabelled": UNLABELLED_POLICY, **asdict(self)}
        write_text(folder / RECORD_FILE, json.dumps(document, indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> tuple[Path, PseudoRecord]:
        """Read the record of a folder of pseudo-labels, or of the label volume in it or beside it.

        Returns
        -------
        labels : Path
            The label volume.
        record : PseudoRecord
            What it is.

        Raises
        ------
        InputFileError
            Where there is none, or one that cannot be read.
        """
        folder = path if (path / RECORD_FILE).is_file() or path.is_dir() else pseudo_folder(path)
        if not (folder / RECORD_FILE).is_file() and (path.parent / RECORD_FILE).is_file():
            folder = path.parent  # the labels themselves were named
        file = folder / RECORD_FILE
        if not file.is_file():
            raise InputFileError(
                f"{path}: holds no finished pseudo-labels ({RECORD_FILE} is missing); run "
                "`dendsam-deploy pseudo-label` to the end and name its folder"
            )
        try:
            document = json.loads(file.read_bytes())
            version = document.pop("schema_version")
            document.pop("unlabelled")
            record = cls(**document)
            record = cls(**{
                **document,
                "shape_zyx": tuple(map(int, record.shape_zyx)),
                "slices": tuple(map(int, record.slices)),
                "truth_slices": tuple(map(int, record.truth_slices)),
                "kept_masks": {int(z): int(count) for z, count in record.kept_masks.items()},
            })  # fmt: skip
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputFileError(f"{file}: is damaged ({error!r}); run `dendsam-deploy pseudo-label` again") from error
        if version != SCHEMA_VERSION:
            raise InputFileError(f"{file}: schema version {version}, this program reads {SCHEMA_VERSION}; make it anew")
        labels = folder / record.labels
        if labels.resolve().parent not in (folder.resolve(), folder.resolve().parent):
            raise InputFileError(f"{file}: names labels outside of its folder ({record.labels}); make it anew")
        if not labels.exists():
            raise InputFileError(f"{labels}: is missing, but {file} speaks of it; run pseudo-label again")
        return labels, record


def pseudo_folder(out: Path) -> Path:
    """Return the folder of pseudo-labels whose output has a name: the name itself, or, of a TIFF, one beside it."""
    return out.with_suffix(".pseudo") if out.suffix.lower() in (".tif", ".tiff") else out
