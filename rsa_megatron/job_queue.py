"""Runs commands that wait for each other, a few at a time, each in a folder of its own that says how far it is.

    FOLDER/NAME/command.json   what runs there; another command in its place is refused
    FOLDER/NAME/run.log        all that it has printed, of every start
    FOLDER/NAME/done.json      the seconds it took, once it has ended well

Finished jobs are not repeated. A job that was killed is started again by the same command, which may resume from what it
finds in its folder. When a job fails, those that wait for it are left out, and no others.
"""

import argparse
import contextlib
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rsa_megatron import atomic

SECONDS_TO_END = 10


@dataclass(frozen=True)
class Job:
    """One command."""

    name: str
    """Its folder below the queue's, as "seed-1/with-rsa/stage-1"."""
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    """Names of the jobs that must be done before."""
    seconds: float = 0.0
    """About how long it takes."""


@dataclass
class Queue:
    """Jobs in the order in which they are started, as soon as what they need is done.

    Raises:
        ValueError: a job's folder holds another command's work.
    """

    jobs: list[Job]
    folder: Path
    num_at_once: int
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.done = {job.name for job in self.jobs if self.is_done(job)}
        self.failed: set[str] = set()
        self.running: dict[str, tuple[subprocess.Popen, float]] = {}
        self.took: dict[str, float] = {}
        for job in self.jobs:
            self._check_command(job)

    def is_done(self, job: Job) -> bool:
        return (self.folder / job.name / "done.json").is_file()

    def log(self, name: str) -> Path:
        return self.folder / name / "run.log"

    def metrics(self, name: str) -> Path:
        """Return the figures of a training job, which writes them there (--save, --metrics-file)."""
        return self.folder / name / "metrics.jsonl"

    @property
    def waiting(self) -> list[Job]:
        """Those that can still come to be started."""
        blocked = set(self.failed)
        left = []
        for job in self.jobs:
            if blocked & set(job.needs):
                blocked.add(job.name)
            elif job.name not in self.done | self.failed | self.running.keys():
                left.append(job)
        return left

    def run(
        self,
        seconds: float | None,
        say: Callable[[str], None],
        when_done: Callable[[Job], None],
        before_start: Callable[[Job], None] = lambda job: None,
        each_turn: Callable[[], None] = lambda: None,
    ) -> bool:
        """Run until no job is left or `seconds` have passed, then terminate running jobs. Return whether all are done.

        Args:
            say: gets a line whenever a job starts or ends.
            when_done: called when a job has succeeded.
            before_start: called right before a job's process is started.
            each_turn: called some times a second, and once more before a job that has ended is reported.
        """
        begin = time.monotonic()
        try:
            while (self.running or self.waiting) and (seconds is None or time.monotonic() - begin < seconds):
                self._start_what_can(say, before_start)
                ended = self._ended()
                each_turn()
                for job in ended:
                    self._settle(job, say, when_done)
                time.sleep(0.05)
        finally:
            # Also at Ctrl-C: what was started must not outlive this process.
            self._end_all(say)
        return len(self.done) == len(self.jobs)

    def seconds_left(self) -> float:
        """An estimate: what was expected, times how wrong that was so far."""
        expected = {job.name: job.seconds for job in self.jobs}
        of_done = sum(expected[name] for name in self.took)
        factor = sum(self.took.values()) / of_done if of_done else 1.0
        left = self.waiting + [job for job in self.jobs if job.name in self.running]
        gone = {name: (time.monotonic() - begin) / factor for name, (_, begin) in self.running.items()}
        return factor * makespan(left, self.num_at_once, gone)

    def _start_what_can(self, say, before_start) -> None:
        for job in self.waiting:
            if len(self.running) >= self.num_at_once:
                return
            if self.done.issuperset(job.needs):
                before_start(job)
                self._start(job)
                say(f"started {job.name}")

    def _start(self, job: Job) -> None:
        folder = self.folder / job.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "command.json").write_text(json.dumps(job.command))
        with self.log(job.name).open("ab") as log:
            process = subprocess.Popen(
                job.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | self.environment,
                start_new_session=True,  # so that it can be ended with all that it has started
            )
        self.running[job.name] = (process, time.monotonic())

    def _ended(self) -> list[Job]:
        return [job for job in self.jobs if job.name in self.running and self.running[job.name][0].poll() is not None]

    def _settle(self, job: Job, say, when_done) -> None:
        process, begin = self.running.pop(job.name)
        seconds = time.monotonic() - begin
        if process.returncode == 0:
            self.took[job.name] = seconds
            self.done.add(job.name)
            atomic.write_text(self.folder / job.name / "done.json", json.dumps({"seconds": round(seconds, 1)}))
            when_done(job)
            say(f"done {job.name} in {seconds:.0f} s")
        else:
            self.failed.add(job.name)
            say(f"FAILED {job.name}, exit status {process.returncode}; see {self.log(job.name)}")

    def _end_all(self, say) -> None:
        for name, (process, _) in self.running.items():
            say(f"ended {name} before its end; the same command resumes it")
            signal_group(process, signal.SIGTERM)
        deadline = time.monotonic() + SECONDS_TO_END
        for process, _ in self.running.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                pass
            signal_group(process, signal.SIGKILL)
            process.wait()
        self.running.clear()

    def _check_command(self, job: Job) -> None:
        file = self.folder / job.name / "command.json"
        if file.is_file() and json.loads(file.read_text()) != list(job.command):
            raise ValueError(f"{file.parent} holds a run of other settings: name another --out, or remove that folder")


def signal_group(process: subprocess.Popen, number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def makespan(jobs: Iterable[Job], num_at_once: int, gone: dict[str, float] | None = None) -> float:
    """Seconds until all are through, in this order, each when what it needs is; `gone`: of those that are under way."""
    gone = gone or {}
    left = list(jobs)
    names = {job.name for job in left}
    ends: dict[str, float] = {}
    free = [0.0] * num_at_once
    for job in sorted(left, key=lambda job: job.name not in gone):
        ready = max((ends[need] for need in job.needs if need in names), default=0.0)
        # The worker that is free last before it can start, or else the first to be free.
        place = min(range(num_at_once), key=lambda worker: (max(free[worker], ready), -free[worker]))
        ends[job.name] = free[place] = max(free[place], ready) + max(job.seconds - gone.get(job.name, 0.0), 0.0)
    return max(free)


def lock_folder(folder: Path):
    """Return a lock for as long as it is held; ValueError where another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(f"another run is at work in {folder}: wait for it, or name another --out") from error
    return lock


@contextlib.contextmanager
def exit_on_mistakes() -> Iterator[None]:
    """Turn a mistake of the user, or of the file system, into one line and exit status 1."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def add_arguments(parser: argparse.ArgumentParser, jobs: int) -> None:
    """Add the flags that scripts with a queue share."""
    parser.add_argument("--jobs", type=int, default=jobs, help="jobs that run at the same time; %(default)s")
    parser.add_argument(
        "--time-limit", type=float, metavar="SECONDS", help="then end what runs and report what is done"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands and the time, and stop")


def run_and_report(
    queue: Queue,
    time_limit: float | None,
    when_done: Callable[[Job], None],
    report: Callable[[], None],
    say: Callable[[str], None] | None = None,
    **callbacks: Callable,
) -> None:
    """Run the jobs and report progress; exit with status 1 if one is not done.

    Args:
        report: called at the end, also after an interruption.
        say: gets the events of Queue.run; default: print them with the progress and the time that is left.
        callbacks: more of Queue.run's.
    """
    begin = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal; the same command resumes"))

    def say_progress(event: str) -> None:
        left = len(queue.waiting)
        print(
            f"[{(time.monotonic() - begin) / 60:5.1f} min] {event} | {len(queue.done)} of {len(queue.jobs)} done, {left} waiting, "
            f"running: {', '.join(queue.running) or 'none'} | about {queue.seconds_left() / 60:.0f} min left",
            flush=True,
        )

    try:
        all_done = queue.run(time_limit, say or say_progress, when_done, **callbacks)
    except KeyboardInterrupt:
        all_done = False
    finally:
        report()
        for name in sorted(queue.failed):
            print(f"error: {name} failed; see {queue.log(name)}", file=sys.stderr)
    if not all_done and not queue.failed:
        print("stopped before the end; the same command resumes", file=sys.stderr)
    if not all_done:
        sys.exit(1)


def print_plan(jobs: list[Job], num_at_once: int, results: Path | None = None) -> None:
    """Print what --dry-run shows: each command, the time of all, and the file that the results go to."""
    for job in jobs:
        print(
            f"{job.name}  (about {job.seconds:.0f} s; after {', '.join(job.needs) or 'nothing'})\n    {shlex.join(job.command)}"
        )
    where = f"; results go to {results}" if results else ""
    print(f"{len(jobs)} jobs, {num_at_once} at a time: about {makespan(jobs, num_at_once) / 60:.0f} minutes{where}")
