"""Another build of torch: uv runs the README's commands on stub wheels, behind a proxy that answers for every host."""

import datetime
import http.server
import io
import json
import os
import re
import shutil
import ssl
import sys
import threading
import zipfile

import pytest
import torch
from conftest import ROOT
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from test_docs import README, readme_command, shell

import prepare

BACKENDS = sorted(set(re.findall(r"--torch-backend=(\w+(?:\.\d+)?)", README)) - {"auto"})
PINS = dict(re.findall(r'"([\w-]+)==([\d.]+)"', (ROOT / "pyproject.toml").read_text()))
BRINGS = {"simple": ["nvidia-stub", "triton"], "cu": ["triton"], "rocm": ["triton-rocm"], "cpu": []}  # what torch needs
WHEEL = ["Wheel-Version: 1.0", "Root-Is-Purelib: true"]
WHICH = "uv run python -c 'import importlib.metadata as m; print(m.version(\"torch\"))'"


def wheel(index: str, name: str) -> tuple[str, bytes]:
    """File name and bytes of a wheel without code; a build of torch has the name of its index in its version."""
    version = PINS.get(name, "99") + (f"+{index}" if name == "torch" and index != "simple" else "")
    needs = BRINGS[index.rstrip("0123456789.")] if name == "torch" else []
    stem, file = f"{name.replace('-', '_')}-{version}", io.BytesIO()
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {n}" for n in needs)]
    with zipfile.ZipFile(file, "w") as archive:
        for part, lines in {"METADATA": metadata, "WHEEL": WHEEL, "RECORD": []}.items():
            archive.writestr(f"{stem}.dist-info/{part}", "\n".join(lines))
    return f"{stem}-py3-none-any.whl", file.getvalue()


def secured(folder) -> ssl.SSLContext:
    """A server's side of TLS with a certificate that vouches for itself."""
    key, now, name = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(), x509.Name([])
    ends = (now + datetime.timedelta(days=days) for days in (-1, 1))
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, *ends).sign(key, SHA256())
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "server.pem").write_bytes(made.public_bytes(Encoding.PEM) + secret)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    return context


@pytest.fixture
def world(tmp_path):
    """(folder, environment, dated): the stub indexes named in `dated` declare upload dates; torch's own do not."""
    dated, context = {"simple"}, secured(tmp_path)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_CONNECT(self):
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            self.connection = context.wrap_socket(self.connection, server_side=True)
            self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb", 0)

        def do_GET(self):
            *_, index, project, file = self.path.split("/")
            name, body = wheel(index, project)
            if not file:
                entry = {"filename": name, "url": name.replace("+", "%2B"), "hashes": {}}
                entry |= {"upload-time": "2026-01-01T00:00:00Z"} if index in dated else {}
                body = json.dumps({"meta": {"api-version": "1.1"}, "name": project, "files": [entry]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/" + ("zip" if file else "vnd.pypi.simple.v1+json"))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if self.command == "GET" else b"")

        do_HEAD, log_message = do_GET, lambda *_: None

    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path, {
            "PATH": os.pathsep.join([f"{sys.base_prefix}/bin", os.environ["PATH"]]), "HOME": str(tmp_path),
            "HTTPS_PROXY": f"http://127.0.0.1:{server.server_port}", "UV_INSECURE_HOST": "*",
            "UV_CACHE_DIR": str(tmp_path / "uv"), "UV_PYTHON_DOWNLOADS": "never", "UV_HTTP_RETRIES": "0"}, dated
        server.shutdown()


@pytest.mark.skipif(not BACKENDS, reason="the README names no --torch-backend")
@pytest.mark.parametrize("backend, driver, build, mirror", [
    *((name, "", name, False) for name in BACKENDS),
    ("auto", "525.60.13", "cu12", False), ("auto", "580.65", "cu13", True)])
def test_the_readme_installs_a_build_that_stays(backend, driver, build, mirror, world):
    folder, env, dated = world
    lines = ["set -e", *map(readme_command, ("uv venv", "uv pip install --torch", "export UV_NO_SYNC"))]
    lines[2] = lines[2].replace("=auto ", f"={backend} ")
    env |= {"UV_CUDA_DRIVER_VERSION": driver} if driver else {}
    if mirror:
        dated.clear()
        shell("\n".join(lines), folder, env, code=1)
        lines.insert(0, re.search("`(export UV_NO_CONFIG=1)`", README)[1])
    assert shell("\n".join([*lines, WHICH]), folder, env).startswith(f"{PINS['torch']}+{build}")
    if not mirror:  # what the README warns of
        assert shell(WHICH, folder, env) == f"{PINS['torch']}\n"


@pytest.mark.parametrize("found, cuda, hip, hidden, said", [
    ("nvidia-smi", "13.0", None, "0", "An NVIDIA GPU .* CUDA 13.0: .*driver is too old.* or a _VISIBLE_DEVICES"),
    ("/proc/driver/nvidia", None, None, "0", "An NVIDIA .* without CUDA;"),
    ("/dev/kfd", "13.0", None, "0", "An AMD .* without ROCm;"), ("/dev/kfd", None, "7.2", "0", "An AMD .* ROCm 7.2: "),
    ("nvidia-smi", "13.0", None, "", None), ("nvidia-smi", "13.0", None, "-1", None),
    ("seen", "13.0", None, "0", None), ("nothing", None, None, "0", None)])
def test_a_gpu_that_torch_does_not_see_is_named(found, cuda, hip, hidden, said, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    monkeypatch.setattr(shutil, "which", lambda name, *_: name if found in (name, "seen") else None)
    monkeypatch.setattr(os.path, "exists", lambda path: found == path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found == "seen")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    line = prepare.unseen_gpu()
    assert re.match(f"{said}.*README, Other machines$", line) if said else line == ""
