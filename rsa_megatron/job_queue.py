"""Runs commands that wait for each other, a few at a time, each in a folder of its own that says how far it is.

    FOLDER/NAME/command.json   what runs there; another command in its place is refused
    FOLDER/NAME/run.log        all that it has printed, of every start
    FOLDER/NAME/done.json      the seconds it took, once it has ended well

What is done is not done again. What was killed is started again by the same command, which may take up what it finds in
its folder. A job that fails leaves out those that wait for it, and no others.
"""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
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
        self.done_before = frozenset(self.done)
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

    def run(self, seconds: float | None, say: Callable[[str], None], when_done: Callable[[Job], None]) -> bool:
        """Until nothing is left to do, or for so many seconds; then what runs is ended. Whether all is done."""
        begin = time.monotonic()
        try:
            while (self.running or self.waiting) and (seconds is None or time.monotonic() - begin < seconds):
                self._start_what_can(say)
                for job in self._ended():
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

    def _start_what_can(self, say) -> None:
        for job in self.waiting:
            if len(self.running) >= self.num_at_once:
                return
            if self.done.issuperset(job.needs):
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
            say(f"ended {name} before its end; the same command goes on")
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
    """A lock for as long as it is held; ValueError where another process has it."""
    lock = (folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(f"another run is at work in {folder}: wait for it, or name another --out") from error
    return lock


def run_and_report(
    queue: Queue, time_limit: float | None, when_done: Callable[[Job], None], report: Callable[[], None]
) -> None:
    """Run the jobs, saying how far it is; `report` at the end, also when it is interrupted. Exit code 1 if a job is not done."""
    begin = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal; the same command goes on"))

    def say(event: str) -> None:
        left = len(queue.waiting)
        print(
            f"[{(time.monotonic() - begin) / 60:5.1f} min] {event} | {len(queue.done)} of {len(queue.jobs)} done, {left} waiting, "
            f"running: {', '.join(queue.running) or 'none'} | about {queue.seconds_left() / 60:.0f} min left",
            flush=True,
        )

    try:
        all_done = queue.run(time_limit, say, when_done)
    except KeyboardInterrupt:
        all_done = False
    finally:
        report()
    if not all_done:
        sys.exit(1)


def print_plan(jobs: list[Job], num_at_once: int, jsonl: Path) -> None:
    """What --dry-run shows."""
    for job in jobs:
        print(
            f"{job.name}  (about {job.seconds:.0f} s; after {', '.join(job.needs) or 'nothing'})\n    {shlex.join(job.command)}"
        )
    print(
        f"{len(jobs)} jobs, {num_at_once} at a time: about {makespan(jobs, num_at_once) / 60:.0f} minutes; lines go to {jsonl}"
    )
