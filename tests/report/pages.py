"""What a test can read from a page."""

import io
from html.parser import HTMLParser

import numpy as np
from PIL import Image

VOXEL_NM = (40.0, 10.0, 10.0)
FIRST_Z, STOP_Z = 2, 8
"""Voxel size and slices of the run that most tests report on."""

VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """A page that was read tag by tag; wrong nesting is an error.

    Attributes
    ----------
    text : str
        The text that a person sees.
    addresses : list of str
        Every address that the page refers to.
    ids : list of str
        Ids of elements.
    """

    def __init__(self, source):
        super().__init__()
        self.source, self.addresses, self.ids, self.tags = source, [], [], []
        self._open, self._text = [], []
        self.feed(source)
        self.close()
        assert not self._open, f"never closed: {self._open}"
        self.text = " ".join(" ".join(self._text).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._note(attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self._note(attrs)

    def _note(self, attrs):
        for name, value in attrs:
            if name in {"href", "src", "xlink:href", "data", "srcset", "action"}:
                self.addresses.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_endtag(self, tag):
        assert self._open[-1:] == [tag], f"</{tag}> closes {self._open[-3:]}"
        self._open.pop()

    def handle_data(self, data):
        if self._open and self._open[-1] not in {"style", "script"}:
            self._text.append(data)


def assert_self_contained(page):
    """Check that a page needs nothing but itself."""
    assert page.addresses
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    inside = {address[1:] for address in page.addresses if address.startswith("#")}
    assert inside <= set(page.ids)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "@import" not in page.source
    assert "url(http" not in page.source


def pixels(png):
    """Decode a PNG file."""
    return np.asarray(Image.open(io.BytesIO(png)))
