"""SWC files: what they say, and what is refused with file and line."""

import numpy as np
import pytest

from dendsam_deploy.errors import InputFileError
from dendsam_deploy.volume.skeletons import read_skeletons

FORK = """# made by hand
1 3 1.0 2.0 3.0 0.5 -1
2 3 1.0 2.0 4.0 0.5 1   # a comment
4 3 1.0 5.0 4.0 0.5 2

7 3 5.0 2.0 4.0 0.5 2
"""


def write(folder, name, text):
    (folder / name).write_text(text)
    return folder / name


def test_positions_edges_and_lengths(tmp_path):
    found = read_skeletons(write(tmp_path, "a.swc", FORK))
    assert found.nodes_um_zyx.tolist() == [[3, 2, 1], [4, 2, 1], [4, 5, 1], [4, 2, 5]]
    assert found.edges.tolist() == [[1, 0], [2, 1], [3, 1]]
    assert found.lengths_um.tolist() == [1, 3, 4]
    assert found.names == ("a.swc, tree 1",)


def test_a_file_holds_one_skeleton_for_each_root(tmp_path):
    text = FORK + "8 3 0 0 0 1 -1\n9 3 0 0 1 1 8\n3 3 9 9 9 1 9\n"
    assert read_skeletons(write(tmp_path, "a.swc", text)).skeleton.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_a_child_may_stand_before_its_parent(tmp_path):
    lines = [line for line in FORK.splitlines() if line[:1].isdigit()]
    found = read_skeletons(write(tmp_path, "a.swc", "\n".join(reversed(lines))))
    assert len(set(found.skeleton.tolist())) == 1
    assert sorted(found.lengths_um.tolist()) == [1, 3, 4]


def test_in_a_folder_each_file_is_one_skeleton(tmp_path):
    write(tmp_path, "b.swc", "1 3 0 0 0 1 -1\n2 3 0 0 2 1 -1\n")
    write(tmp_path, "a.swc", FORK)
    write(tmp_path, "._a.swc", "\x00")
    found = read_skeletons(tmp_path)
    assert found.names == ("a.swc", "b.swc")
    assert found.skeleton.tolist() == [0, 0, 0, 0, 1, 1]
    assert found.edges.max() == 3


def test_a_long_chain(tmp_path):
    count = 20000
    text = "\n".join(f"{i} 3 0 0 {i} 1 {i - 1 if i > 1 else -1}" for i in range(1, count + 1))
    found = read_skeletons(write(tmp_path, "a.swc", text))
    assert not found.skeleton.any()
    assert found.lengths_um.sum() == count - 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no nodes"),
        ("# nothing\n", "holds no nodes"),
        ("1 3 0 0 0 1\n", "line 1 is '1 3 0 0 0 1', expected 7 numbers"),
        ("1 3 0 zero 0 1 -1\n", "line 1 is"),
        ("1 3 0 0 nan 1 -1\n", "line 1 has a position that is not finite"),
        ("1 3 0 0 0 1 -1\n1 3 0 0 1 1 1\n", "line 2 repeats the node 1"),
        ("1 3 0 0 0 1 -1\n2 3 0 0 1 1 5\n", "names the parent 5"),
        ("1 3 0 0 0 1 2\n2 3 0 0 1 1 1\n", "form a ring"),
        ("1 3 0 0 0 1 1\n", "form a ring"),
        ("PK\x03\x04\xff", "expected 7 numbers"),
    ],
)
def test_what_is_no_tree_is_refused(tmp_path, text, message):
    path = write(tmp_path, "a.swc", text)
    for place in (path, tmp_path):
        with pytest.raises(InputFileError, match=message) as raised:
            read_skeletons(place)
        assert str(path) in str(raised.value)


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputFileError, match="cannot be read"):
        read_skeletons(tmp_path / "none.swc")
    with pytest.raises(InputFileError, match=r"no \.swc files"):
        read_skeletons(tmp_path)


def test_positions_are_numbers_of_their_own(tmp_path):
    assert read_skeletons(write(tmp_path, "a.swc", FORK)).nodes_um_zyx.dtype == np.float64
