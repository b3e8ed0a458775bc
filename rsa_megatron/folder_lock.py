"""One run at a time writes to a folder: its run.lock says which, until it ends.

    {"host": "node7", "pid": 4711, "since": "2026-11-29 11:50:39", ...}

The file's time is the holder's sign of life: a thread renews it every few seconds. A lock is left behind by a run that was killed,
and is taken over: on the same machine at once, as its process is seen to be gone; of another machine once there has been no sign
of life for a while, which is watched for, not computed: clocks of machines differ.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

NAME = "run.lock"
#: between two signs of life
SECONDS_OF_A_BEAT = 10.0
#: without one, after which a run on another machine counts as gone. (An NFS client may show a file's time a minute late.)
SECONDS_OF_SILENCE = 90.0
#: for which a run whose launcher has gone may still be about to end
SECONDS_TO_END = 10.0


class FolderLock:
    """The lock of one folder.

    Args:
        folder: made if it is not there.
        when_lost: called, with a message, by the thread that renews the lock if another run has taken it over.
        say: gets a line where the lock is waited for, or was left behind.
    """

    def __init__(self, folder: Path, when_lost: Callable[[str], None], say: Callable[[str], None] = print):
        self._folder, self._path = Path(folder), Path(folder, NAME)
        self._when_lost, self._say = when_lost, say
        self._own: dict | None = None
        self._released = threading.Event()

    def acquire(self) -> None:
        """Take the lock, or raise ValueError where a living run holds it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        begin, gone = time.monotonic(), None
        while True:
            with _open_alone(self._path) as file:
                holder, beat = _read(file), os.fstat(file.fileno()).st_mtime_ns
                if holder is None or _has_ended(holder) or (holder, beat) == gone:
                    self._own = _describe_this_process()
                    _write(file, self._own)
                    break
            if not _is_of_this_machine(holder):
                gone = self._watch(holder, beat)
            elif _is_left_behind(holder) and time.monotonic() - begin < SECONDS_TO_END:
                time.sleep(0.1)
                continue
            if gone is None:
                raise ValueError(
                    f"{self._folder} is in use by another run, process {holder['pid']} on {holder['host']}, since "
                    f"{holder['since']}: wait for its end, or name another folder"
                )
        if holder:
            self._say(
                f"{self._folder}: process {holder['pid']} on {holder['host']} has ended without releasing it; taken over"
            )
        threading.Thread(target=self._renew, daemon=True).start()

    def release(self) -> None:
        """Give the lock back, if it is held."""
        if self._own is None:
            return
        self._released.set()
        if self._find_holder() == self._own:
            self._path.unlink(missing_ok=True)
        self._own = None

    def _watch(self, holder: dict, beat: int) -> tuple[dict, int] | None:
        """Return what was found if that stays as it is for as long as a run could be silent; None if it does not."""
        self._say(
            f"{self._folder}: locked by process {holder['pid']} on {holder['host']}; looking for a sign of life for up to "
            f"{SECONDS_OF_SILENCE:.0f} s"
        )
        end = time.monotonic() + SECONDS_OF_SILENCE
        while time.monotonic() < end:
            time.sleep(min(1.0, SECONDS_OF_SILENCE / 10))
            try:
                with self._path.open() as file:  # opened, not only looked at: NFS then asks its server
                    now = _read(file), os.fstat(file.fileno()).st_mtime_ns
            except FileNotFoundError:
                break
            if now != (holder, beat):
                return None
        return holder, beat

    def _renew(self) -> None:
        own = self._own
        while not self._released.wait(SECONDS_OF_A_BEAT):
            with contextlib.suppress(OSError):
                holder = self._find_holder()
                if holder == own:
                    os.utime(self._path)
                elif holder and not self._released.is_set():
                    self._when_lost(
                        f"{self._folder} was taken over by another run, process {holder['pid']} on {holder['host']}"
                    )

    def _find_holder(self) -> dict | None:
        try:
            with self._path.open() as file:
                return _read(file)
        except OSError:
            return None


@contextlib.contextmanager
def _open_alone(path: Path) -> Iterator:
    """Open a file that no other process of this function has open; where the file system has no such locks, just open it."""
    while True:
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL):
                    raise
            # It may have been released, and removed, in between.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    yield file
                    return


def _read(file) -> dict | None:
    """Return what the file says of the run that holds it; None where it says nothing."""
    file.seek(0)
    try:
        holder = json.loads(file.read())
        return holder if {"host", "pid", "since"} <= holder.keys() else None
    except (ValueError, AttributeError):
        return None


def _write(file, holder: dict) -> None:
    file.truncate(0)
    file.write(json.dumps(holder) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _describe_this_process() -> dict:
    return {
        "host": platform.node(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": _describe_machine(),
        "begun": _find_start(os.getpid()),
        "parent": os.getppid(),
        "parent begun": _find_start(os.getppid()),
    }


def _describe_machine() -> str:
    """Where a process number means the same process: this start of this machine and, of containers, this one."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return platform.node()


def _find_start(pid: int) -> str | None:
    """When a process began, so that a later one of the same number is not taken for it; None where it is gone or unknown."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]  # a zombie has ended


def _is_of_this_machine(holder: dict) -> bool:
    return holder.get("machine") == _describe_machine()


def _has_ended(holder: dict) -> bool:
    """Whether a process that this machine would know is gone."""
    return _is_of_this_machine(holder) and not _is_alive(holder["pid"], holder.get("begun"))


def _is_left_behind(holder: dict) -> bool:
    return not _is_alive(holder.get("parent", 0), holder.get("parent begun"))


def _is_alive(pid: int, begun: str | None) -> bool:
    if Path("/proc/self/stat").exists():
        found = _find_start(pid)
        return found is not None and begun in (None, found)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
