"""Boxes drawn elsewhere: YOLO text files, CSV tables, label volumes."""

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from dendsam_deploy.errors import InputFileError
from dendsam_deploy.volume.boxes import open_boxes

SHAPE = (4, 40, 80)  # slices, rows, columns


def write(folder, files):
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def read(path, shape=SHAPE):
    with open_boxes(path, shape) as source:
        return [source.for_slice(z) for z in range(shape[0])]


def test_yolo_files_of_five_and_six_columns(tmp_path):
    files = {f"s{z}.txt": "" for z in (8, 10, 11)} | {"s9.txt": "0 0.5 0.5 0.25 0.5\n3 0.1 0.2 0.2 0.4 0.75\n\n"}
    found = read(write(tmp_path, files))
    assert [len(each) for each in found] == [0, 2, 0, 0]  # s8, s9, s10, s11
    np.testing.assert_allclose(found[1].boxes_xyxy, [[30, 10, 50, 30], [0, 0, 16, 16]], atol=1e-5)
    np.testing.assert_allclose(found[1].scores, [1, 0.75])


@pytest.mark.parametrize(("numbers", "slices"), [((0, 2), (0, 2)), ((2, 4), (1, 3)), ((1, 2, 4), (0, 1, 3))])
def test_missing_files_are_slices_without_boxes(numbers, slices, tmp_path):
    found = read(write(tmp_path, {f"run7_{n:03d}.txt": "0 0.5 0.5 0.5 0.5\n" for n in numbers}))
    assert [z for z in range(4) if len(found[z])] == list(slices)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a1.txt", "a2.txt"), "from 0 or from 1 cannot be told"),
        (("a0.txt", "a4.txt"), "for slices 0 and 4"),
        (("a.txt", "b.txt"), "do not number"),
        (("a5.txt",), "do not number"),
        (("a1.txt", "b1.txt"), "do not number"),
        (("0.txt", "1.txt", "2.txt", "3.txt", "4.txt"), "do not number"),
    ],
)
def test_names_that_do_not_tell_the_slice_are_refused(names, message, tmp_path):
    with pytest.raises(InputFileError, match=message):
        read(write(tmp_path, dict.fromkeys(names, "")))


def test_the_list_of_classes_beside_box_files_is_no_slice(tmp_path):
    files = {f"s{z}.txt": "0 0.5 0.5 0.5 0.5\n" for z in range(4)} | {"classes.txt": "dendrite\n"}
    assert [len(each) for each in read(write(tmp_path, files))] == [1, 1, 1, 1]


def test_a_column_that_occurs_twice_is_ambiguous(tmp_path):
    (tmp_path / "boxes.csv").write_text("z,z,x0,y0,x1,y1\n0,1,2,3,4,5\n")
    with pytest.raises(InputFileError, match="names a column twice"):
        read(tmp_path / "boxes.csv")


def test_csv_in_any_order_of_columns_with_extra_ones(tmp_path):
    table = "\ufeffScore,z,label,X0,y0,x1,y1\n0.5,2,7,1,2,3.5,4\n1,0,8,0,0,80,40\n"
    (tmp_path / "boxes.csv").write_text(table)
    found = read(tmp_path / "boxes.csv")
    assert [len(each) for each in found] == [1, 0, 1, 0]
    assert found[2].boxes_xyxy.tolist() == [[1, 2, 3.5, 4]]
    assert found[2].scores.tolist() == [0.5]


boxes = st.tuples(st.floats(0, 70), st.floats(0, 30), st.floats(0.5, 9), st.floats(0.5, 9), st.floats(0, 1))


@settings(deadline=None, max_examples=40)
@given(rows=st.lists(st.tuples(st.integers(0, 3), boxes), max_size=12))
def test_csv_gives_back_what_was_written(tmp_path_factory, rows):
    file = tmp_path_factory.mktemp("boxes") / "boxes.csv"
    lines = [f"{z},{x!r},{y!r},{x + w!r},{y + h!r},{score!r}" for z, (x, y, w, h, score) in rows]
    file.write_text("\n".join(["z,x0,y0,x1,y1,score", *lines]))
    for z, found in enumerate(read(file)):
        wanted = [box for at, box in rows if at == z]
        np.testing.assert_allclose(found.scores, [box[4] for box in wanted], rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(
            found.boxes_xyxy.reshape(-1, 4),
            np.array([(x, y, x + w, y + h) for x, y, w, h, _ in wanted]).reshape(-1, 4),
            rtol=1e-6,
            atol=1e-9,
        )


def test_labels_give_the_box_of_each_piece(tmp_path):
    labels = np.zeros(SHAPE, np.uint16)
    labels[1, 2:5, 3:9] = 300
    labels[1, 20:21, 0:2] = 300
    tifffile.imwrite(tmp_path / "labels.tif", labels, photometric="minisblack")
    found = read(tmp_path / "labels.tif")
    assert [len(each) for each in found] == [0, 2, 0, 0]
    assert sorted(found[1].boxes_xyxy.tolist()) == [[0, 20, 2, 21], [3, 2, 9, 5]]
    with pytest.raises(InputFileError, match="same volume"):
        read(tmp_path / "labels.tif", (4, 40, 81))


BAD_LINES = {
    "0 0.5 0.5 0.5": "4 columns",
    "0 0.1 0.1 0.2 0.1 0.2 0.2 0.1 0.2": "9 columns",
    "0 0.5 half 0.5 0.5": "could not convert",
    "0 0.5 nan 0.5 0.5": "not finite",
    "0 40 20 10 10": "above 1",
    "0 0.5 0.5 0 0.5": "is empty or leaves",
    "0 0.99 0.5 0.5 0.5": "is empty or leaves",
    "0 0.5 0.5 0.5 0.5 7": "the score 7",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_yolo_lines_are_named(line, tmp_path):
    folder = write(tmp_path, {f"{z}.txt": "" for z in range(3)} | {"3.txt": f"0 0.5 0.5 0.1 0.1\n{line}\n"})
    with pytest.raises(InputFileError, match=BAD_LINES[line]) as caught:
        read(folder)
    assert "3.txt:2:" in str(caught.value)


BAD_TABLES = {
    "": "lacks z, x0, y0, x1, y1",
    "z,x,y\n1,2,3\n": "lacks x0, y0, x1, y1",
    "z,x0,y0,x1,y1\n9,1,1,2,2\n": "slice 9, the volume has slices 0 to 3",
    "z,x0,y0,x1,y1\n0.5,1,1,2,2\n": "slice 0.5",
    "z,x0,y0,x1,y1\n0,1,1,2\n": "has 4 columns",
    "z,x0,y0,x1,y1\n0,5,1,2,2\n": "is empty or leaves",
    "z,x0,y0,x1,y1\n0,1,1,200,2\n": "is empty or leaves",
    "z,x0,y0,x1,y1,score\n0,1,1,2,2,-1\n": "the score -1",
}


@pytest.mark.parametrize("table", BAD_TABLES)
def test_bad_tables_are_named(table, tmp_path):
    (tmp_path / "boxes.csv").write_text(table)
    with pytest.raises(InputFileError, match=BAD_TABLES[table]) as caught:
        read(tmp_path / "boxes.csv")
    assert "boxes.csv" in str(caught.value)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "boxes.csv").write_bytes(b"\xff\xfe\x00\x01")
    (tmp_path / "notes.json").write_text("{}")
    for name in ("boxes.csv", "notes.json", "absent.csv"):
        with pytest.raises(InputFileError, match=name):
            read(tmp_path / name)
