"""The layers of the house, the homes of the vendor libraries, the names and the length of files; read with ``ast``."""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "dendsam_deploy"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE

LAYERS = {
    "errors": 0,
    "durable": 0,
    "progress": 0,
    "geometry": 0,
    "instances": 0,
    "metrics": 0,
    "host": 0,
    "weights": 0,
    "bundle": 1,
    "volume": 1,
    "models": 2,
    "training": 3,
    "export": 3,
    "runtimes": 3,
    "pipeline": 4,
    "evaluate": 5,
    "report": 5,
    "cli": 6,
}
"""Imports go down, or stay within a layer; of those on layer 3 none imports another."""

SIBLINGS = {"training", "export", "runtimes"}

ONLY_FILE_BETWEEN = {("runtimes", "models"): "runtimes/torch_reference.py"}
"""Rooms of which one file alone may import another room."""

VENDOR_HOMES = {
    "click": ["cli/"],
    "tifffile": ["volume/tiff"],
    "zarr": ["volume/ngff"],
    "PIL": ["volume/raster.py"],
    "roifile": ["volume/imagej_rois.py"],
    "scipy": ["metrics/", "volume/", "training/", "export/", "pipeline/", "evaluate/"],
    "jinja2": ["report/page.py"],
    "markupsafe": ["report/page.py"],
    "matplotlib": ["report/figures"],
    "cuda": ["runtimes/gpu_memory.py"],
    "tensorrt": ["runtimes/gpu_engine_library.py"],
    "onnxruntime": ["export/quantise.py", "runtimes/portable"],
    "openvino": ["runtimes/compiled_cpu.py"],
    "onnx": ["export/", "runtimes/captured_graph.py"],
    "onnx_ir": ["export/graphs.py"],
    "torch": ["models/", "training/", "export/", "runtimes/torch_reference.py", "runtimes/captured"],
    "segment_anything": ["models/", "training/", "export/", "runtimes/torch_reference.py"],
    "timm": ["models/tiny_vit.py"],
    "lightning_fabric": ["training/launcher.py"],
    "ultralytics": ["models/detector.py"],
    "pooch": ["models/weights_download.py"],
    "requests": ["models/weights_download.py"],
}
"""Which files may import a library. A home is a folder or the beginning of a file name."""

EVERYWHERE = {"numpy"}

FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "core", "misc", "types", "base"}
LIBRARIES = {*VENDOR_HOMES, "numpy", "tensorrt", "imagecodecs", "skimage", "pillow", "pooch"}

MAX_LINES = 400


@dataclass(frozen=True)
class Source:
    """A file of the package: its path relative to the package, and its text."""

    path: str
    text: str

    @property
    def room(self) -> str:
        return Path(self.path).parts[0].removesuffix(".py")

    @property
    def imports(self) -> set[str]:
        """Every module that is imported anywhere in the file, also for type checkers and inside functions."""
        found = set()
        for node in ast.walk(ast.parse(self.text)):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.path}: imports are absolute"
                # `from dendsam_deploy import bundle` imports a module, `from dendsam_deploy.errors import X` a name.
                within = node.module == PACKAGE
                found |= {f"{node.module}.{alias.name}" for alias in node.names} if within else {str(node.module)}
        return found


def package_sources() -> list[Source]:
    return [Source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in ROOT.rglob("*.py")]


def violations(source: Source) -> list[str]:
    """Return everything in a file that breaks a rule of the house."""
    return [*wrong_directions(source), *homeless_vendors(source), *wrong_shape(source)]


def wrong_directions(source: Source) -> list[str]:
    """Return the imports that go up, or sideways between siblings."""
    if source.path in ("__init__.py", "__main__.py"):  # the door and the doorbell: they name everything
        return []
    if source.room not in LAYERS:
        return [f"{source.path}: {source.room} is no room of LAYERS"]
    found = []
    for module in source.imports:
        top, _, rest = module.partition(".")
        target = rest.partition(".")[0]
        if top != PACKAGE or target in ("", "__version__", source.room):
            continue
        only = ONLY_FILE_BETWEEN.get((source.room, target), source.path)
        sideways = {source.room, target} <= SIBLINGS
        if LAYERS[target] > LAYERS[source.room] or sideways or only != source.path:
            found.append(f"{source.path}: may not import {module}")
    return found


def homeless_vendors(source: Source) -> list[str]:
    """Return the imports of libraries that do not live there."""
    found = []
    for module in source.imports:
        library = module.partition(".")[0]
        if library in sys.stdlib_module_names or library in EVERYWHERE or library == PACKAGE:
            continue
        if not any(source.path.startswith(home) for home in VENDOR_HOMES.get(library, [])):
            found.append(f"{source.path}: is no home of {library}")
    return found


def wrong_shape(source: Source) -> list[str]:
    """Return what is wrong with the name and the length of a file."""
    found = []
    lines = source.text.count("\n")
    if lines > MAX_LINES:
        found.append(f"{source.path}: {lines} lines, at most {MAX_LINES}")
    for part in Path(source.path).with_suffix("").parts:
        if part in FORBIDDEN_NAMES:
            found.append(f"{source.path}: {part} says nothing")
        if part in LIBRARIES:
            found.append(f"{source.path}: bears the name of a library")
    return found


@pytest.mark.parametrize("source", package_sources(), ids=lambda source: source.path)
def test_file_keeps_the_rules(source) -> None:
    assert violations(source) == []


def test_every_room_exists() -> None:
    rooms = {source.room for source in package_sources()} - {"__init__", "__main__"}
    assert rooms == LAYERS.keys()


def test_every_home_is_lived_in() -> None:
    for library, homes in VENDOR_HOMES.items():
        for home in homes:
            tenants = [source for source in package_sources() if source.path.startswith(home)]
            used = any(module.partition(".")[0] == library for source in tenants for module in source.imports)
            assert used, f"{home} does not import {library}: strike the row"


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        ("metrics/a.py", "from dendsam_deploy.volume.open import open_volume", "may not import"),
        ("bundle/a.py", "from dendsam_deploy import pipeline", "may not import"),
        ("export/a.py", "from dendsam_deploy.runtimes.session import Session", "may not import"),
        ("training/a.py", "def f():\n    import dendsam_deploy.export.bundle", "may not import"),
        ("runtimes/a.py", "from dendsam_deploy.models.sam import build_sam", "may not import"),
        ("pipeline/a.py", "if TYPE_CHECKING:\n    from dendsam_deploy.cli.main import main", "may not import"),
        ("shed/a.py", "", "is no room"),
        ("pipeline/a.py", "import tifffile", "is no home of tifffile"),
        ("volume/folder.py", "from zarr.storage import LocalStore", "is no home of zarr"),
        ("pipeline/a.py", "import requests", "is no home of requests"),
        ("runtimes/openvino.py", "", "bears the name of a library"),
        ("volume/utils.py", "", "says nothing"),
        ("core/a.py", "", "says nothing"),
        ("volume/a.py", "\n" * 401, "401 lines"),
    ],
)
def test_the_checker_finds_what_breaks_a_rule(path, text, complaint) -> None:
    assert any(complaint in violation for violation in violations(Source(path, text)))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("volume/tiff_pages.py", "import tifffile\nimport numpy as np\nfrom dendsam_deploy.errors import VolumeError"),
        ("runtimes/torch_reference.py", "import torch\nfrom dendsam_deploy.models.sam import build_sam"),
        ("report/a.py", "from dendsam_deploy.evaluate.scores import ScoreReport"),
        ("cli/a.py", "import click\nfrom dendsam_deploy import __version__"),
        ("volume/a.py", "\n" * 400),
    ],
)
def test_the_checker_lets_what_is_right_pass(path, text) -> None:
    assert violations(Source(path, text)) == []
