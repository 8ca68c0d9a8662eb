"""Parts of the flows that need no server."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from flows.logs import PrefectLog, to_prefect
from flows.server import _nothing_configured, check
from flows.serving import due_after, schedule
from flows.signals import undisturbed_interrupt
from ftpipe.errors import ConfigError, InfrastructureError
from tests.ports import free_port
from tests.stages_for_tests import alive

pytestmark = pytest.mark.timeout(60)


class Target:
    def __init__(self):
        self.said: list[str] = []

    def log(self, level, form, *a):
        self.said.append(form % a)

    def info(self, form, *a):
        self.said.append(form % a)


def test_a_flood_of_lines_is_cut_but_counted_and_warnings_pass():
    target, log = Target(), logging.getLogger("ftpipe.stage.flood")
    with to_prefect(target, rate=0.0, burst=10):
        for i in range(100):
            log.info("line %d", i)
        log.warning("careful")
        assert not logging.getLogger("ftpipe").propagate
    assert target.said == [f"line {i}" for i in range(10)] + ["90 lines are left out here; log.txt of the stage has them all", "careful"]
    assert logging.getLogger("ftpipe").propagate


def test_allowance_comes_back_with_time():
    target = Target()
    handler = PrefectLog(target, rate=100.0, burst=2)
    record = logging.LogRecord("ftpipe", logging.INFO, "", 0, "x", (), None)
    for _ in range(5):
        handler.emit(record)
    time.sleep(0.1)
    handler.emit(record)
    assert target.said == ["x", "x", "3 lines are left out here; log.txt of the stage has them all", "x"]


@pytest.mark.parametrize("wrong, words", [
    ({"cron": "61 * * * *"}, "no cron expression"), ({"cron": "tomorrow"}, "no cron expression"), ({"cron": "* * *"}, "no cron expression"),
    ({"cron": "0 3 * * *", "timezone": "Mars/Olympus"}, "no time zone"), ({"cron": "0 3 * * *", "interval": 60}, "both"), ({"interval": 0}, "interval is 0"),
])
def test_a_schedule_that_cannot_work_is_refused(wrong, words):
    with pytest.raises(ConfigError, match=words):
        schedule(**({"cron": None, "interval": None, "timezone": None} | wrong))


def test_schedules():
    assert schedule(cron=None, interval=None, timezone=None) is None
    nightly = schedule(cron="0 3 * * *", interval=None, timezone="Europe/Berlin")
    assert (nightly.cron, nightly.timezone) == ("0 3 * * *", "Europe/Berlin")
    assert schedule(cron=None, interval=90, timezone=None).interval.total_seconds() == 90
    last = datetime(2026, 3, 28, 1, 30, tzinfo=UTC)  # 2:30 in Berlin, the day before its clocks go forward
    assert due_after(nightly, last) == datetime(2026, 3, 28, 2, tzinfo=UTC)
    assert due_after(nightly, datetime(2026, 3, 28, 12, tzinfo=UTC)) == datetime(2026, 3, 29, 1, tzinfo=UTC)
    assert due_after(schedule(cron=None, interval=90, timezone=None), last) == last + timedelta(seconds=90)


def test_an_api_that_does_not_answer_is_said_with_a_remedy():
    with pytest.raises(InfrastructureError, match="does not answer") as caught:
        check(f"http://127.0.0.1:{free_port()}/api")
    assert caught.value.retryable and "PREFECT_API_URL" in caught.value.remedy
    with pytest.raises(InfrastructureError, match="not a URL"):
        check("localhost:4200/api")


def test_a_server_that_is_no_prefect_is_said():
    class Nothing(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        def log_message(self, *a):
            pass

    server = HTTPServer(("127.0.0.1", 0), Nothing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(InfrastructureError, match="no Prefect API") as caught:
        check(f"http://127.0.0.1:{server.server_port}")
    assert "/api" in caught.value.remedy
    server.shutdown()


def test_whether_an_api_is_configured_is_read_without_prefect(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.delenv("PREFECT_PROFILE", raising=False)
    monkeypatch.delenv("PREFECT_PROFILES_PATH", raising=False)
    monkeypatch.chdir(tmp_path)
    assert _nothing_configured()
    (tmp_path / "profiles.toml").write_text('active = "ephemeral"\n[profiles.ephemeral]\nPREFECT_SERVER_EPHEMERAL_ENABLED = "true"\n')
    assert _nothing_configured()
    (tmp_path / "profiles.toml").write_text('active = "team"\n[profiles.team]\nPREFECT_API_URL = "http://team/api"\n')
    assert not _nothing_configured()
    (tmp_path / "profiles.toml").write_text("not toml [")
    assert not _nothing_configured()
    (tmp_path / "profiles.toml").unlink()
    (tmp_path / "prefect.toml").touch()
    assert not _nothing_configured()


def test_after_an_interrupt_nothing_disturbs_the_cleaning_up():
    done = False
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt), undisturbed_interrupt():
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGINT)
                done = True
        assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_process_ends_with_its_parent():
    """A child that watches its parent gets SIGTERM within a second of the parent's kill -9, and its `finally` runs."""
    child = """
import os, sys, time
from flows.signals import stop_with_parent
import signal
def term(*a): raise SystemExit(7)
signal.signal(signal.SIGTERM, term)
with stop_with_parent(True, every=0.1):
    try:
        print(os.getpid(), flush=True)
        time.sleep(60)
    finally:
        print("unwound", flush=True)
"""
    middle = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", middle], stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    assert process.stdout.readline() == "unwound\n"
    end = time.monotonic() + 5
    while time.monotonic() < end:
        if not alive([pid]):
            return
        time.sleep(0.05)
    raise AssertionError("it is still there")


def test_settings_that_keep_prefect_quiet_are_set_before_it_is_imported():
    code = "import os, flows; from prefect.settings import get_current_settings as s; c = s(); print(c.server.analytics_enabled, os.environ['DO_NOT_TRACK'])"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT", "DO_NOT"))}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60).stdout.split() == ["False", "1"]
