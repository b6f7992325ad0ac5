"""A bundle that is open for use: its manifest is understood, its files are the ones that were exported."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from dendsam_deploy.bundle.contract import graph_inputs, graph_outputs
from dendsam_deploy.bundle.external_data import external_data_locations
from dendsam_deploy.bundle.manifest import FileDigest, GraphSpec, Manifest, Precision, Role, TensorSpec
from dendsam_deploy.bundle.parity import ParityReport, parity_from_json
from dendsam_deploy.errors import BundleError, InvalidArgumentError, UnsafeFileError
from dendsam_deploy.geometry import EMBEDDING_STRIDE_PX

if TYPE_CHECKING:
    from collections.abc import Mapping

MANIFEST_FILE = "manifest.json"
PARITY_FILE = "parity.json"
REFERENCE_FILE = "reference.npz"
MODEL_CARD_FILE = "MODEL_CARD.md"

_LARGEST_TEXT_BYTES = 64 * 2**20  # manifests and reports have kilobytes; anything larger is not one


@dataclass(frozen=True, slots=True)
class Bundle:
    """A folder of graphs whose files were checked against their manifest; made by `Bundle.open`.

    Parameters
    ----------
    path : Path
        The folder.
    manifest : Manifest
        What the graphs are and how slices must be prepared for them.
    parity : ParityReport or None
        What `verify` found about exactly these graphs; None means that the bundle is unproven.
    """

    path: Path
    manifest: Manifest
    parity: ParityReport | None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read a bundle's manifest and check every file that it lists.

        Parameters
        ----------
        path : path-like
            The bundle's folder.

        Raises
        ------
        BundleError
            A file is missing or altered, the manifest is of another version, or it breaks the contract of the graphs.
        UnsafeFileError
            A file, or the external data of a graph, lies outside the folder.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise BundleError(f"{folder}: not a folder; a bundle is the folder that `dendsam-deploy export` writes")
        manifest_file = folder / MANIFEST_FILE
        if not manifest_file.is_file():
            raise BundleError(f"{folder}: no {MANIFEST_FILE}, so it is no bundle; export it again")
        manifest = Manifest.from_json(_read_text(manifest_file), str(manifest_file))
        _check_contract(manifest, str(manifest_file))
        for graph in manifest.graphs:
            for file in graph.files:
                _check_file(folder, file)
            _check_external_data(folder, graph)
        for file in manifest.extra_files:
            _check_file(folder, file)
        return cls(folder, manifest, _read_parity(folder, manifest))

    def graph_path(self, role: Role, precision: Precision) -> Path:
        """Return the ONNX file of a role at a precision.

        Raises
        ------
        BundleError
            Where the bundle has no such graph; names the precisions that it has.
        """
        graph = self.manifest.graph(role, precision)
        if graph is None:
            have = sorted(graph.precision for graph in self.manifest.graphs if graph.role == role)
            raise BundleError(
                f"{self.path}: no {role} graph at {precision}, only at {', '.join(have) or 'none'}; choose one of those"
            )
        return self.path / graph.files[0].file

    def extra_path(self, name: str) -> Path | None:
        """Return a listed file that is not a graph, such as the stored reference, or None where the bundle has none."""
        listed = any(file.file == name for file in self.manifest.extra_files)
        return self.path / name if listed else None


def find_bundle(exports: Path = Path("exports"), environment: Mapping[str, str] = os.environ) -> Path:
    """Choose the bundle for a command that was given none.

    The only bundle in the folder of exports is taken; otherwise the one that the variable ``DENDSAM_BUNDLE`` names.

    Parameters
    ----------
    exports : Path
        Folder whose direct subfolders are searched.
    environment : mapping
        Environment variables.

    Raises
    ------
    InvalidArgumentError
        Where neither rule decides; lists what was found.
    """
    found = sorted(path.parent for path in exports.glob(f"*/{MANIFEST_FILE}") if not path.parent.name.startswith("."))
    if len(found) == 1:
        return found[0]
    if named := environment.get("DENDSAM_BUNDLE"):
        return Path(named)
    listing = f"several bundles ({', '.join(map(str, found))})" if found else "no bundle"
    raise InvalidArgumentError(f"found {listing} in {exports}/; name one with -b or in $DENDSAM_BUNDLE")


def digest_file(folder: Path, name: str) -> FileDigest:
    """Return the SHA-256 and size of a file inside a folder, under its name relative to that folder."""
    with (folder / name).open("rb") as stream:
        return FileDigest(name, hashlib.file_digest(stream, "sha256").hexdigest(), os.fstat(stream.fileno()).st_size)


def _read_text(path: Path) -> str:
    """Read a small UTF-8 file of a bundle."""
    try:
        if path.stat().st_size > _LARGEST_TEXT_BYTES:
            raise BundleError(
                f"{path}: larger than {_LARGEST_TEXT_BYTES >> 20} MiB, which no such file is; export again"
            )
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: cannot be read as text ({error}); export the bundle again") from error


def _read_parity(folder: Path, manifest: Manifest) -> ParityReport | None:
    """Read the report of the last `verify`, where there is one."""
    path = folder / PARITY_FILE
    return parity_from_json(_read_text(path), manifest, str(path)) if path.exists() else None


def _check_contract(manifest: Manifest, source: str) -> None:
    """Check what a manifest says about its graphs against what every bundle promises."""
    tile_size = manifest.preprocessing.tile_size_px
    cells = tile_size // EMBEDDING_STRIDE_PX
    sizes = manifest.decoding.region_sizes
    if tile_size < EMBEDDING_STRIDE_PX or tile_size % EMBEDDING_STRIDE_PX:
        raise BundleError(f"{source}: tile_size_px is {tile_size}, expected a multiple of {EMBEDDING_STRIDE_PX}")
    if not sizes or sizes[0] < 1 or sizes[-1] != cells or list(sizes) != sorted(set(sizes)):
        raise BundleError(f"{source}: region_sizes is {list(sizes)}, expected ascending cells that end with {cells}")
    _check_thresholds(manifest, source)
    seen: set[tuple[Role, Precision]] = set()
    for graph in manifest.graphs:
        where = f"{source}: the {graph.role} graph at {graph.precision}"
        if (graph.role, graph.precision) in seen:
            raise BundleError(f"{where} is listed twice")
        seen.add((graph.role, graph.precision))
        if not graph.files:
            raise BundleError(f"{where} lists no file")
        for kind, have, want in (
            ("inputs", graph.inputs, graph_inputs(graph.role, tile_size)),
            ("outputs", graph.outputs, graph_outputs(graph.role, tile_size)),
        ):
            if _signature(have) != _signature(want):
                raise BundleError(f"{where} has the {kind} {_signature(have)}, expected {_signature(want)}")
    for role in ("encoder", "decoder"):
        if role not in {graph.role for graph in manifest.graphs}:
            raise BundleError(f"{source}: lists no {role} graph; export the bundle again")


def _check_thresholds(manifest: Manifest, source: str) -> None:
    """Refuse thresholds with which nothing, or everything, would be found."""
    thresholds = manifest.thresholds
    for name in ("detection_score", "nms_iou"):
        if not 0 <= getattr(thresholds, name) <= 1:
            raise BundleError(f"{source}: {name} is {getattr(thresholds, name)}, expected 0 to 1")
    if not math.isfinite(thresholds.mask_logit) or not 0 <= thresholds.min_area_px < math.inf:
        raise BundleError(
            f"{source}: mask_logit is {thresholds.mask_logit} and min_area_px {thresholds.min_area_px}, expected "
            "finite numbers, an area of 0 or more"
        )


def _signature(tensors: tuple[TensorSpec, ...]) -> str:
    """Write tensors in one line; how a free axis is called does not matter."""
    return ", ".join(
        f"{tensor.name} {tensor.dtype}({', '.join('*' if isinstance(n, str) else str(n) for n in tensor.shape)})"
        for tensor in tensors
    )


def _check_file(folder: Path, file: FileDigest) -> None:
    """Check that a listed file lies in the folder and is, byte for byte, the one that was listed."""
    path = _path_inside(folder, file.file)
    if not path.is_file():
        raise BundleError(f"{path}: missing; copy the whole bundle again or export it again")
    try:
        found = digest_file(folder, file.file)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error
    if found.size != file.size:
        raise BundleError(f"{path}: {found.size} bytes, the manifest says {file.size}; copy or export the bundle again")
    if found.sha256 != file.sha256:
        raise BundleError(f"{path}: altered since it was exported (SHA-256 differs); copy or export the bundle again")


def _check_external_data(folder: Path, graph: GraphSpec) -> None:
    """Check that a graph opens only files that the manifest lists for it, whose digests are therefore known."""
    onnx_file = folder / graph.files[0].file
    listed = {file.file for file in graph.files[1:]}
    for location in external_data_locations(onnx_file):
        # Locations are relative to the graph's own folder.
        name = PurePosixPath(graph.files[0].file).parent / location
        _path_inside(folder, str(name))
        if str(name) not in listed:
            raise BundleError(f"{onnx_file}: needs {location!r}, which the manifest does not list; export again")


def _path_inside(folder: Path, name: str) -> Path:
    """Return the path of a bundle's file, refusing every way out of the folder."""
    parts = PurePosixPath(name).parts
    windows = PureWindowsPath(name)
    if not parts or ".." in parts or name.startswith("/") or "\\" in name or windows.drive or "\0" in name:
        raise UnsafeFileError(f"{folder}: the bundle names the file {name!r}, which lies outside its folder; refused")
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UnsafeFileError(f"{path}: a link to {path.resolve()}, outside the bundle; refused (copy with `cp -rL`)")
    return path
