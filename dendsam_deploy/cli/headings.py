"""Help pages of commands with many options: headings between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class SectionedCommand(click.Command):
    """A command whose help page lists its options under headings.

    Parameters
    ----------
    plain : click.Command
        The command without headings.
    headings : mapping of str to str
        The first option under each heading, such as ``--minutes``, and the heading. What comes before the first of
        them is listed as plain options.
    """

    def __init__(self, plain: click.Command, headings: Mapping[str, str]) -> None:
        super().__init__(plain.name, callback=plain.callback, params=plain.params, help=plain.help, epilog=plain.epilog)
        self._headings = headings

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, section by section."""
        sections: list[tuple[str, list[tuple[str, str]]]] = [("Options", [])]
        for parameter in self.get_params(ctx):
            heading = next((self._headings[word] for word in parameter.opts if word in self._headings), None)
            if heading is not None:
                sections.append((heading, []))
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections[-1][1].append(record)
        for heading, records in sections:
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


def with_headings(headings: Mapping[str, str]) -> Callable[[click.Command], click.Command]:
    """Give the help page of a command headings; see `SectionedCommand`."""

    def decorate(plain: click.Command) -> click.Command:
        return SectionedCommand(plain, headings)

    return decorate
