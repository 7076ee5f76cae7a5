"""Which attention a device gets; a kernel that is not to be had costs one line and few seconds."""

import contextlib
import json
import socket
import time

import huggingface_hub.constants as hub
import kernels
import pytest
import torch
from conftest import CPU

import prepare
import train

MPS, GPU = torch.device("mps"), torch.device("cuda")
ECHO = "def flash_attn_func(q, k, v, causal, window_size): return (causal, *window_size), 'lse'"


@pytest.fixture(autouse=True)
def own_hub(tmp_path, monkeypatch):
    """A fake Hopper, no kernel folder, an empty hub cache, a hub that refuses, nothing chosen."""
    pretend(monkeypatch, (9, 0))
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(train, "attention", None)


def pretend(monkeypatch, capability, hip=None):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "hip", hip)


def kernel_folder(path, source, variant="torch-universal"):
    build = path / "build" / variant
    build.mkdir(parents=True)
    (build / "__init__.py").write_text(source)
    (build / "metadata.json").write_text(json.dumps({
        "id": f"_fake_{path.name}", "name": "flash-attn3", "version": 1, "license": "MIT",
        "python-depends": [], "backend": {"type": "cpu"}}))
    return f"{train.FA3_KERNEL}={path}"


def falls_back_saying(words):
    """choose_attention soon takes varlen instead of FA3 and says so, and why, in one line."""
    latest = time.monotonic() + 10
    backend, reason = train.choose_attention(GPU)
    assert backend == "varlen" and train.attention is train.attention_varlen
    assert reason.startswith(f"NO FLASH ATTENTION 3: {train.FA3_KERNEL} did not load (")
    assert reason.endswith("); torch's varlen_attn") and words in reason, reason
    assert "\n" not in reason and len(reason) < 400 and time.monotonic() < latest


@pytest.mark.parametrize("device, capability, hip, wanted, expected", [
    (CPU, None, None, "auto", "sdpa"), (MPS, None, None, "auto", "sdpa"),
    (GPU, (7, 5), None, "auto", "sdpa"), (GPU, (8, 0), None, "auto", "varlen"),
    (GPU, (10, 0), None, "auto", "varlen"), (GPU, (9, 0), "7.0", "auto", "varlen"),
    (GPU, (9, 0), None, "sdpa", "sdpa"), (GPU, (9, 0), None, "varlen", "varlen"),
])
def test_no_hopper_and_a_forced_backend_ask_no_hub(device, capability, hip, wanted, expected, monkeypatch):
    pretend(monkeypatch, capability, hip)
    monkeypatch.setattr(train, "load_kernel", lambda *arguments: pytest.fail("asked the hub"))
    backend, reason = train.choose_attention(device, wanted)
    assert backend == expected and "NO FLASH" not in reason
    assert train.attention is getattr(train, f"attention_{expected}")


def test_an_attention_that_does_not_exist_or_not_here_is_an_error_that_names_it(monkeypatch):
    pretend(monkeypatch, (7, 5))
    for device, wanted in ((GPU, "flash"), (GPU, "fa3"), (CPU, "flash"), (CPU, "varlen")):
        with pytest.raises(prepare.Failure, match=rf"^ATTENTION is '{wanted}' on {device.type} \("):
            train.choose_attention(device, wanted)


def test_a_local_kernel_is_used_and_gets_minus_1_for_a_full_window(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_KERNELS", kernel_folder(tmp_path / "good", ECHO))
    assert train.choose_attention(GPU) == ("fa3", f"Flash Attention 3 from {train.FA3_KERNEL}")
    q = torch.zeros(1, 9, 1, 4)  # (B, T, H, D)
    seen = [train.attention(q, q, q, window) for window in (0, 7, 8, 9)]
    assert seen == [(True, 0, 0), (True, 7, 0), (True, -1, 0), (True, -1, 0)]


@pytest.mark.parametrize("source, variant, said", [
    ("import no_such_package", "torch-universal", "ModuleNotFoundError: No module named 'no_such"),
    ("raise OSError('libcudart:\\\\n cannot open')", "torch-universal", "OSError: libcudart"),
    ("raise SystemExit('unsupported')", "torch-universal", "SystemExit: unsupported"),
    ("pass", "torch-universal", "AttributeError: "),
    (ECHO, "torch19-cxx98-cu101-x86_64-linux", "Cannot find a build variant"),
])
def test_a_broken_kernel_is_one_line_and_the_next_backend(source, variant, said, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_KERNELS", kernel_folder(tmp_path / "broken", source, variant))
    falls_back_saying(said)


def test_a_hub_that_refuses_to_say_who_is_trusted_is_one_line_and_the_next_backend():
    falls_back_saying("ValueError: ")  # of the kernels package


def test_a_hub_that_accepts_and_never_answers_is_given_up_after_hub_seconds(monkeypatch):
    monkeypatch.setattr(train, "HUB_SECONDS", 1)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:
        monkeypatch.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        falls_back_saying("(no answer from the hub within 1 s)")


def test_a_kernel_is_asked_for_by_version_with_the_allowed_publishers_only(monkeypatch):
    asked = {}
    monkeypatch.setattr(kernels, "get_kernel", lambda repo, **o: asked.update(o, repo=repo))
    falls_back_saying("AttributeError: ")
    assert asked == dict(repo=train.FA3_KERNEL, version=1, trust_remote_code=train.FA3_ALLOWED)
