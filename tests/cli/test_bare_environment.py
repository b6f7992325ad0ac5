"""What segments needs neither torch nor the other packages of the extra ``train``, and never loads them."""

from __future__ import annotations

import re

import pytest
from command_outcome import run_python

TRAINING_PACKAGES = ["torch", "torchvision", "segment_anything", "ultralytics", "timm", "onnx", "onnxscript"]

ENGINES = ("captured", "compiled_cpu", "gpu_")
"""How the files of engines begin that are extras: torch, OpenVINO, TensorRT."""

BARE = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {TRAINING_PACKAGES}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""
"""Makes a process look like an installation without the extra ``train``."""

REPORT_LOADED = f"""
import sys
loaded = sorted(set({TRAINING_PACKAGES}) & set(sys.modules))
"""


def test_segmenting_and_evaluating_load_no_training_package(discs, bundle, tmp_path) -> None:
    program = f"""
import sys
import dendsam_deploy
from dendsam_deploy.cli.main import main
volume, labels, bundle, out = sys.argv[1:]
assert main(["-h"]) == 0
assert main(["segment", "-h"]) == 0
assert main(["segment", volume, "-b", bundle, "-o", out, "--boxes", labels, "-q"]) == 0
assert main(["evaluate", out + "/labels.tif", labels]) == 0
assert main(["verify", bundle]) == 0
assert main(["info", bundle]) == 0
{REPORT_LOADED}
print("loaded:", loaded)
"""
    outcome = run_python(program, discs / "raw.tif", discs / "labels.tif", bundle, tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[-1] == "loaded: []"


def test_the_check_of_loaded_packages_can_fail() -> None:
    assert run_python(f"import torch\n{REPORT_LOADED}\nprint(loaded)").out.strip() != "[]"


@pytest.mark.parametrize("words", [["export"], ["finetune", "sam"], ["finetune", "detector"], ["demo"]], ids=" ".join)
def test_help_pages_wait_for_no_training_package(words) -> None:
    program = (
        f"from dendsam_deploy.cli.main import main\nassert main({[*words, '-h']}) == 0{REPORT_LOADED}print(loaded)"
    )
    outcome = run_python(program)
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[-1] == "[]"


def test_every_help_page_and_module_for_deploying_works_without_the_training_packages() -> None:
    program = f"""{BARE}
import importlib, pkgutil
import click
import dendsam_deploy
from dendsam_deploy.cli.main import main, program
from dendsam_deploy.errors import MissingCapabilityError
def pages(group, words):
    for name, member in group.commands.items():
        assert main([*words, name, "-h"]) == 0, name
        if isinstance(member, click.Group):
            pages(member, [*words, name])
pages(program, [])
absent = []
for module in pkgutil.walk_packages(dendsam_deploy.__path__, "dendsam_deploy."):
    if module.name == "dendsam_deploy.__main__":
        continue
    try:
        importlib.import_module(module.name)
    except (ModuleNotFoundError, MissingCapabilityError):
        absent.append(module.name)
print("absent:", *absent)
"""
    outcome = run_python(program)
    assert outcome.code == 0, outcome.err
    # It trains, exports and judges in turn, and only the command of its name loads it.
    absent = set(outcome.out.splitlines()[-1].split()[1:]) - {"dendsam_deploy.evaluate.rounds"}
    rooms = {name.split(".")[1] for name in absent}
    assert rooms <= {"models", "training", "export", "runtimes"}
    runtimes = {name.split(".")[2] for name in absent if name.startswith("dendsam_deploy.runtimes")}
    assert {"torch_reference", "captured"} <= runtimes
    # Engines whose own package is missing say so when they are imported; nothing else may need a package.
    assert {name for name in runtimes if not name.startswith(ENGINES)} == {"torch_reference"}


@pytest.mark.parametrize(
    "words",
    [
        ["demo", "-o", "demo"],
        ["export", "--sam", "a.pt", "-o", "exports/a"],
        ["finetune", "sam", "a.tif", "b.tif", "-o", "c.pt"],
        ["finetune", "detector", "a.tif", "b.tif", "-o", "c.pt"],
    ],
    ids=" ".join,
)
def test_commands_of_the_extra_say_how_to_install_it(words) -> None:
    outcome = run_python(f"{BARE}\nfrom dendsam_deploy.cli.main import main\nsys.exit(main({words}))")
    assert outcome.code == 3
    assert "which is not installed here; run: pip install 'dendsam-deploy[train]'" in outcome.message


def test_doctor_tells_what_is_missing() -> None:
    program = f"""{BARE}
from dendsam_deploy.cli.main import main
sys.exit(main(["doctor"]))
"""
    outcome = run_python(program)
    assert outcome.code == 0, outcome.err
    assert re.search(r"engine onnxruntime on cpu +yes", outcome.out)
