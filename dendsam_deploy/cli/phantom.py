"""``phantom``: a synthetic stack of dendrites with exact labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dendsam_deploy.cli.options import PATH, VOXEL_SIZE, Settings, command, json_option, word
from dendsam_deploy.errors import InvalidArgumentError, StorageError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from dendsam_deploy.cli.console import Console
    from dendsam_deploy.volume.phantom import Phantom

SETTINGS = Settings("dendsam_deploy.volume.phantom:PhantomOptions")


def read_shape(text: str) -> tuple[int, int, int]:
    """Read ``Z,Y,X``, three numbers of voxels."""
    try:
        z, y, x = (int(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no shape, expected three numbers such as 16,384,384") from error
    return z, y, x


@command("phantom", "phantom demo-data --shape 16,384,384 --seed 7")
@click.argument("out", type=PATH)
@SETTINGS.option("--shape", "shape_zyx", word("Z,Y,X", read_shape), "Slices, rows, columns.")
@SETTINGS.option("--seed", "seed", int, "Same options and seed, same bytes.")
@SETTINGS.option("--voxel-size", "voxel_size_nm", VOXEL_SIZE, "Recorded voxel size, nm.")
@SETTINGS.option("--missing-slice", "missing_slice", int, "A slice that was lost: blank in the image.")
@SETTINGS.flag("--dense", "dense", "Label every profile, as in a dense reconstruction.")
@json_option
@click.pass_context
def phantom(context: click.Context, out: Path, json_file: Path | None) -> None:
    """Make a synthetic stack of dendrites with exact labels.

    The folder OUT gets raw.tif, labels.tif (one label for each 3-D object) and labels_2d.tif (one for each profile of a
    slice). An OUT that ends with .tif names the image itself; the labels lie beside it, named after it.
    """
    from dendsam_deploy.volume.phantom import PhantomOptions, make_phantom

    console: Console = context.obj
    check_place(out)
    made = make_phantom(PhantomOptions(**SETTINGS.given(context)))
    files = write_phantom(made, out)
    document = {
        "files": {name: str(path) for name, path in files.items()},
        "shape_zyx": made.raw.shape,
        "voxel_size_nm": made.voxel_size_nm,
        "objects_3d": int(made.labels.max(initial=0)),
        "missing_slices": made.missing_slices,
    }
    console.result("\n".join(str(path) for path in files.values()), document, json_file)


def phantom_files(out: Path) -> dict[str, Path]:
    """Return where the image and both kinds of labels go."""
    kinds = ("raw", "labels", "labels_2d")
    if out.suffix.lower() in (".tif", ".tiff"):
        return {name: out.with_stem(f"{out.stem}-{name}") for name in kinds} | {"raw": out}
    return {name: out / f"{name}.tif" for name in kinds}


def check_place(out: Path) -> None:
    """Refuse to replace anything but a whole phantom.

    Raises
    ------
    InvalidArgumentError
        Where one of the files exists, but not all three.
    """
    found = [path for path in phantom_files(out).values() if path.exists()]
    if 0 < len(found) < 3:
        raise InvalidArgumentError(f"{found[0]}: exists and is no part of a phantom; choose another name")


def write_phantom(phantom: Phantom, out: Path) -> dict[str, Path]:
    """Write the image and both kinds of labels; see `phantom` for the names.

    Returns
    -------
    dict
        Paths of ``raw``, ``labels`` and ``labels_2d``.
    """
    from dendsam_deploy.volume.labels import smallest_label_dtype

    files = phantom_files(out)
    try:
        files["raw"].parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{out}: cannot be made ({error.strerror or error}); choose another place") from error
    for name, stack in (("labels", phantom.labels), ("labels_2d", phantom.labels_2d)):
        _write_stack(files[name], stack, smallest_label_dtype(int(stack.max(initial=0))), phantom.voxel_size_nm)
    _write_stack(files["raw"], phantom.raw, phantom.raw.dtype, phantom.voxel_size_nm)
    return files


def _write_stack(
    path: Path, stack: NDArray[Any], dtype: np.dtype[Any], voxel_size_nm: tuple[float, float, float]
) -> None:
    """Write an array (Z, Y, X) of whole numbers as a TIFF stack; grey values of 8 bits are stored as labels are."""
    from dendsam_deploy.volume.labels import LabelVolumeSpec, create_labels

    depth, height, width = stack.shape
    with create_labels(path, LabelVolumeSpec((depth, height, width), dtype, voxel_size_nm)) as writer:
        for z, plane in enumerate(stack):
            writer.write(z, plane)
