"""From an ONNX file to a TensorRT engine. Precision is what the file says: every network is strongly typed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, SupportsInt

from dendsam_deploy.errors import BundleError, MissingCapabilityError
from dendsam_deploy.progress import Progress, ProgressCallback, no_progress
from dendsam_deploy.runtimes.gpu_engine_cache import BuiltEngine
from dendsam_deploy.runtimes.gpu_engine_library import (
    CollectingLogger,
    tensorrt,
    tensorrt_errors,
    tensorrt_version,
)
from dendsam_deploy.runtimes.gpu_engine_plan import Bounds, Profile, count_fused_attention

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BUILD_SETTINGS = "strongly typed, fp32 without TF32"
"""What every build has in common and another version of this program might do otherwise; part of the cache's key."""

_STAGE = "compile"
_NOTE_CHARACTERS = 80


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How an engine is compiled.

    Parameters
    ----------
    profiles : tuple of Profile
        The shapes it is compiled for.
    workspace_bytes : int
        Most memory of the GPU that one layer may use while it computes.
    timings : bytes
        What an earlier build on this machine measured; may be empty.
    time_limit_s : float
        The build is given up after this time.
    """

    profiles: tuple[Profile, ...]
    workspace_bytes: int = 4 * 2**30
    timings: bytes = b""
    time_limit_s: float = 3600.0


@dataclass(frozen=True, slots=True)
class Build:
    """What a build returned.

    Parameters
    ----------
    engine : BuiltEngine
        The engine.
    timings : bytes
        What was measured, for the next build.
    """

    engine: BuiltEngine
    timings: bytes


def engine_from_onnx(path: Path, options: BuildOptions, progress: ProgressCallback = no_progress) -> Build:
    """Compile an ONNX file, with any external data that it names, for the current GPU.

    Parameters
    ----------
    path : Path
        The file; the bundle has checked its external data.
    options : BuildOptions
        How.
    progress : callable
        Told how far it is. An exception that it raises stops the build.

    Raises
    ------
    BundleError
        Where TensorRT cannot use the graph; lists everything that its parser said.
    MissingCapabilityError
        Where it finds no way to compute it on this GPU, or not in time.
    """
    logger = CollectingLogger()
    with tensorrt_errors(path, logger):
        return _build(path, options, progress, logger)


def describe_fusion(engine: BuiltEngine, name: str) -> str:
    """Say how many attentions of a graph were fused, for people."""
    fused, all_of_them = engine.fused_attention_layers, engine.attention_layers
    text = f"{name}: {fused} of {all_of_them} attention layers in one kernel each"
    return text if fused >= all_of_them else f"{text}; the others are slower"


def _build(path: Path, options: BuildOptions, progress: ProgressCallback, logger: CollectingLogger) -> Build:
    """Compile; see `engine_from_onnx`."""
    builder = tensorrt.Builder(logger)
    network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(network, path, logger)
    config = _configure(builder, options)
    for profile in options.profiles:
        _add_profile(builder, network, config, profile, path)
    monitor = _Monitor(progress, path.name, options.time_limit_s)
    config.progress_monitor = monitor
    serialized = builder.build_serialized_network(network, config)
    monitor.reraise()
    if serialized is None:
        raise MissingCapabilityError(
            f"{path}: TensorRT {tensorrt_version()} finds no way to compute the graph on this GPU ({logger.take()}); "
            "free its memory, export the bundle at another precision, or choose --engine onnxruntime"
        )
    plan = bytes(serialized)
    engine = BuiltEngine(plan, _count_attention(network), _count_fused(plan, path, logger))
    progress(Progress(_STAGE, 1, 1, describe_fusion(engine, path.name)))
    return Build(engine, bytes(config.get_timing_cache().serialize()))


def _parse(network: tensorrt.INetworkDefinition, path: Path, logger: CollectingLogger) -> None:
    """Fill a network from a file. Weights beyond 2 GiB lie beside it, so that it is named and not read here."""
    parser = tensorrt.OnnxParser(network, logger)
    if parser.parse_from_file(str(path)):
        return
    errors = [parser.get_error(number) for number in range(parser.num_errors)]
    reasons = [f"{error.node_operator()} {error.node_name()}: {' '.join(error.desc().split())}" for error in errors]
    reason = "; ".join(dict.fromkeys(reasons)) or logger.take()
    raise BundleError(
        f"{path}: the parser of TensorRT {tensorrt_version()} refuses the graph ({reason}); "
        "export the bundle again, or choose --engine onnxruntime"
    )


def _configure(builder: tensorrt.Builder, options: BuildOptions) -> tensorrt.IBuilderConfig:
    """Return the settings of a build."""
    config = builder.create_builder_config()
    config.clear_flag(tensorrt.BuilderFlag.TF32)  # on by default: float32 would be multiplied with 10 bits of mantissa
    config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    config.profiling_verbosity = tensorrt.ProfilingVerbosity.DETAILED  # else the inspector names no kernels
    timings = config.create_timing_cache(options.timings)
    if timings is None or not config.set_timing_cache(timings, ignore_mismatch=False):  # of another version, say
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    return config


def _add_profile(
    builder: tensorrt.Builder,
    network: tensorrt.INetworkDefinition,
    config: tensorrt.IBuilderConfig,
    profile: Profile,
    path: Path,
) -> None:
    """Add the shapes that an engine is to take.

    An input whose values decide shapes, as the decoder's region does, is a *shape tensor*: TensorRT reads it on the
    host before it executes anything, and wants the bounds of its values as it wants those of axes elsewhere.
    """
    made = builder.create_optimization_profile()
    for number in range(network.num_inputs):
        tensor = network.get_input(number)
        name = tensor.name
        if name not in profile.shapes or (tensor.is_shape_tensor and name not in profile.values):
            raise BundleError(f"{path}: no bounds are known for the input {name!r}; export the bundle again")
        try:
            if tensor.is_shape_tensor:
                values = profile.values[name]
                made.set_shape_input(name, values.least, values.usual, values.most)
            else:
                made.set_shape(name, *_dims(profile.shapes[name]))
        except (RuntimeError, ValueError, TypeError) as error:
            raise BundleError(f"{path}: TensorRT refuses the bounds of {name!r} ({error}); export again") from error
    if config.add_optimization_profile(made) < 0:
        raise BundleError(f"{path}: TensorRT refuses the bounds {profile.to_document()}; export the bundle again")


def _dims(bounds: Bounds) -> tuple[tensorrt.Dims, tensorrt.Dims, tensorrt.Dims]:
    """Return bounds as TensorRT writes shapes."""
    return tensorrt.Dims(bounds.least), tensorrt.Dims(bounds.usual), tensorrt.Dims(bounds.most)


def _count_attention(network: tensorrt.INetworkDefinition) -> int:
    """Return the number of attentions in a network: one softmax each, or one layer of their own."""
    kinds = [network.get_layer(number).type for number in range(network.num_layers)]
    return kinds.count(tensorrt.LayerType.SOFTMAX) + kinds.count(tensorrt.LayerType.ATTENTION_INPUT)


def _count_fused(plan: bytes, path: Path, logger: CollectingLogger) -> int:
    """Return how many attentions a compiled engine computes in one kernel."""
    runtime = tensorrt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise MissingCapabilityError(f"{path}: TensorRT does not load the engine that it built ({logger.take()})")
    text = engine.create_engine_inspector().get_engine_information(tensorrt.LayerInformationFormat.JSON)
    try:
        return count_fused_attention(text)
    except ValueError as error:
        raise MissingCapabilityError(
            f"{path}: the inspector of TensorRT {tensorrt_version()} writes what this program cannot read ({error}); "
            "update dendsam-deploy"
        ) from error


class _Monitor(tensorrt.IProgressMonitor):
    """Hands TensorRT's account of a build on, and ends it when it takes too long or nobody wants it any more.

    TensorRT calls from threads of its own and swallows exceptions, so they are kept until the build has ended.
    """

    def __init__(self, progress: ProgressCallback, name: str, time_limit_s: float) -> None:
        tensorrt.IProgressMonitor.__init__(self)
        self._progress, self._name, self._limit_s = progress, name, time_limit_s
        self._deadline = time.monotonic() + time_limit_s
        self._steps: dict[str, int] = {}
        self._outermost = ""
        self._failure: BaseException | None = None

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: SupportsInt) -> None:
        """Begin a phase, of which others may be parts."""
        self._steps[phase_name] = int(num_steps)
        if not parent_phase:
            self._outermost = phase_name
        self._guarded(lambda: self._tell(phase_name, 0))

    def step_complete(self, phase_name: str, step: SupportsInt) -> bool:
        """Tell how far it is; returns whether to go on."""
        self._guarded(lambda: self._tell(phase_name, int(step) + 1))
        return self._failure is None

    def phase_finish(self, phase_name: str) -> None:
        """End a phase."""
        self._steps.pop(phase_name, None)

    def reraise(self) -> None:
        """Raise what ended the build, if it was not TensorRT."""
        if self._failure is not None:
            raise self._failure

    def _tell(self, phase: str, step: int) -> None:
        if time.monotonic() > self._deadline:
            raise MissingCapabilityError(
                f"{self._name}: compiling took more than {self._limit_s:.0f} s and was given up; end other work on "
                "the GPU and run again"
            )
        if phase == self._outermost:
            self._progress(
                Progress(_STAGE, step, max(1, self._steps.get(phase, 1)), f"{self._name}, {phase}"[:_NOTE_CHARACTERS])
            )

    def _guarded(self, act: Callable[[], None]) -> None:
        if self._failure is None:
            try:
                act()
            except BaseException as error:
                self._failure = error
