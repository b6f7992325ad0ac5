"""Files that name the volumes of a training: what can be written, and what a mistake is answered with."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dendsam_deploy.errors import DendsamError, InvalidArgumentError, VolumeError
from dendsam_deploy.training.volume_list import LabelledPaths, read_volume_list, training_volumes


@pytest.fixture
def read(tmp_path):
    def call(text: str | bytes, name: str = "data.txt"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_volume_list(path)

    return call


COLUMNS = ["volume", "labels", "slices", "held_out", "weight", "voxel_size"]
ROW = ["a.tif", "a-labels.tif", "0:80", "70:80", "2"]
EQUIVALENT = {
    "words": "a.tif a-labels.tif slices=0:80 held-out=70:80 weight=2 voxel-size=40,15,15\nb b-labels\n",
    "comments": "# mine\n\na.tif a-labels.tif voxel_size=40x15x15 weight=2 slices=:80 held_out=70:80\r\n #\nb b-labels",
    "header": ",".join(COLUMNS) + "\n" + ",".join(ROW) + ',"40,15,15"\nb,b-labels,,,,\n',
    "other order": "Labels; Image; Weight; Held-Out; Voxel size nm; Slices\n"
    "a-labels.tif; a.tif; 2; 70:80; 40 15 15; 0:80\nb-labels; b\n",
    "tabs": "\t".join(COLUMNS) + "\n" + "\t".join(ROW) + "\t40,15,15\nb\tb-labels\n",
    "spreadsheet": "\ufeff" + ",".join(COLUMNS) + "\r\n" + ",".join(ROW) + ",40x15x15\r\n,,,,,\r\nb,b-labels,,,,\r\n",
    "quotes": "'a.tif' \"a-labels.tif\" 'slices=0:80' held-out=70:80 weight=2 'voxel-size=40, 15, 15'\n\"b\" b-labels",
}


@pytest.mark.parametrize("text", EQUIVALENT.values(), ids=EQUIVALENT)
def test_one_meaning_can_be_written_in_many_ways(read, tmp_path, text):
    first, second = read(text)
    assert (first.volume, first.labels) == (tmp_path / "a.tif", tmp_path / "a-labels.tif")
    assert (first.slices, first.held_out, first.weight) == ((0, 80), ((70, 80),), 2.0)
    assert first.voxel_size_nm == (40, 15, 15)
    assert (second.volume, second.labels) == (tmp_path / "b", tmp_path / "b-labels")
    assert (second.slices, second.held_out, second.weight, second.voxel_size_nm) == (None, (), 1.0, None)


@pytest.mark.parametrize(
    "line", ["a.tif,l.tif,0:80,2,40x15x15", "a.tif,l.tif,0:80,2,40,15,15", "a.tif l.tif 0:80 2 40,15,15"]
)
def test_columns_without_names_have_an_order(read, line):
    (entry,) = read(line)
    assert (entry.slices, entry.weight, entry.voxel_size_nm) == ((0, 80), 2.0, (40, 15, 15))


def test_names_with_spaces_and_absolute_paths(read, tmp_path):
    spaced, absolute = read(f'"my volume.tif" "my labels.tif"\n{tmp_path}/x.tif /y.tif\n')
    assert spaced.volume == tmp_path / "my volume.tif"
    assert (absolute.volume, absolute.labels) == (tmp_path / "x.tif", Path("/y.tif"))
    (entry,) = read("my volume.tif,my labels.tif\n", "data.csv")
    assert entry.labels == tmp_path / "my labels.tif"


def test_files_may_bear_the_names_of_columns(read, tmp_path):
    (tmp_path / "raw").mkdir()
    (entry,) = read("raw labels\n")
    assert (entry.volume, entry.labels) == (tmp_path / "raw", tmp_path / "labels")


def test_a_volume_can_only_teach_and_hold_out_several_blocks(read):
    several, none = read("a l held-out=3:5+9:12\nb l held-out=none\n")
    assert (several.held_out, several.only_teaches) == (((3, 5), (9, 12)), False)
    assert (none.held_out, none.only_teaches) == ((), True)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "names no volume"),
        ("# nothing\n", "names no volume"),
        ("volume,labels\n", "names columns but no volume"),
        ("a.tif\n", "line 1: the labels of a volume are missing"),
        ("a l\n\nb l slices=4\n", "line 3: slices is '4', expected a range A:B"),
        ("a l slices=8:4", "line 1: slices is '8:4'"),
        ("a l weight=0", "weight is '0', expected a positive number"),
        ("a l weight=heavy", "weight is 'heavy'"),
        ("a l weight=nan", "weight is 'nan'"),
        ("a l voxel-size=4,4", "voxel_size is '4,4', expected three lengths"),
        ("a l voxel-size=4,4,-1", "voxel_size is '4,4,-1'"),
        ("a l held-out=all", "held_out is 'all', expected a range .* or none"),
        ("a l weight=1 weight=2", "weight is given twice"),
        ("a l 0:4 slices=0:4", "'0:4' stands where slices stands"),
        ("a l 0:4 1 4x4x4 more", "'more' is one word too many"),
        ("'a l", "line 1: No closing quotation; put quotes on both sides"),
        ("volume,labels,depth\na,l,3\n", "line 1: 'depth' is no column"),
        ("volume,labels,labels\na,l,l\n", "line 1: 'labels' occurs twice"),
        ("labels,slices\na,0:3\n", "there is no column volume"),
        ("volume,labels\na,l,0:3\n", "line 2: 3 values for 2 columns"),
        ("volume,labels,weight\n,l,1\n", "line 2: the volume of a volume are missing"),
        (b"\xff\xfe\x00a", "not UTF-8 text"),
        (b"II*\x00" + bytes(2 << 20), "bytes are no list of volumes"),
    ],
)
def test_mistakes_are_named_with_their_line(read, text, part):
    with pytest.raises(VolumeError, match=part):
        read(text)


def test_a_missing_file_is_no_list(tmp_path):
    with pytest.raises(VolumeError, match="cannot be read"):
        read_volume_list(tmp_path / "none.txt")
    with pytest.raises(VolumeError, match="cannot be read"):
        read_volume_list(tmp_path)


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=120)
    | st.text(alphabet="ab.tif ,;\t=:\"'\n#slicesvolumelabels0123x-", max_size=120).map(str.encode)
)
def test_any_text_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "data.txt"
    path.write_bytes(content)
    refusal = ""
    entries = ()
    try:
        entries = read_volume_list(path)
    except DendsamError as error:
        refusal = str(error)
    assert bool(entries) != (str(path) in refusal)
    assert all(entry.weight > 0 and entry.place for entry in entries)


def test_the_command_line_and_a_file_add_up(tmp_path):
    (tmp_path / "more.txt").write_text("b bl\n")
    named = training_volumes(Path("a"), Path("al"), tmp_path / "more.txt")
    assert [entry.volume.name for entry in named] == ["a", "b"]
    assert training_volumes(Path("a"), Path("al")) == (LabelledPaths(Path("a"), Path("al")),)
    with pytest.raises(InvalidArgumentError, match="go together"):
        training_volumes(Path("a"), None)
    with pytest.raises(InvalidArgumentError, match="nothing to train on"):
        training_volumes(None, None)
