"""Which attention a device gets, and that a kernel which cannot be had costs one loud line and a few seconds."""

import contextlib
import http.server
import json
import socket
import sys
import threading
import time

import huggingface_hub.constants as hub
import pytest
import torch
from conftest import run

import prepare
import train

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FAKE_KERNEL = """
import torch.nn.functional as F

def flash_attn_func(q, k, v, causal, window_size):
    assert causal and window_size[1] == 0
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2), "log-sum-exp"
"""


@pytest.fixture(autouse=True)
def own_hub(tmp_path, monkeypatch):
    """A fake Hopper, no kernel folder, an empty hub cache, a hub that refuses, and nothing chosen yet."""
    pretend(monkeypatch, (9, 0))
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as unused:
        port = unused.getsockname()[1]
    monkeypatch.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(train, "BACKENDS", {})


def pretend(monkeypatch, capability, hip=None):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "hip", hip)


def kernel_folder(path, source, variant="torch-universal"):
    build = path / "build" / variant
    build.mkdir(parents=True)
    (build / "__init__.py").write_text(source)
    metadata = {"id": f"_fake_{path.name}", "name": "flash-attn3", "version": 1, "license": "MIT", "python-depends": [],
                "backend": {"type": "cpu"}}
    (build / "metadata.json").write_text(json.dumps(metadata))
    return f"{train.FA3_KERNEL}={path}"


def falls_back_saying(*words, seconds=20):
    """choose_attention takes varlen instead of FA3 and says so, and why, in one line, before long."""
    began = time.monotonic()
    backend, reason = train.choose_attention(GPU)
    assert time.monotonic() - began < seconds
    assert backend == "varlen" and train.BACKENDS["in use"] is train.attention_varlen
    assert reason.startswith(f"NO FLASH ATTENTION 3: {train.FA3_KERNEL} did not load (")
    assert reason.endswith("); torch's varlen_attn") and "\n" not in reason and len(reason) < 400
    for word in words:
        assert word in reason, reason


@contextlib.contextmanager
def hub_that(answer):
    """A hub on a local port: `answer` maps a path to a status and what to send as JSON."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, body = answer(self.path)
            body = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_the_cpu_takes_sdpa_and_asks_no_hub(monkeypatch):
    monkeypatch.setattr(train, "load_kernel", lambda *arguments: pytest.fail("asked the hub"))
    assert train.choose_attention(CPU)[0] == "sdpa" and train.BACKENDS["in use"] is train.attention_sdpa
    assert train.choose_attention(torch.device("mps"))[0] == "sdpa"


@pytest.mark.parametrize("capability, hip, expected", [
    ((7, 5), None, "sdpa"), ((8, 0), None, "varlen"), ((8, 9), None, "varlen"), ((10, 0), None, "varlen"),
    ((12, 0), None, "varlen"), ((9, 0), "7.0", "varlen"),
])
def test_a_device_that_is_no_hopper_asks_no_hub(capability, hip, expected, monkeypatch):
    pretend(monkeypatch, capability, hip)
    monkeypatch.setattr(train, "load_kernel", lambda *arguments: pytest.fail("asked the hub"))
    backend, reason = train.choose_attention(GPU)
    assert backend == expected and train.BACKENDS["in use"] is getattr(train, f"attention_{expected}")
    assert "NO FLASH" not in reason


@pytest.mark.parametrize("wanted", ["sdpa", "varlen"])
def test_a_forced_backend_is_taken_without_asking_the_hub(wanted, monkeypatch):
    monkeypatch.setattr(train, "load_kernel", lambda *arguments: pytest.fail("asked the hub"))
    assert train.choose_attention(GPU, wanted)[0] == wanted


def test_an_attention_that_does_not_exist_or_not_here_is_an_error_that_names_it(monkeypatch):
    for device, wanted in ((GPU, "flash"), (CPU, "flash"), (CPU, "fa3"), (CPU, "varlen")):
        with pytest.raises(prepare.Failure) as raised:
            train.choose_attention(device, wanted)
        assert str(raised.value).startswith(f"ATTENTION is '{wanted}' on {device.type} (")
        assert "use auto or sdpa, or on a CUDA device of capability (8, 0) or more: fa3 or varlen" in str(raised.value)
    pretend(monkeypatch, (7, 5))
    with pytest.raises(prepare.Failure, match=r"ATTENTION is 'fa3' on cuda \(7, 5\); use auto or sdpa"):
        train.choose_attention(GPU, "fa3")


def test_a_local_kernel_is_loaded_without_a_hub_and_used(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_KERNELS", kernel_folder(tmp_path / "good", FAKE_KERNEL))
    assert train.choose_attention(GPU) == ("fa3", f"Flash Attention 3 from {train.FA3_KERNEL}")
    q, k, v = torch.randn(3, 2, 9, 4, 16)
    for window in (8, 9, 100):
        torch.testing.assert_close(train.attention(q, k, v, window), train.attention_sdpa(q, k, v, window))


def test_the_kernel_gets_a_short_window_as_it_is_and_a_full_one_as_minus_1(monkeypatch):
    seen = []
    monkeypatch.setattr(train, "load_kernel", lambda *_: lambda q, k, v, causal, window_size: seen.append(window_size))
    train.choose_attention(GPU)
    q = torch.zeros(1, 9, 1, 4)
    for window in (0, 7, 8, 9):
        train.attention(q, q, q, window)
    assert seen == [(0, 0), (7, 0), (-1, 0), (-1, 0)]


@pytest.mark.parametrize("source, words", [
    ("import no_such_package", ("ModuleNotFoundError", "no_such_package")),
    ("raise OSError('libcudart.so.12:\\\\n cannot open shared object file')", ("OSError", "cannot open shared")),
    ("raise SystemExit('unsupported')", ("SystemExit", "unsupported")),
    ("pass", ("AttributeError", "flash_attn_func")),
])
def test_a_broken_kernel_is_one_line_and_the_next_backend(source, words, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_KERNELS", kernel_folder(tmp_path / "broken", source))
    falls_back_saying(*words)


def test_a_folder_without_a_build_for_this_torch_is_one_line_and_the_next_backend(tmp_path, monkeypatch):
    folder = kernel_folder(tmp_path / "old", FAKE_KERNEL, "torch19-cxx98-cu101-x86_64-linux")
    monkeypatch.setenv("LOCAL_KERNELS", folder)
    falls_back_saying("FileNotFoundError", "Cannot find a build variant")


def test_a_hub_that_refuses_is_one_line_and_the_next_backend():
    falls_back_saying("ConnectionError", "127.0.0.1")


def test_being_offline_is_one_line_and_the_next_backend(monkeypatch):
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    falls_back_saying("Error")


def test_a_hub_that_accepts_and_never_answers_is_given_up_after_hub_seconds(monkeypatch):
    assert train.HUB_SECONDS <= 18
    monkeypatch.setattr(train, "HUB_SECONDS", 1)
    monkeypatch.setattr(train, "DOWNLOAD_SECONDS", 12)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:
        monkeypatch.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        falls_back_saying("1", seconds=10)


def test_a_name_lookup_that_hangs_is_given_up_after_hub_seconds(monkeypatch):
    """No timeout of a request covers the lookup of its host's name."""
    import requests

    monkeypatch.setattr(train, "HUB_SECONDS", 1)
    monkeypatch.setattr(requests, "head", lambda *arguments, **options: time.sleep(12))
    falls_back_saying("no answer from the hub within 1 s", seconds=10)


def test_a_hub_that_stops_answering_half_way_is_given_up_after_download_seconds(monkeypatch):
    monkeypatch.setattr(train, "DOWNLOAD_SECONDS", 2)
    over = threading.Event()
    with hub_that(lambda path: (200, {}) if path == "/" else (over.wait(30) and 500, {})) as endpoint:
        monkeypatch.setattr(hub, "ENDPOINT", endpoint)
        falls_back_saying("not there within 2 s")
        over.set()


def test_a_slow_first_answer_does_not_cut_short_the_download(monkeypatch):
    """HUB_SECONDS limit the first answer alone: a kernel of some hundred MB may take longer."""
    import kernels

    def slowly(*arguments, **options):
        time.sleep(2)
        return sys.modules[__name__]

    monkeypatch.setattr(kernels, "get_kernel", slowly)
    monkeypatch.setattr(sys.modules[__name__], "flash_attn_func", len, raising=False)
    monkeypatch.setattr(train, "HUB_SECONDS", 1)
    with hub_that(lambda path: (200, {})) as endpoint:
        monkeypatch.setattr(hub, "ENDPOINT", endpoint)
        assert train.choose_attention(GPU)[0] == "fa3" and train.BACKENDS["fa3"] is len


@pytest.mark.parametrize("status, body", [(404, {}), (403, {}), (200, {"avatarUrl": "", "name": "x", "fullname": "x"})])
def test_a_publisher_that_is_not_trusted_is_one_line_and_the_next_backend(status, body, monkeypatch):
    with hub_that(lambda path: (status, body)) as endpoint:
        monkeypatch.setattr(hub, "ENDPOINT", endpoint)
        falls_back_saying("ValueError", "publisher")


def test_a_kernel_is_asked_for_by_version_with_the_allowed_publishers_only(monkeypatch):
    import kernels

    asked = {}
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)  # no question before the one that is looked at
    monkeypatch.setattr(kernels, "get_kernel", lambda repo, **options: asked.update(options, repo=repo))
    falls_back_saying("AttributeError")
    assert asked == {"repo": train.FA3_KERNEL, "version": 1, "trust_remote_code": train.FA3_ALLOWED}


def test_hf_endpoint_is_the_hub_that_is_asked():
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:
        code = ("import torch, train; train.HUB_SECONDS = 3; torch.cuda.get_device_capability = lambda device: (9, 0);"
                "print(train.choose_attention(torch.device('cuda')))")
        done = run("-c", code, HF_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=120)
    assert done.returncode == 0, done.stderr
    assert "NO FLASH ATTENTION 3" in done.stdout and "'varlen'" in done.stdout
