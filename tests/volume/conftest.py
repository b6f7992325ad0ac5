"""What tests of bad volumes share."""

from __future__ import annotations

import pytest

from dendsam_deploy.errors import DendsamError, InputFileError, UnsafeFileError
from dendsam_deploy.volume.intensity import to_uint8
from dendsam_deploy.volume.open import open_volume


@pytest.fixture
def assert_refused(capfd):
    """Use a volume as `segment` does; it must fail with one line that begins with its path and has the given parts."""

    def read_through(path):
        with open_volume(path) as volume:
            for z in range(volume.info.shape_zyx[0]):
                to_uint8(volume.read(z), f"{volume.info.source}: slice {z}")

    def check(path, parts):
        with pytest.raises(DendsamError) as caught:
            read_through(path)
        message = str(caught.value)
        assert isinstance(caught.value, (InputFileError, UnsafeFileError))
        assert message.startswith(str(path)), message
        assert "\n" not in message
        assert len(message) < 600
        assert not [part for part in parts if part not in message], message
        assert capfd.readouterr() == ("", ""), "nothing may be printed beside the error"

    return check
