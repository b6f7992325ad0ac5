"""Options and arguments that several commands share.

============================  ===============================================  =========================================
option                        commands                                         meaning
============================  ===============================================  =========================================
``-b, --bundle``              segment                                          the bundle; else the only one of exports/
``--slices A:B``              segment, verify, evaluate, finetune ...          slices from A to before B, counted from 0
``--voxel-size Z,Y,X``        segment, benchmark, finetune sam and detector,   nm, in place of what the file records
                              phantom
``--engine, --device,``       segment, verify, benchmark                       what the graphs run on
``--precision, --threads,``
``--trust-engine``
``--json FILE``               every command that prints a result               the result for programs; ``-`` is stdout
``-q``, ``-v``                every command                                    say less, say more
============================  ===============================================  =========================================

A default exists once, in the library's options dataclasses. `Settings` hands them only what the user gave, and reads
what it shows as a default from them when a help page is printed.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dendsam_deploy.cli.console import Console
from dendsam_deploy.errors import MissingCapabilityError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Kind = click.ParamType[Any] | type
    """Type of one value of an option."""

Function = TypeVar("Function", bound="Callable[..., None]")


class _AnyPath(click.Path):
    """A path that may be anything but empty."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401 - as click declares it
        if str(value) == "":
            self.fail("the path is empty; is a variable of the shell not set?", param, ctx)
        return super().convert(value, param, ctx)


class _ResultFile(_AnyPath):
    """A file to write whose name says what it is, so that no input of another kind is ever overwritten.

    Parameters
    ----------
    suffixes : str
        Names of files that may be replaced end with one of these.
    """

    def __init__(self, *suffixes: str) -> None:
        super().__init__(path_type=Path, readable=False, allow_dash=".json" in suffixes)
        self._suffixes = suffixes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401 - as click declares it
        path = super().convert(value, param, ctx)
        if str(path) == "-":
            return path
        if path.is_dir():
            self.fail(f"{path} is a folder; name the file to write", param, ctx)
        if path.exists() and path.suffix.lower() not in self._suffixes:
            self.fail(f"{path} exists and is no {self._suffixes[0]} file; choose another name", param, ctx)
        if not path.parent.is_dir():
            self.fail(f"{path.parent} is no folder; make it first or choose another place", param, ctx)
        return path


PATH = _AnyPath(path_type=Path, readable=False)
"""A path. Whether it can be used is for the library to say, which names what it found there."""

JSON_FILE = _ResultFile(".json")
HTML_FILE = _ResultFile(".html", ".htm")
CSV_FILE = _ResultFile(".csv")


def command(name: str, example: str) -> Callable[[Callable[..., None]], click.Command]:
    """Make a function a command with ``-q`` and ``-v`` whose help ends with an example.

    Parameters
    ----------
    name : str
        Name of the command.
    example : str
        Its arguments as a user would type them.
    """

    def decorate(function: Callable[..., None]) -> click.Command:
        made = click.command(name, epilog=f"\b\nExample:\n  dendsam-deploy {example}")(function)
        made.params += [
            click.Option(["-q", "--quiet"], is_flag=True, expose_value=False, callback=_say_less, help="Say less."),
            click.Option(
                ["-v", "--verbose"],
                count=True,
                expose_value=False,
                callback=_say_more,
                help="Show warnings of other libraries; -vv: their log, and tracebacks.",
            ),
        ]
        return made

    return decorate


def json_option(function: Function) -> Function:
    """Add ``--json FILE``, which arrives as `json_file`."""
    help_text = "Write the result as JSON; - prints it instead."
    return click.option("--json", "json_file", type=JSON_FILE, metavar="FILE", help=help_text)(function)


def output_option(help_text: str, *, required: bool = False) -> Callable[[Function], Function]:
    """Add ``-o, --out PATH``, which arrives as `out`."""
    return click.option("-o", "--out", type=PATH, metavar="PATH", required=required, help=help_text)


def bundle_option(function: Function) -> Function:
    """Add ``-b, --bundle DIR``, which arrives as `bundle`."""
    option = click.option(
        "-b",
        "--bundle",
        type=PATH,
        metavar="DIR",
        help="Exported bundle.  [default: the only one in exports/, else $DENDSAM_BUNDLE]",
    )
    return option(function)


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Say which extra to install where an import in the block fails.

    Raises
    ------
    MissingCapabilityError
        Names the package and the line that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == __package__.partition(".")[0]:
            raise
        raise MissingCapabilityError(
            f"needs the package {error.name!r}, which is not installed here; run: pip install 'dendsam-deploy[{name}]'"
        ) from error


def word(name: str, read: Callable[[str], object]) -> click.ParamType[Any]:
    """Make the type of an option from a function that reads one word.

    Parameters
    ----------
    name : str
        How help pages write such a word, for example ``A:B``.
    read : callable
        Raises `click.BadParameter` for a word that it cannot read.
    """
    kind = click.types.FuncParamType(read)
    kind.name = name
    return kind


def read_slices(text: str) -> tuple[int, int]:
    """Read ``A:B``, the slices from A to before B; a missing A is 0."""
    first, colon, stop = text.partition(":")
    if not colon or not stop.isdecimal() or not (first or "0").isdecimal():
        raise click.BadParameter(f"{text!r} is no range of slices, expected A:B such as 0:40")
    pair = int(first or 0), int(stop)
    if pair[0] >= pair[1]:
        raise click.BadParameter(f"{text!r} names no slice, expected A:B with A below B")
    return pair


def read_voxel_size(text: str) -> tuple[float, float, float]:
    """Read ``Z,Y,X``, three lengths in nm."""
    try:
        z, y, x = (float(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no voxel size, expected three lengths in nm such as 40,15,15") from error
    if not all(0 < length < math.inf for length in (z, y, x)):
        raise click.BadParameter(f"{text!r} is no voxel size, lengths are positive, such as 40,15,15")
    return z, y, x


SLICES = word("A:B", read_slices)
VOXEL_SIZE = word("Z,Y,X", read_voxel_size)


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of a command that are fields of one of the library's options dataclasses.

    Parameters
    ----------
    target : str
        ``module:Class``. It is named and not imported, because help pages must do without the libraries that most of
        these modules need.
    """

    target: str

    def option(self, flag: str, field: str, kind: Kind | list[Kind], help_text: str) -> Callable[[Function], Function]:
        """Add an option that sets a field.

        Parameters
        ----------
        flag : str
            Such as ``--slices`` or ``-o, --out``.
        field : str
            Name of the field.
        kind : click.ParamType or type
            Type of the value. A list of one type makes the option repeatable.
        help_text : str
            What it does.
        """
        return click.option(
            *flag.split(", "),
            cls=_FieldOption,
            type=kind[0] if isinstance(kind, list) else kind,
            multiple=isinstance(kind, list),
            expose_value=False,
            callback=self._keeper(field),
            show_default=f"{self.target}.{field}",
            help=help_text,
        )

    def flag(self, flag: str, field: str, help_text: str) -> Callable[[Function], Function]:
        """Add a switch that sets a field to true, or to false where its name begins with ``--no-``."""
        value = not flag.startswith("--no-")

        def keep(context: click.Context, parameter: click.Parameter, is_given: bool) -> None:
            if is_given:
                self._given(context)[field] = value

        return click.option(flag, is_flag=True, expose_value=False, callback=keep, help=help_text)

    def given(self, context: click.Context) -> dict[str, Any]:
        """Return the fields that the user set."""
        return dict(self._given(context))

    def _given(self, context: click.Context) -> dict[str, Any]:
        given: dict[str, Any] = context.meta.setdefault(self.target, {})
        return given

    def _keeper(self, field: str) -> Callable[[click.Context, click.Parameter, object], None]:
        def keep(context: click.Context, parameter: click.Parameter, value: object) -> None:
            if value is not None and value != ():
                self._given(context)[field] = value

        return keep


class _FieldOption(click.Option):
    """An option whose default is that of a dataclass field, which `show_default` names as ``module:Class.field``."""

    def get_help_extra(self, ctx: click.Context) -> click.types.OptionHelpExtra:
        """Add the default, if there is one and its module can be imported here."""
        extras = super().get_help_extra(ctx)
        del extras["default"]  # click would print the name of the field
        default = default_of(str(self.show_default))
        if default not in (None, (), ""):
            extras["default"] = _written(default)
        return extras


def default_of(reference: str) -> object:
    """Return the default of a field named as ``module:Class.field``; None where its module cannot be imported."""
    module_name, _, path = reference.partition(":")
    class_name, _, field_name = path.partition(".")
    try:
        kind = getattr(importlib.import_module(module_name), class_name)
    except ModuleNotFoundError:
        return None
    field = next(field for field in dataclasses.fields(kind) if field.name == field_name)
    return None if field.default is dataclasses.MISSING else field.default


def _written(value: object) -> str:
    """Write a default as one would type it."""
    if isinstance(value, tuple):
        return ",".join(map(_written, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


ENGINES = click.Choice(["onnxruntime", "onnxruntime+tensorrt", "openvino", "tensorrt", "torch", "torch+package"])
PRECISIONS = click.Choice(["fp32", "fp16", "bf16", "int8"])
TRUST = "SHA-256 of a compiled engine to load although it was made elsewhere. Loading it runs code. Repeatable."

RUNTIME = Settings("dendsam_deploy.runtimes.session:SessionOptions")


def runtime_options(function: Function) -> Function:
    """Add what the graphs run on, from ``--engine`` to ``--trust-engine``, read by `RUNTIME`."""
    engines = click.Choice(["auto", *ENGINES.choices])
    for option in (
        RUNTIME.option("--trust-engine", "trusted_engines", [str], TRUST),
        RUNTIME.option("--threads", "threads", click.IntRange(1), "Threads of one operator on the CPU."),
        RUNTIME.option("--precision", "precision", PRECISIONS, "Precision of the graphs."),
        RUNTIME.option("--device", "device", str, "auto, cpu or cuda[:N]."),
        RUNTIME.option("--engine", "engine", engines, "What executes the graphs."),
    ):
        function = option(function)
    return function


AUGMENT = click.Choice(["none", "light", "em"])

_DATA_HELP = (
    "File with one labelled volume in each line, in place of or besides VOLUME LABELS, such as: "
    "raw.tif labels.tif slices=0:80 held-out=70:80 weight=2 voxel-size=40,15,15; or a CSV table of these columns. "
    "Paths are relative to the file. The other options hold where a line says nothing else."
)


def data_options(settings: Settings) -> Callable[[Function], Function]:
    """Add what a training takes from a labelled volume: the fields of ``training.options.DataOptions``.

    Parameters
    ----------
    settings : Settings
        Those of an options class that has these fields.
    """

    def decorate(function: Function) -> Function:
        for option in (
            settings.option("--augment", "augment", AUGMENT, "How much training tiles are varied."),
            settings.option("--voxel-size", "voxel_size_nm", VOXEL_SIZE, "nm, in place of what the file records."),
            settings.option("--background-label", "background_labels", [int], "Label that is no object. Repeatable."),
            settings.option("--zoom", "zoom", float, "Model px per slice px.  [default: planned from the objects]"),
            settings.option("--gap", "gap", int, "Least slices between those that train and those that judge."),
            settings.option("--held-out", "held_out", [SLICES], "Slices that only judge, by name. Repeatable."),
            settings.option("--holdout", "holdout_fraction", float, "Part of them, the last block, that only judges."),
            settings.option("--slices", "slices", SLICES, "Slices to use, for training and judging together."),
            settings.option("--data", "data", PATH, _DATA_HELP),
        ):
            function = option(function)
        return function

    return decorate


def _say_less(context: click.Context, parameter: click.Parameter, is_quiet: bool) -> None:
    if is_quiet:
        context.ensure_object(Console).set_verbosity(-1)


def _say_more(context: click.Context, parameter: click.Parameter, count: int) -> None:
    if count:
        context.ensure_object(Console).set_verbosity(count)
