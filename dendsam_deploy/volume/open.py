"""The one place where a path becomes a volume."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.errors import VolumeError
from dendsam_deploy.volume.folder import FolderReader
from dendsam_deploy.volume.raster import PNG_MAGIC
from dendsam_deploy.volume.tiff import TiffReader
from dendsam_deploy.volume.tiff_pages import TIFF_MAGIC
from dendsam_deploy.volume.voxel_size import check_voxel_size

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from numpy.typing import NDArray

    from dendsam_deploy.geometry import Window
    from dendsam_deploy.volume.volume import VolumeInfo, VolumeReader

_EXPECTED = "expected a TIFF stack, a PNG image, a folder of TIFF or PNG slices, or a Zarr"

_FOREIGN_MAGIC = {
    b"\x89HDF": "an HDF5 file",
    b"PK\x03\x04": "a zip archive",
    b"\xff\xd8\xff": "a JPEG image, whose compression alters grey values",
    b"GIF8": "a GIF image",
    b"BM": "a BMP image",
    b"\x1f\x8b": "a gzip archive",
    b"\x93NUM": "a numpy array",
    b"NRRD": "an NRRD file",
}


def is_zarr(path: Path) -> bool:
    """Tell whether a folder is a Zarr array or group of format 2 or 3."""
    return any((path / name).is_file() for name in ("zarr.json", ".zarray", ".zgroup"))


def open_volume(path: Path | str, voxel_size_nm: tuple[float, float, float] | None = None) -> VolumeReader:
    """Open an image volume for reading slice by slice.

    What a file is, is decided by its first bytes and not by its name.

    Parameters
    ----------
    path : Path or str
        A TIFF stack, a PNG image, a folder of TIFF or PNG slices, an OME-Zarr image or a Zarr array.
    voxel_size_nm : (float, float, float) or None
        Voxel size ``(z, y, x)`` that replaces what the file records.

    Returns
    -------
    VolumeReader
        A context manager; ``read(z)`` gives slices in the dtype on disk.

    Raises
    ------
    VolumeError
        Names the file, what was found and what was expected.
    UnsafeFileError
        The metadata of a Zarr lead out of its folder.
    InvalidArgumentError
        The voxel size is not positive.
    """
    return _open(Path(path), voxel_size_nm, prefer_labels=False)


def open_labels(path: Path | str, voxel_size_nm: tuple[float, float, float] | None = None) -> VolumeReader:
    """Open a volume of instance labels; see `open_volume`.

    Of an OME-Zarr image that brings one label image, the labels are opened. Integers and real numbers with integer
    values can be labels; ``info.dtype`` is the type on disk.

    Returns
    -------
    VolumeReader
        ``read(z)`` gives uint32, and raises `VolumeError` where a slice holds negative, fractional or larger values.
    """
    return _LabelReader(_open(Path(path), voxel_size_nm, prefer_labels=True))


def _open(path: Path, voxel_size_nm: tuple[float, float, float] | None, prefer_labels: bool) -> VolumeReader:
    """Choose the reader of a path."""
    check_voxel_size(voxel_size_nm)
    try:
        if is_zarr(path):
            # zarr takes as long to import as all the rest of this package; only those who need it wait.
            from dendsam_deploy.volume.ngff import ZarrReader  # noqa: PLC0415 - see above

            return ZarrReader(path, voxel_size_nm, prefer_labels)
        if path.is_dir():
            return FolderReader(path, voxel_size_nm)
        with path.open("rb") as file:
            start = file.read(16)
    except FileNotFoundError as error:
        raise VolumeError(f"{path}: does not exist; check the spelling and whether the drive is mounted") from error
    except OSError as error:
        raise VolumeError(
            f"{path}: cannot be read ({error.strerror or error}); check its permissions and its drive"
        ) from error
    if start.startswith(TIFF_MAGIC):
        return TiffReader(path, voxel_size_nm)
    if start.startswith(PNG_MAGIC):
        return FolderReader(path, voxel_size_nm)
    raise VolumeError(f"{path}: is {_name_content(start)}; {_EXPECTED}")


def input_signature(path: Path) -> str:
    """Return number, bytes and newest time stamp of a volume's files: cheap, and it changes when the volume does."""
    files = [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]
    facts = [file.stat() for file in files]
    newest = max((fact.st_mtime_ns for fact in facts), default=0)
    return f"{len(facts)} files, {sum(fact.st_size for fact in facts)} bytes, {newest} ns"


def _name_content(start: bytes) -> str:
    """Say in words what a file seems to be from its first bytes."""
    if not start:
        return "empty (0 bytes)"
    for magic, name in _FOREIGN_MAGIC.items():
        if start.startswith(magic):
            return name
    if len(start) < 8:
        return f"cut off after {len(start)} bytes"
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start):
        return f"a text file (it begins with {start.decode('ascii')!r})"
    return f"no image of a known kind (it begins with {start[:8]!r})"


class _LabelReader:
    """A volume whose values are checked to be labels as they are read."""

    def __init__(self, volume: VolumeReader) -> None:
        self._volume = volume

    @property
    def info(self) -> VolumeInfo:
        """The recorded facts."""
        return self._volume.info

    def read(self, z: int, window: Window | None = None) -> NDArray[np.uint32]:
        """Return the labels of slice `z` or of a part of it; see `open_labels`."""
        values = self._volume.read(z, window)
        if values.size == 0 or values.dtype in (np.uint8, np.uint16, np.uint32, np.bool_):
            return values.astype(np.uint32, copy=False)
        source = f"{self.info.source}: slice {z}"
        with np.errstate(invalid="ignore"):
            if values.dtype.kind == "f" and not np.array_equal(values, np.floor(values)):
                raise VolumeError(
                    f"{source} holds values that are no integers, expected labels; is it the image instead?"
                )
        if values.min() < 0:
            raise VolumeError(f"{source} holds the negative value {values.min()}, expected labels from 0; set it to 0")
        if values.max() > 2**32 - 1:
            raise VolumeError(
                f"{source} holds the label {values.max()}, expected at most {2**32 - 1}; renumber the labels"
            )
        return values.astype(np.uint32)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._volume.__exit__(kind, error, traceback)
