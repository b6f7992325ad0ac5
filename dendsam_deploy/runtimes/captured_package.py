"""Programs compiled ahead of time: packages of native code that later sessions load instead of compiling.

A package holds the code of one program for one set of shapes; the weights stay in the bundle's graph and are handed to
it when it is loaded. Loading one runs code that it brings along, so packages lie in the bundle's cache of compiled
engines and obey its rule: only what this user compiled on this machine is loaded, or what is trusted by its digest.

References
----------
AOTInductor: https://docs.pytorch.org/docs/stable/torch.compiler_aot_inductor.html
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dendsam_deploy import __version__
from dendsam_deploy.host import examine_host
from dendsam_deploy.runtimes.gpu_engine_cache import BuiltEngine, EngineCache, EngineIdentity

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, fx

    from dendsam_deploy.bundle.manifest import GraphSpec
    from dendsam_deploy.runtimes.captured_replay import Program


@dataclass(frozen=True, slots=True)
class Packages:
    """The packages of one graph on one device.

    Parameters
    ----------
    cache : EngineCache
        Where they lie.
    spec : GraphSpec
        The graph.
    device : torch.device
        What executes it.
    """

    cache: EngineCache
    spec: GraphSpec
    device: torch.device

    def load(self, program: fx.GraphModule, inputs: tuple[Tensor, ...], variant: str) -> Program:
        """Return a program as native code, compiled now if it never was.

        Parameters
        ----------
        program : fx.GraphModule
            From `captured_program.program_of`.
        inputs : tuple of Tensor
            Of the shapes that it is for.
        variant : str
            What else tells it from other programs of the graph.

        Raises
        ------
        UnsafeFileError
            Where a package lies there that was altered or made elsewhere.
        StorageError
            Where the file system refuses.
        """
        identity = self.identity(program, inputs, variant)
        stored = self.cache.obtain(identity, lambda: BuiltEngine(_compiled(program, inputs)))
        index = self.device.index if self.device.type == "cuda" else -1
        loaded = torch._inductor.aoti_load_package(io.BytesIO(stored.built.plan), device_index=index)
        constants = dict(program.named_buffers())
        wanted = {name: constants[name] for name in loaded.get_constant_fqns()}
        loaded.load_constants(wanted, check_full_update=True, user_managed=True)
        return _Packaged(loaded, wanted)

    def identity(self, program: fx.GraphModule, inputs: tuple[Tensor, ...], variant: str) -> EngineIdentity:
        """Return what a package must have been compiled for; takes what `load` does.

        Even a package for a GPU holds code for the processor, compiled for every instruction that this one has: on
        another one of the same architecture it may be illegal. And the program is this version's translation of the
        graph, not the graph.
        """
        shapes = [[str(value.dtype), list(value.shape)] for value in inputs]
        is_gpu = self.device.type == "cuda"
        host = examine_host()
        code = hashlib.sha256(program.code.encode()).hexdigest()
        return EngineIdentity(
            role=self.spec.role,
            precision=self.spec.precision,
            graph_sha256=tuple(file.sha256 for file in self.spec.files),
            gpu=torch.cuda.get_device_name(self.device) if is_gpu else "cpu",
            compute_capability="{}.{}".format(*torch.cuda.get_device_capability(self.device))
            if is_gpu
            else torch.backends.cpu.get_cpu_capability(),
            driver=f"{host.gpu_driver} (CUDA {torch.version.cuda})" if is_gpu else "",
            compiler=f"torch {torch.__version__}",
            profiles=json.dumps(shapes),
            host=" ".join((host.system, host.architecture, host.processor, *host.instructions)),
            settings=json.dumps([variant, code, f"dendsam-deploy {__version__}"]),
        )


@dataclass(frozen=True, slots=True)
class _Packaged:
    """A package that was loaded, and the weights, which it reads where they lie."""

    loaded: Callable[..., tuple[Tensor, ...]]
    weights: Mapping[str, Tensor]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Execute it."""
        return self.loaded(*inputs)


def _compiled(program: fx.GraphModule, inputs: tuple[Tensor, ...]) -> bytes:
    """Compile a program to a package without its weights."""
    settings = {"aot_inductor.package_constants_in_so": False}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        exported = torch.export.export(program, tuple(value.clone() for value in inputs))
        path = torch._inductor.aoti_compile_and_package(
            exported, package_path=str(Path(folder, "program.pt2")), inductor_configs=settings
        )
        return Path(path).read_bytes()
