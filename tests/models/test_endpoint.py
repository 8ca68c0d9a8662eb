"""The endpoint: a real server, asked over HTTP in OpenAI's words, gives the adapter's answers and goes when told to."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from ftpipe.errors import ConfigError, InfrastructureError
from ftpipe.models import endpoint
from ftpipe.models.service import ModelService
from ftpipe.stages.base import Environment
from tests.artifacts import chat, complete
from tests.models.data import trained_adapter

ROOT = Path(__file__).parents[2]
QUESTION = "what does sort do?"


def test_vllm_goes_first_and_what_is_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(endpoint, "find_spec", lambda name: None if name == "openai" else object())
    with pytest.raises(ConfigError, match=r"(?s)no server.* is installed.*pip install 'ftpipe\[endpoint\]'"):
        endpoint.command("m", "127.0.0.1", 8000)
    monkeypatch.setattr(endpoint, "find_spec", lambda name: object())
    assert endpoint.command("m", "::1", 81)[1:] == ["-m", "transformers.cli.transformers", "serve", "m", "--host", "::1", "--port", "81"]
    with pytest.raises(ConfigError, match="the server vllm is not installed"):
        endpoint.command("m", "127.0.0.1", 8000, server="vllm")
    (tmp_path / "vllm").write_text("")
    (tmp_path / "vllm").chmod(0o755)
    assert endpoint.command("m", "127.0.0.1", 8000, more=["--max-model-len", "9"]) == [
        str(tmp_path / "vllm"), "serve", "m", "--host", "127.0.0.1", "--port", "8000", "--served-model-name", "m", "--max-model-len", "9"]
    assert endpoint.command("m", "127.0.0.1", 8000, server="transformers")[0] == sys.executable


def test_a_taken_port_is_said_before_anything_is_merged():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InfrastructureError, match=f"port {taken.getsockname()[1]} of 127.0.0.1"):
        endpoint.free("127.0.0.1", taken.getsockname()[1])


@pytest.mark.e2e
def test_the_adapter_answers_over_http_until_ctrl_c(tiny_model, tmp_path):
    pytest.importorskip("openai", reason="the server of transformers needs the package openai")
    adapter = trained_adapter(tmp_path / "ws", tiny_model, complete([chat(QUESTION, "it sorts a list"), chat("x", "y")]), steps=40).file("adapter")
    env = Environment(tmp_path / "ws", tmp_path, "t")
    ours, base = (ModelService.open(str(tiny_model), env, adapter=a, dtype="float32", device="cpu") for a in (adapter, None))
    expected, other = (s.generate([s.renderer.prompt([{"role": "user", "content": QUESTION}])], max_new_tokens=24)[0].text for s in (ours, base))
    assert expected == "it sorts a list" != other
    folder = endpoint.prepared("adapter", str(tiny_model), env, adapter, dtype="float32")
    made = (folder / "model.safetensors").stat().st_mtime_ns
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    output = tmp_path / "server.log"
    with output.open("w") as f:
        server = subprocess.Popen([sys.executable, "-c", "from ftpipe.cli import main; main()", "endpoint", str(adapter), "--workspace", str(tmp_path / "ws"),
                                   "--port", str(port), "--server", "transformers", "--dtype", "float32"], stdout=f, stderr=subprocess.STDOUT,
                                  env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path, start_new_session=True)
    try:
        asked = json.dumps({"model": "adapter", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 24}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", asked, {"Content-Type": "application/json"})
        answer, until = None, time.monotonic() + 300
        while answer is None and time.monotonic() < until and server.poll() is None:
            try:
                answer = json.loads(urllib.request.urlopen(request, timeout=30).read())
            except urllib.error.HTTPError as error:
                pytest.fail(f"{error}: {error.read()[:500]!r}")
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        assert answer is not None, output.read_text()[-2000:]
        assert answer["object"] == "chat.completion" and answer["choices"][0]["message"] == {"role": "assistant", "content": expected}
        os.killpg(server.pid, signal.SIGINT)
        server.wait(60)
        assert "Finished server process" in output.read_text() and "Traceback" not in output.read_text()
        endpoint.free("127.0.0.1", port)
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()
    assert list((tmp_path / "ws" / "cache" / "endpoints").glob("*/adapter")) == [folder] and (folder / "model.safetensors").stat().st_mtime_ns == made
