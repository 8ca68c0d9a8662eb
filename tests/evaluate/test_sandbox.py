"""Programs that misbehave count as failures, end in bounded time, and leave nothing behind."""

from __future__ import annotations

import time

import pytest

from ftpipe.evaluate.sandbox import run_program


def test_a_program_that_reaches_its_end_passes_and_one_that_raises_does_not():
    assert run_program("import math, re, collections, heapq\nassert math.gcd(4, 6) == 2\nopen('a.txt', 'w').write('x')\nprint('é' * 9)") == "passed"
    assert run_program("assert False") == run_program("def (") == run_program("1/0") == "failed"


@pytest.mark.parametrize("source", [
    "import sys; sys.exit(0)", "raise SystemExit", "import os; os._exit(0)", "input()", "assert open(0).read()",
    "import os\nwhile True:\n    os.fork()", "import subprocess\nsubprocess.run(['true'])", "import socket\nsocket.socket()",
    "import _posixsubprocess", "import ctypes", "import os\nos.kill(os.getppid(), 0)", "x = 'a' * (2 * 10**9)",
    "open('big', 'w').write('a' * 2**22)", "open('/tmp/ftpipe-outside', 'w')", "import os\nos.remove(OUTSIDE)",
    "import shutil\nshutil.rmtree(OUTSIDE)", "def f(): return f()\nf()",
], ids=str)
def test_leaving_early_and_reaching_out_are_failures(source, tmp_path):
    outside = tmp_path / "kept"
    outside.write_text("here")
    assert run_program(source.replace("OUTSIDE", repr(str(outside)))) == "failed"
    assert outside.read_text() == "here"


def test_endless_programs_are_stopped(monkeypatch):
    began = time.monotonic()
    assert run_program("while True: pass", seconds=1) == "timeout"
    monkeypatch.setattr("ftpipe.evaluate.sandbox.START_SECONDS", 1.0)
    assert run_program("import time\ntime.sleep(60)", seconds=0.5) == "timeout"
    assert time.monotonic() - began < 15


def test_nothing_of_the_surroundings_is_seen(monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    assert run_program("import os\nassert 'SECRET' not in os.environ and os.listdir('.') == []") == "passed"
    assert run_program("print(list({'a', 'b', 'c'})); assert hash('a') == " + str(_hash())) == "passed", "sets of text have the same order every time"


def _hash() -> int:
    import subprocess
    import sys

    return int(subprocess.run([sys.executable, "-S", "-c", "print(hash('a'))"], env={"PYTHONHASHSEED": "0"}, capture_output=True, check=True).stdout)
