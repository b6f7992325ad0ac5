"""Options are fields of the library's dataclasses; a default exists once, in the field."""

from __future__ import annotations

import dataclasses
import importlib

import click
import pytest

from dendsam_deploy.cli.main import program
from dendsam_deploy.cli.options import Settings, default_of, extra, read_slices, read_voxel_size
from dendsam_deploy.errors import MissingCapabilityError


def leaves(group: click.Group = program, path: str = ""):
    for name, member in group.commands.items():
        if isinstance(member, click.Group):
            yield from leaves(member, f"{path}{name} ")
        else:
            yield f"{path}{name}", member


COMMANDS = dict(leaves())


def test_the_commands_are_those_of_the_contract_that_exist_so_far() -> None:
    assert set(COMMANDS) == {
        "demo",
        "doctor",
        "phantom",
        "info",
        "finetune sam",
        "finetune detector",
        "export",
        "verify",
        "benchmark",
        "segment",
        "pseudo-label",
        "rounds",
        "evaluate",
        "compare",
    }


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help_an_example_json_and_verbosity(run, name) -> None:
    outcome = run(*name.split(), "-h")
    assert (outcome.code, outcome.err) == (0, "")
    assert f"Example:\n    dendsam-deploy {name}" in outcome.out
    assert run(*name.split(), "--help").out == outcome.out
    for option in ("--json", "-q, --quiet", "-v, --verbose"):
        assert option in outcome.out


@pytest.mark.parametrize("name", list(COMMANDS))
def test_the_example_of_every_command_is_accepted_by_its_parser(name) -> None:
    command = COMMANDS[name]
    words = command.epilog.split("dendsam-deploy ", 1)[1].split()[len(name.split()) :]
    command.make_context(name, words, resilient_parsing=False)


def field_options():
    for name, command in COMMANDS.items():
        for option in command.params:
            if isinstance(option, click.Option) and ":" in str(option.show_default):
                yield pytest.param(name, option, id=f"{name} {option.opts[0]}")


@pytest.mark.parametrize(("name", "option"), list(field_options()))
def test_every_setting_is_a_field_and_shows_its_default(run, name, option) -> None:
    module, _, path = str(option.show_default).partition(":")
    kind, _, field_name = path.partition(".")
    fields = {field.name: field for field in dataclasses.fields(getattr(importlib.import_module(module), kind))}
    assert field_name in fields
    shown = option.get_help_extra(click.Context(COMMANDS[name])).get("default")
    default = fields[field_name].default
    if default in (None, (), dataclasses.MISSING):
        assert shown is None
    elif isinstance(default, str):
        assert shown == default
    else:
        expected = default if isinstance(default, tuple) else (default,)
        assert tuple(type(value)(word) for value, word in zip(expected, shown.split(","), strict=True)) == expected


def test_the_checker_of_settings_fails_on_a_field_that_does_not_exist() -> None:
    with pytest.raises(StopIteration):
        default_of("dendsam_deploy.pipeline.job:SegmentOptions.colour")


def test_only_what_was_given_reaches_the_library() -> None:
    settings = Settings("dendsam_deploy.pipeline.job:SegmentOptions")

    @click.command()
    @settings.option("--score", "detection_score", float, "")
    @settings.option("--label", "labels", [int], "")
    @settings.flag("--restart", "restart", "")
    @settings.flag("--no-resume", "resume", "")
    @click.pass_context
    def probe(context: click.Context) -> dict[str, object]:
        return settings.given(context)

    def given(*words: str) -> dict[str, object]:
        result: dict[str, object] = probe.main(list(words), standalone_mode=False)
        return result

    assert given() == {}
    assert given("--score", "0") == {"detection_score": 0.0}
    assert given("--label", "2", "--label", "5") == {"labels": (2, 5)}
    assert given("--restart", "--no-resume") == {"restart": True, "resume": False}


@pytest.mark.parametrize(("text", "pair"), [("0:4", (0, 4)), (":4", (0, 4)), ("12:13", (12, 13))])
def test_slices(text, pair) -> None:
    assert read_slices(text) == pair


@pytest.mark.parametrize("text", ["", "4", "4:", "a:b", "-1:3", "3:3", "5:2", "1:2:3", "1.5:2"])
def test_what_is_no_range_of_slices(text) -> None:
    with pytest.raises(click.BadParameter):
        read_slices(text)


def test_voxel_size() -> None:
    assert read_voxel_size("40,15.5,15") == (40.0, 15.5, 15.0)


@pytest.mark.parametrize("text", ["", "40", "40,15", "40,15,15,1", "a,b,c", "40,0,15", "nan,1,1", "inf,1,1"])
def test_what_is_no_voxel_size(text) -> None:
    with pytest.raises(click.BadParameter):
        read_voxel_size(text)


def test_a_missing_package_is_named_with_the_line_that_installs_it() -> None:
    remedy = r"'nonsense_package'.*pip install 'dendsam-deploy\[train\]'"
    with pytest.raises(MissingCapabilityError, match=remedy), extra("train"):
        import nonsense_package  # noqa: F401, PLC0415 - does not exist


def test_a_missing_module_of_our_own_is_a_bug() -> None:
    with pytest.raises(ModuleNotFoundError), extra("train"):
        import dendsam_deploy.nonsense  # noqa: F401, PLC0415 - does not exist
