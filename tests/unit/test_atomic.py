"""Files and folders appear whole or not at all, whatever happens while they are written."""

import pytest

from rsa_megatron import atomic


def test_a_file_replaces_the_old_one_when_it_is_whole(tmp_path):
    path = tmp_path / "deep" / "a.json"
    atomic.write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), atomic.new_file(path) as unfinished:
        unfinished.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]
    atomic.write_text(path, "new")
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]


def test_a_folder_appears_when_it_is_whole_and_a_stale_one_is_not_taken_over(tmp_path):
    path = tmp_path / "a"
    with pytest.raises(OSError, match="full"), atomic.new_folder(path) as unfinished:
        (unfinished / "x").write_text("half")
        raise OSError("full")
    assert not list(tmp_path.iterdir())
    stale = tmp_path / "a.unfinished"
    stale.mkdir()
    (stale / "of a killed run").touch()
    with atomic.new_folder(path) as unfinished:
        (unfinished / "x").write_text("whole")
        assert not path.exists()
    assert [file.name for file in path.iterdir()] == ["x"] and not stale.exists()


def test_a_folder_does_not_replace_one_with_something_in_it(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").touch()
    with pytest.raises(OSError), atomic.new_folder(tmp_path / "a") as unfinished:
        (unfinished / "x").touch()
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["mine"]
