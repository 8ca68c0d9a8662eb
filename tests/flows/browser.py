"""A page as a real browser shows it: Chromium, without a window, run once for each look."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from html import unescape
from pathlib import Path

import pytest


def chromium() -> str:
    """Where the browser is; skips the test where there is none."""
    found = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    return found or pytest.skip("no Chromium or Chrome is installed")


def look(url: str, wanted: list[str], *, within: float = 120, picture: Path | None = None) -> str:
    """The text of a page once it shows all words that are wanted, which scripts may bring late. Writes a picture of it, 1400 by 1000, if asked to."""
    end = time.monotonic() + within
    while True:
        text = unescape(re.sub(r"<[^>]+>", " ", re.sub(r"(?s)<(script|style).*?</\1>", " ", _open(url, "--dump-dom"))))
        text = " ".join(text.split())
        missing = [w for w in wanted if w not in text]
        if not missing:
            break
        assert time.monotonic() < end, f"{url} does not show {missing}; it shows: {text[:3000]}"
    if picture:
        _open(url, f"--screenshot={picture}")
        assert picture.stat().st_size > 10_000
    return text


def _open(url: str, what: str) -> str:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
                   "--disable-sync", f"--user-data-dir={profile}", "--hide-scrollbars", "--window-size=1400,1000", "--virtual-time-budget=15000", what, url]
        return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout
