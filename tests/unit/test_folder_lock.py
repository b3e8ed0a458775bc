"""One run at a time holds a folder: a living one is never robbed, one that is gone never stands in the way."""

import json
import os
import threading
import time

import pytest

from rsa_megatron import folder_lock
from rsa_megatron.folder_lock import NAME, FolderLock


@pytest.fixture
def said():
    return []


@pytest.fixture
def lock(tmp_path, said):
    made = []

    def make() -> FolderLock:
        made.append(FolderLock(tmp_path / "run", lambda message: said.append("lost: " + message), said.append))
        return made[-1]

    yield make
    for one in made:
        one.release()


def write_holder(folder, **changes) -> None:
    """A lock as this process would hold it, but for the changes."""
    folder.mkdir(exist_ok=True)
    (folder / NAME).write_text(json.dumps(folder_lock._describe_this_process() | changes))


def test_a_living_run_keeps_others_out_until_it_releases(lock, tmp_path, said):
    first = lock()
    first.acquire()
    held = (tmp_path / "run" / NAME).read_bytes()
    with pytest.raises(ValueError, match=rf"run is in use by another run, process {os.getpid()} on \S+, since 20\d\d-"):
        lock().acquire()
    assert (tmp_path / "run" / NAME).read_bytes() == held
    first.release()
    assert list((tmp_path / "run").iterdir()) == []
    lock().acquire()
    assert said == []


def test_a_later_process_of_the_same_number_is_not_taken_for_the_holder(lock, tmp_path):
    write_holder(tmp_path / "run", begun="1")
    lock().acquire()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}'])
def test_a_file_that_names_no_run_is_no_lock(lock, tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / NAME).write_text(content)
    lock().acquire()


@pytest.mark.parametrize("lives", [True, False])
def test_on_another_machine_a_sign_of_life_decides(lock, tmp_path, said, monkeypatch, lives):
    """Whatever the clocks say: the holder's file may be years old by ours."""
    monkeypatch.setattr(folder_lock, "SECONDS_OF_SILENCE", 0.5)
    write_holder(tmp_path / "run", machine="another", host="node7", pid=1)
    path = tmp_path / "run" / NAME
    os.utime(path, (1e9, 1e9))
    beat = threading.Timer(0.1, os.utime, [path, (1e9 + 10, 1e9 + 10)])
    if lives:
        beat.start()
        with pytest.raises(ValueError, match="in use by another run, process 1 on node7"):
            lock().acquire()
    else:
        lock().acquire()
        assert said[-1].endswith("process 1 on node7 has ended without releasing it; taken over")
    assert "looking for a sign of life" in said[0]


def test_of_many_that_take_over_at_once_one_gets_it(lock, tmp_path):
    for _ in range(20):
        write_holder(tmp_path / "run", begun="1")
        locks, results = [lock() for _ in range(8)], []

        def try_one(one, results=results):
            try:
                one.acquire()
                results.append("taken")
            except ValueError:
                results.append("refused")

        threads = [threading.Thread(target=try_one, args=(one,)) for one in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(results) == ["refused"] * 7 + ["taken"]
        for one in locks:
            one.release()


def test_the_lock_is_renewed_and_its_loss_is_noticed(lock, tmp_path, said, monkeypatch):
    monkeypatch.setattr(folder_lock, "SECONDS_OF_A_BEAT", 0.05)
    first = lock()
    first.acquire()
    path = tmp_path / "run" / NAME
    os.utime(path, (1e9, 1e9))
    wait_until(lambda: path.stat().st_mtime > 1e9 + 1)
    assert said == []
    write_holder(tmp_path / "run", machine="another", host="node7", pid=1)
    wait_until(lambda: said)
    assert said[0].startswith("lost: ") and said[0].endswith("was taken over by another run, process 1 on node7")
    first.release()
    assert path.exists()  # it is the other's


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
