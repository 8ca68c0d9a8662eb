"""Running a small Python program that a model wrote, in a process of its own with limits.

What holds on every system: its own empty folder, no inherited environment, no input, bounded memory, processor time, file size and wall-clock time, and a
verdict that cannot be had by leaving early. An audit hook also refuses processes, signals, sockets, foreign functions, and changes to files outside
the folder. That stops accidents and clumsy attempts; it is no wall against a program that is made to break out, because Python code cannot be
confined from inside its own process. Where models are not trusted, run the evaluation in a container without a network.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Literal

Outcome = Literal["passed", "failed", "timeout"]
FILE_BYTES = 2**20
"""Largest file that a program may write."""
START_SECONDS = 10.0
"""Time that the interpreter itself may take to start, on a busy machine, beside a program's own."""

_BOOT = r'''
import json, os, resource, sys
given = json.loads(sys.stdin.buffer.read())
verdict = os.dup(1)
null = os.open(os.devnull, os.O_RDWR)
for fd in (0, 1, 2):
    os.dup2(null, fd)
for name, value in given["limits"].items():
    kind = getattr(resource, name)
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))
home = os.path.realpath(os.getcwd()) + os.sep
refused = ("os.fork", "os.exec", "os.spawn", "os.posix_spawn", "os.system", "os.kill", "os.chown", "os.chmod", "os.link", "os.symlink", "os.startfile",
           "pty.", "signal.pthread_kill", "subprocess.", "socket.", "ctypes.", "resource.", "_posixsubprocess")
changing = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "shutil.")
modules = ("ctypes", "_ctypes", "_posixsubprocess", "_socket", "_multiprocessing", "resource")

def hook(event, args):
    if event == "import":
        bad = args[0].partition(".")[0] in modules
    elif event == "open":
        path, mode, flags = args
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        bad = bool(writes) and not (isinstance(path, (str, bytes)) and os.path.realpath(os.fsdecode(path)).startswith(home))
    elif event.startswith(changing):
        bad = any(isinstance(a, (str, bytes)) and not os.path.realpath(os.fsdecode(a)).startswith(home) for a in args)
    else:
        bad = event.startswith(refused)
    if bad:
        raise PermissionError("not allowed here: " + event)

sys.modules.pop("resource")
del resource
sys.addaudithook(hook)
try:
    exec(compile(given["source"], "program", "exec"), {"__name__": "__main__"})
except BaseException:
    os._exit(1)
os.write(verdict, given["token"].encode())
os._exit(0)
'''


def run_program(source: str, *, seconds: float = 3.0, memory: int = 512 * 2**20) -> Outcome:
    """Run Python source to its end.

    Args:
        seconds: processor time it may take; it is stopped by the clock too, `START_SECONDS` later at most. memory: bytes of address space.

    Returns:
        `passed` if the last line was reached without an exception: a secret word that the program is not shown is written after it, so leaving
        early with any exit status does not pass. `timeout` if it was stopped; otherwise `failed`.
    """
    token = secrets.token_hex(16)
    whole = int(seconds) + (seconds > int(seconds)) or 1
    limits = {"RLIMIT_CPU": whole, "RLIMIT_AS": memory, "RLIMIT_FSIZE": FILE_BYTES, "RLIMIT_CORE": 0, "RLIMIT_NOFILE": 64, "RLIMIT_NPROC": 64}
    given = json.dumps({"source": source, "token": token, "limits": limits}).encode("utf-8", "surrogatepass")
    with tempfile.TemporaryDirectory(prefix="ftpipe-program-") as folder, tempfile.TemporaryFile() as said:
        process = subprocess.Popen([sys.executable, "-B", "-s", "-P", "-S", "-c", _BOOT], cwd=_inner(folder), stdin=subprocess.PIPE, stdout=said,
                                   stderr=subprocess.DEVNULL, start_new_session=True,
                                   env={"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "HOME": folder, "TMPDIR": folder, "PATH": ""})
        late = False
        try:
            process.communicate(given, timeout=seconds + START_SECONDS)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if late or process.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
            return "timeout"
        said.seek(0)
        return "passed" if said.read(len(token) + 1) == token.encode() else "failed"


def _inner(folder: str) -> Path:
    inner = Path(folder) / "work"
    inner.mkdir()
    return inner
