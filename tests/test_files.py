"""Files are complete or absent, and a lock has one holder."""

import pytest

from bigmix.files import atomic_write, lock_if_supported, replace_text, try_lock


def test_a_file_is_replaced_at_the_end_of_the_block(tmp_path):
    path = tmp_path / "numbers.json"
    replace_text(path, "old")
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "numbers.json"
    replace_text(path, "old")
    with pytest.raises(OSError, match="full"), atomic_write(path) as temporary:
        temporary.write_text("ne")
        raise OSError("the disk is full")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_lock_has_one_holder_until_its_file_is_closed(tmp_path):
    path = tmp_path / ".lock"
    with path.open("w") as first, path.open("w") as second:
        assert try_lock(first) and not try_lock(second.fileno())
        first.close()
        assert lock_if_supported(second)
