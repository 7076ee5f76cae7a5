"""A small local server with the hub's URL layout, which can be told to misbehave file by file."""

import collections
import contextlib
import hashlib
import http.server
import re
import threading


class Hub(http.server.ThreadingHTTPServer):
    """Serve `files` (name: bytes) at /datasets/OWNER/NAME/resolve/main/FILE of `url`, from threads.

    `acts[name]` holds what happens to the next GETs of that file, one act each; `always[name]` what
    happens to all of them; `head` to every HEAD. An act is a function of the request's handler and
    the file's bytes. `ranges`: answer Range; `hashes`: declare X-Linked-ETag and X-Linked-Size;
    `cdn`: redirect there, as the hub does for large files. `seen`: (method, file, headers) of all.
    """

    def __init__(self, files: dict[str, bytes], hashes: bool = True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.hashes, self.ranges, self.cdn, self.head = dict(files), hashes, True, None, None
        self.acts, self.always, self.seen = collections.defaultdict(list), {}, []
        self.url, self.closing = f"http://127.0.0.1:{self.server_port}", threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def __exit__(self, *error) -> None:
        self.closing.set()  # ends what stalls
        self.shutdown()
        self.server_close()

    def gets(self, name: str) -> list[dict[str, str]]:
        """Headers of every GET of a file."""
        return [headers for method, file, headers in self.seen if (method, file) == ("GET", name)]

    def tokens(self) -> set[str | None]:
        """What came as Authorization, over all requests."""
        return {headers.get("Authorization") for _, _, headers in self.seen}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        hub, self.name = self.server, self.path.rsplit("/", 1)[-1]
        hub.seen.append((self.command, self.name, dict(self.headers)))
        right = re.fullmatch(r"/datasets/karpathy/[\w-]+/resolve/main/[\w.]+", self.requestline.split()[1])
        body, acts = hub.files.get(self.name) if right else None, hub.acts[self.name]
        act = hub.head
        if self.command == "GET":
            act = acts.pop(0) if acts else hub.always.get(self.name)
        if act or body is None:
            (act or status(404))(self, body)
        elif hub.cdn:
            self.send(b"", code=302, Location=hub.cdn.url + self.path)
        else:
            self.send(body)

    do_HEAD = do_GET

    def start(self) -> int:
        """Where the Range that was asked for begins."""
        return int(self.headers.get("Range", "bytes=0-")[6:-1]) if self.server.ranges else 0

    def send(self, body: bytes, code: int = 200, sent=None, hashes=True, **headers: str) -> None:
        """Answer with the part of `body` that was asked for, but break off after `sent` bytes."""
        start, size = self.start(), len(body)
        if start and code == 200:
            code, body = (206, body[start:]) if start < size else (416, b"")
            headers["Content_Range"] = f"bytes {start}-{size - 1}/{size}"
        self.send_response(code)
        if self.server.hashes and hashes and code < 400:
            file = self.server.files[self.name]
            headers |= dict(X_Linked_ETag=f'"{hashlib.sha256(file).hexdigest()}"', X_Linked_Size=str(len(file)))
        for key, value in ({"Content_Length": str(len(body))} | headers).items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:sent])

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client went away
            super().handle()

    def log_message(self, *_) -> None: ...


def status(code: int, **options):
    """An act: answer so, with a body of two bytes."""
    def act(handler: Handler, body: bytes | None) -> None:
        handler.send(b"no", code=code, **options)
    act.__name__ = str(code)
    return act


# Status 200 and HTML, as captive portals and log-in walls do, with no hash of any file
web_page = status(200, hashes=False, Content_Type="text/html")


def cut(handler: Handler, body: bytes) -> None:
    """Close after half of what is left, though all of it was declared."""
    handler.send(body, sent=(len(body) - handler.start()) // 2)


def flipped(body: bytes) -> bytes:
    at = len(body) // 2
    return body[:at] + bytes([body[at] ^ 255]) + body[at + 1 :]


def flip(handler: Handler, body: bytes) -> None:
    """Change a byte; length and hash are declared as those of the true file."""
    handler.send(flipped(body))


def lie(handler: Handler, body: bytes) -> None:
    """As flip, with the hash of what is sent."""
    handler.send(other := flipped(body), hashes=False, X_Linked_ETag=hashlib.sha256(other).hexdigest())


def sha1(handler: Handler, body: bytes) -> None:
    """Declare a hash of another kind, as git does for small files."""
    handler.send(body, hashes=False, X_Linked_ETag="0" * 40)


def stall(handler: Handler, body: bytes) -> None:
    """Send half, then nothing, and keep the connection."""
    cut(handler, body)
    mute(handler, body)


def mute(handler: Handler, body: bytes) -> None:
    """Accept the request and never answer."""
    handler.server.closing.wait(20)


def wrong_range(handler: Handler, body: bytes) -> None:
    """Answer 206 with the bytes from the start, whatever was asked for."""
    handler.send(body, code=206, Content_Range=f"bytes 0-{len(body) - 1}/{len(body)}")
