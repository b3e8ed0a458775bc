"""Jobs run when what they need is done, a few at a time; what is done stays done, what fails stops only what waits for it."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from rsa_megatron.job_queue import Job, Queue, exit_on_mistakes, makespan, run_and_report


def job(name: str, code: str = "", needs: tuple = (), seconds: float = 1.0) -> Job:
    return Job(name, (sys.executable, "-c", code), needs, seconds)


def run(jobs, folder, num_at_once=2, seconds=None):
    queue, said, done = Queue(jobs, folder, num_at_once), [], []
    all_done = queue.run(seconds, said.append, lambda job: done.append(job.name))
    return queue, all_done, said, done


def note(file: Path, word: str, seconds: float = 0.0) -> str:
    """Code that writes when it begins and ends."""
    return (
        f"import time; out = open({str(file)!r}, 'a', 1); print('begin {word}', file=out); time.sleep({seconds}); "
        f"print('end {word}', file=out); print('said {word}')"
    )


def test_a_job_waits_for_what_it_needs_and_no_more_run_than_may(tmp_path):
    diary = tmp_path / "diary"
    jobs = [job("c", note(diary, "c"), ("a", "b")), *(job(name, note(diary, name, 0.3)) for name in "abdef")]
    queue, all_done, said, done = run(jobs, tmp_path / "runs")
    lines = diary.read_text().split("\n")[:-1]
    assert all_done and sorted(done) == list("abcdef") and queue.log("c").read_text() == "said c\n"
    assert lines.index("begin c") > max(lines.index("end a"), lines.index("end b"))
    at_once = [
        sum(line.startswith("begin") - line.startswith("end") for line in lines[: i + 1]) for i in range(len(lines))
    ]
    assert max(at_once) == 2


def test_what_is_done_is_not_done_again_and_another_command_in_its_place_is_refused(tmp_path):
    diary = tmp_path / "diary"
    jobs = [job("a", note(diary, "a")), job("b", note(diary, "b"), ("a",))]
    assert run(jobs, tmp_path)[1]
    queue, all_done, said, done = run(jobs, tmp_path)
    assert all_done and not said and not done and diary.read_text().count("begin") == 2
    with pytest.raises(ValueError, match=f"{tmp_path}/b holds a run of other settings: name another --out, or remove"):
        Queue([jobs[0], job("b", "another", ("a",))], tmp_path, 2)


def test_a_failing_job_is_named_and_stops_only_those_that_wait_for_it(tmp_path):
    jobs = [
        job("bad", "raise SystemExit('broken')"),
        job("waits", "", ("bad",)),
        job("waits too", "", ("waits",)),
        job("good"),
        job("better", "", ("good",)),
    ]
    queue, all_done, said, done = run(jobs, tmp_path)
    assert not all_done and queue.failed == {"bad"} and sorted(done) == ["better", "good"]
    assert [line for line in said if "FAILED" in line] == [f"FAILED bad, exit status 1; see {tmp_path}/bad/run.log"]
    assert "broken" in queue.log("bad").read_text()
    # Once the reason is gone, the same jobs go on.
    (tmp_path / "bad" / "command.json").unlink()
    jobs[0] = job("bad")
    assert run(jobs, tmp_path)[3] == ["bad", "waits", "waits too"]


def test_callers_are_called_before_a_start_and_once_more_after_the_end(tmp_path):
    """Whatever a job writes has been seen before it is reported."""
    file, seen = tmp_path / "file", []
    jobs = [job("writes", f"import time; time.sleep(0.3); open({str(file)!r}, 'w').write('all of it')")]
    queue = Queue(jobs, tmp_path / "runs", 1)
    assert queue.run(
        None,
        seen.append,
        lambda job: seen.append(f"when done {job.name}"),
        before_start=lambda job: seen.append(f"before {job.name}, running: {len(queue.running)}"),
        each_turn=lambda: seen.append(file.read_text() if file.exists() else None),
    )
    events = [event for event in seen if event]
    assert events[:2] == ["before writes, running: 0", "started writes"]
    assert events[-3] == "all of it" and events[-2:] == ["when done writes", events[-1]] and None in seen


def test_a_failure_is_reported_with_its_log_and_status_1(tmp_path, capsys):
    reported, signals = [], signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            queue = Queue([job("bad", "raise SystemExit(3)"), job("good")], tmp_path, 1)
            run_and_report(queue, None, lambda job: None, lambda: reported.append("end"))
    finally:
        signal.signal(signal.SIGTERM, signals)
    said = capsys.readouterr()
    assert (
        end.value.code == 1 and reported == ["end"] and said.err == f"error: bad failed; see {tmp_path}/bad/run.log\n"
    )
    assert "done good" in said.out and "FAILED bad, exit status 3" in said.out
    with pytest.raises(SystemExit, match="error: a mistake"), exit_on_mistakes():
        raise ValueError("a mistake")


def test_at_the_time_limit_what_runs_is_ended_with_all_that_it_started_and_can_go_on(tmp_path):
    """A job that starts a process of its own; at the second start it finds what the first has left."""
    child = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(600)"
    code = (
        f"import os, subprocess, sys; os.chdir({str(tmp_path)!r}); second = os.path.exists('pid')\n"
        f"if not second: subprocess.run([sys.executable, '-c', {child!r}])\n"
        "print('second start' if second else 'ended by itself')"
    )
    jobs = [job("quick"), job("long", code)]
    begin = time.monotonic()
    queue, all_done, said, done = run(jobs, tmp_path, seconds=2)
    assert not all_done and done == ["quick"] and time.monotonic() - begin < 8
    wait_for(lambda: not is_alive(int((tmp_path / "pid").read_text())))
    assert any("ended long before its end" in line for line in said)
    assert run(jobs, tmp_path)[3] == ["long"] and queue.log("long").read_text() == "second start\n"


def test_what_runs_does_not_outlive_an_interrupted_queue(tmp_path):
    code = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    queue = Queue([job("long", code)], tmp_path, 1)

    def interrupt():
        wait_for(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text())
        os.kill(os.getpid(), signal.SIGINT)

    # Where tests run in the background (nohup, a shell without job control), SIGINT was ignored from the start, and
    # Python then leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            queue.run(60, lambda line: None, lambda job: None)
    finally:
        signal.signal(signal.SIGINT, before)
    wait_for(lambda: not is_alive(int((tmp_path / "pid").read_text())))
    assert not queue.done


def wait_for(condition) -> None:
    """A process that was killed may take a moment to be gone."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def test_the_time_that_is_left_is_what_was_expected_times_how_wrong_that_was(tmp_path):
    jobs = [job("a", seconds=10), job("b", seconds=10), job("c", needs=("a", "b"), seconds=5), job("d", seconds=1)]
    assert makespan(jobs, 2) == 15 and makespan(jobs, 1) == 26 and makespan(jobs, 4) == 15
    assert makespan(jobs[2:], 2) == 5 and makespan(jobs, 2, gone={"a": 4, "b": 10}) == 11
    queue = Queue(jobs, tmp_path, 2)
    assert queue.seconds_left() == 15
    queue.done, queue.took = {"a"}, {"a": 20.0}
    assert queue.seconds_left() == 2 * 15
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "done.json").write_text(json.dumps({"seconds": 3}))
    assert Queue(jobs, tmp_path, 2).done == {"b"}
