"""From a template to a self-contained HTML page. The home of jinja."""

from __future__ import annotations

import base64
import math
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

if TYPE_CHECKING:
    from collections.abc import Mapping


def render_page(template: str, content: Mapping[str, object]) -> str:
    """Fill one of the templates of this package.

    Parameters
    ----------
    template : str
        Name in ``templates/``.
    content : mapping
        What the template speaks of. Strings are escaped, also where they come from file names.

    Returns
    -------
    str
        A page that needs nothing else: styles, charts and pictures are inside.
    """
    environment = Environment(
        loader=PackageLoader("dendsam_deploy.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        svg=Markup, png=png_uri, count=count_text, duration=duration_text, decimals=decimals_text, digits=digits_text
    )
    return environment.get_template(template).render(content)


def png_uri(data: bytes) -> str:
    """Return a PNG file as a ``data:`` address."""
    return f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"


def count_text(value: int) -> str:
    """Return a whole number with its thousands apart by thin spaces.

    Examples
    --------
    >>> count_text(1234567).replace(chr(0x202F), " ")
    '1 234 567'
    """
    return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def decimals_text(value: float, digits: int = 2) -> str:
    """Return a number with so many decimals, or a dash where there is none (NaN)."""
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def digits_text(value: float) -> str:
    """Return a number with three significant digits and without exponent, or a dash where there is none (NaN).

    Examples
    --------
    >>> digits_text(0.00123456), digits_text(12.3456), digits_text(45678.9)
    ('0.00123', '12.3', '45679')
    """
    if math.isnan(value):
        return "–"
    decimals = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(decimals, 0)}f}"


def duration_text(seconds: float) -> str:
    """Return a duration in the unit that a person would use.

    Examples
    --------
    >>> duration_text(0.0421), duration_text(75), duration_text(7384)
    ('42 ms', '1 min 15 s', '2 h 3 min')
    """
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds) // 60
    if minutes < 60:
        return f"{minutes} min {round(seconds) % 60} s"
    return f"{minutes // 60} h {minutes % 60} min"
