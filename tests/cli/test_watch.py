"""``bifusion-diag watch`` beside a real writer in another process."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from bifusion_diag.record import RunHeader, RunWriter

Command = Callable[..., tuple[int, str]]
WATCH = [sys.executable, "-m", "bifusion_diag", "watch"]
#: Four times eighty steps, each time when a line comes in, with a spike in the third; then the run ends.
WRITER = """
import sys, numpy as np
from bifusion_diag.record import RunHeader, RunWriter
with RunWriter(sys.argv[1], RunHeader(name="mine", steps_planned=320)) as writer:
    for first in range(0, 320, 80):
        sys.stdin.readline()
        for block in range(10):
            rows = first + np.arange(block * 8, block * 8 + 8)
            writer.append(rows, {"loss/total": 5 - rows / 100, "train/grad_norm": np.ones(8)})
        if first == 160:
            writer.event(160, "spike", "spike of the pre-clip grad norm: 50", scenes=["room_7"])
        writer.flush()
        print("written", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def spawn() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts processes that do not outlive the test."""
    running: list[subprocess.Popen[str]] = []

    def start(*command: object) -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        running.append(subprocess.Popen([str(part) for part in command], text=True, **pipes))  # type: ignore[call-overload]
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


def write(path: Path, steps: int = 40) -> RunWriter:
    writer = RunWriter(path, RunHeader(name="run", steps_planned=100))
    rows = np.arange(steps)
    writer.append(rows, {"loss/total": 4 - rows / 10, "train/grad_norm": np.full(steps, 2.5)})
    writer.event(7, "spike", "spike of the pre-clip grad norm: 80", scenes=["room_1"])
    writer.flush()
    return writer


def test_waits_for_a_run_follows_it_and_ends_with_it(spawn: Callable[..., subprocess.Popen[str]]) -> None:
    watch = spawn(*WATCH, "runs/mine.json", "--interval", "0.1", "--timeout", "60")
    assert watch.stdout is not None
    assert watch.stdout.readline().startswith("waiting for a run to begin at runs/mine.json")
    writer = spawn(sys.executable, "-c", WRITER, "runs/mine.json")
    assert writer.stdin is not None
    before = ""
    for steps in (80, 160, 240, 320):
        print(file=writer.stdin, flush=True)
        for line in watch.stdout:
            assert line.startswith("mine: running, step ")  # "waiting" is said once
            assert line != before  # a log has no line twice
            before = line
            if f"step {steps}/320" in line:
                break
    print(file=writer.stdin, flush=True)
    output, errors = watch.communicate(timeout=60)
    assert (watch.returncode, errors) == (0, "")
    assert writer.wait(10) == 0
    assert "\x1b" not in output
    lines = output.splitlines()
    assert "1 spike" in lines[-3]
    assert "mine: completed, step 320/320" in lines[-3]
    assert lines[-2] == "completed after step 319: runs/mine.json"
    assert lines[-1] == "report with: bifusion-diag report runs/mine.json"


def test_a_run_that_was_killed_is_called_silent(spawn: Callable[..., subprocess.Popen[str]], command: Command) -> None:
    writer = spawn(sys.executable, "-c", WRITER, "mine.json")
    assert writer.stdin is not None
    assert writer.stdout is not None
    for _ in range(4):
        print(file=writer.stdin, flush=True)
        assert writer.stdout.readline() == "written\n"
    writer.kill()
    writer.wait()
    assert "stalled or killed?" not in command("watch", "mine.json", "--once")[1]
    (blocks,) = Path("mine.record").glob("*-series.arrow")
    os.utime(blocks, (time.time() - 185,) * 2)
    code, output = command("watch", "mine.record", "--once")
    assert code == 0
    assert "no new block for 3 min: stalled or killed?" in output
    assert "160  spike of the pre-clip grad norm: 50  room_7" in output
    with blocks.open("r+b") as file:
        file.truncate(blocks.stat().st_size - 20)  # the last block is cut off
    assert "step 312 of 320" in command("watch", "mine.json", "--once")[1]


def test_once_shows_all_there_is(command: Command) -> None:
    writer = write(Path("mine/run.json"))
    code, output = command("watch", "mine", "--once")
    assert code == 0
    assert "\x1b" not in output
    lines = output.splitlines()
    assert lines[0] == "run  running"
    assert lines[1].startswith("step 40 of 100")
    assert next(line for line in lines if line.startswith("loss/total")).split()[1:4] == ["0.100", "0.100", "4.00"]
    assert lines[-1] == "7  spike of the pre-clip grad norm: 80  room_1"
    assert "last 10 steps" in command("watch", "mine", "--once", "--window", 10)[1]
    writer.finish("interrupted")
    assert command("watch", "mine", "--once")[1].splitlines()[-2:] == [
        "interrupted after step 39: mine/run.json",
        "report with: bifusion-diag report mine/run.json",
    ]
    Path("mine/run.report.html").touch()
    assert command("watch", "mine/run.json")[1].splitlines()[-1] == "report: mine/run.report.html"


def test_a_run_without_its_record(command: Command) -> None:
    write(Path("run.json")).finish("completed")
    Path("run.record").rename("away")
    code, output = command("watch", "run.json")
    assert code == 0
    assert output.splitlines()[0] == "completed: 40 steps recorded in run.json"


def test_a_run_that_ended_without_run_json_is_not_waited_for_long(command: Command) -> None:
    write(Path("run.json")).finish("completed")
    Path("run.json").unlink()
    os.utime("run.record/header.json", (time.time() - 100,) * 2)
    code, output = command("watch", "run.json")
    assert code == 0
    assert "completed after step 39: run.json is not there, its record is: run.record" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.json", "--once"], "none.json: no run is recorded there"),
        (["none.json", "--timeout", "0.2", "--interval", "0.05"], "no run is recorded there within 0.2 s"),
        (["notes.txt"], "not valid JSON"),
        (["notes.txt/run.json"], "notes.txt is a file"),
        (["two"], "several runs in this folder: a.record, b.record"),
        (["new.record"], "Update bifusion-diag"),
        (["x" * 300 + ".json"], "File name too long"),
    ],
)
def test_a_bad_path_ends_with_a_message(command: Command, arguments: list[str], words: str) -> None:
    Path("notes.txt").write_text("hello")
    for name in ("two/a.json", "two/b.json", "new.json"):
        write(Path(name)).finish("completed")
    header = Path("new.record/header.json")
    document = json.loads(header.read_text())
    header.write_text(json.dumps({**document, "schema_version": "99.0"}))
    code, output = command("watch", *arguments)
    assert code == 2
    assert words in output


def test_on_a_terminal_it_has_a_screen_of_its_own_and_ctrl_c_gives_it_back() -> None:
    writer = write(Path("run.json"))
    terminal, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color"}
    watch = subprocess.Popen([*WATCH, "run.json", "--interval", "0.1"], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    output = b""
    interrupted = False
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                output += os.read(terminal, 65_536)
            except OSError:  # the child has closed its side
                break
        if b"room_1" in output and not interrupted:
            watch.send_signal(signal.SIGINT)
            interrupted = True
    os.close(terminal)
    writer.finish("completed")
    assert watch.wait(10) == 130
    assert b"Traceback" not in output
    assert output.index(b"\x1b[?1049h") < output.index(b"room_1") < output.index(b"\x1b[?1049l")


def test_a_pipe_that_knows_ascii_alone_gets_what_it_can_show() -> None:
    writer = write(Path("run.json"))
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*WATCH, "run.json", "--once"], capture_output=True, env=environment, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"step 40 of 100  ????" in done.stdout
    writer.finish("completed")


def test_it_is_quick_to_start_and_loads_no_torch(spawn: Callable[..., subprocess.Popen[str]]) -> None:
    writer = write(Path("run.json"))
    program = (
        "import sys; from bifusion_diag.cli.app import main; sys.argv[1:] = ['watch', 'run.json', '--once']\n"
        "try: main()\nfinally: print(sorted({'torch', 'matplotlib', 'scipy'} & set(sys.modules)))"
    )
    output, errors = spawn(sys.executable, "-c", program).communicate(timeout=30)
    assert output.splitlines()[-1] == "[]", errors
    writer.finish("completed")
