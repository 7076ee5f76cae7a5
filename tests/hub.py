"""A small local server with the hub's URL layout, which can be told to misbehave file by file."""

import collections
import hashlib
import http.server
import threading
import time

HTML = b"<html><body>Please log in</body></html>" * 40


class Hub:
    """Serve `files` (name: bytes) at /datasets/OWNER/NAME/resolve/main/FILE of `url`, from threads of this process.

    `acts[name]` holds what happens to the next GETs of that file, one act each; `always[name]` what happens to all of
    them; `head` to every HEAD. An act is a function of the request's handler and the file's bytes; without one the file
    is sent. `ranges`: answer Range; `hashes`: declare X-Linked-ETag and X-Linked-Size; `cdn`: redirect there, as the
    hub does for large files; `pace`: seconds between two kB. `seen` lists (method, file, headers) of every request.
    """

    def __init__(self, files: dict[str, bytes], ranges: bool = True, hashes: bool = True, cdn: "Hub | None" = None):
        self.files, self.ranges, self.hashes, self.cdn, self.pace = dict(files), ranges, hashes, cdn, 0.0
        self.acts, self.always, self.head = collections.defaultdict(list), {}, None
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self.closing = threading.Event()  # ends what stalls

    def __enter__(self) -> "Hub":
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(self, *error) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def gets(self, name: str) -> list[dict[str, str]]:
        """Headers of every GET of a file."""
        return [headers for method, file, headers in self.seen if (method, file) == ("GET", name)]


class Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[-1]
        self.hub.seen.append((self.command, name, dict(self.headers)))
        body = self.hub.files.get(name)
        if self.command == "HEAD":
            act = self.hub.head
        else:
            act = self.hub.acts[name].pop(0) if self.hub.acts[name] else self.hub.always.get(name)
        if act:
            act(self, body)
        elif body is None:
            status(404)(self, body)
        elif self.hub.cdn:
            self.send(body, code=302, length=0, Location=self.hub.cdn.url + self.path)
        else:
            self.send(body)

    def send(self, body: bytes, code: int = 200, length: int | None = None, sent: int | None = None, kind: str = "",
             hashes: bool = True, **headers: str) -> None:
        """Answer with `body`, declare `length` of it, and send `sent` bytes."""
        start = self.headers.get("Range", "")[len("bytes="):].rstrip("-")
        size = len(body)
        if start and self.hub.ranges and code == 200:
            if int(start) >= size:
                return self.send(b"", code=416)
            code, body = 206, body[int(start) :]
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        self.send_response(code)
        if self.hub.hashes and hashes and code < 400:
            headers["X-Linked-ETag"] = f'"{hashlib.sha256(self.hub.files[self.path.rsplit("/")[-1]]).hexdigest()}"'
            headers["X-Linked-Size"] = str(size)
        headers["Content-Length"] = str(len(body) if length is None else length)
        headers["Content-Type"] = kind or "application/octet-stream"
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET" and code not in (302, 416):
            body = body[:sent]
            for start in range(0, len(body), 1000):
                self.wfile.write(body[start : start + 1000])
                time.sleep(self.hub.pace)

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # the client went away
            pass

    def log_message(self, *arguments) -> None:
        pass


# Acts


def status(code: int, **headers: str):
    def act(handler: Handler, body: bytes | None) -> None:
        handler.send(b"no", code=code, **headers)
    act.__name__ = str(code)
    return act


def cut(handler: Handler, body: bytes) -> None:
    """Close after half of what is left, though all of it was declared."""
    start = int(handler.headers.get("Range", "bytes=0-")[len("bytes="):].rstrip("-")) if handler.hub.ranges else 0
    handler.send(body, sent=(len(body) - start) // 2)


def flip(handler: Handler, body: bytes) -> None:
    """Change bytes in the middle; length and hash are declared as those of the true file."""
    middle = len(body) // 2
    handler.send(body[:middle] + bytes(255 - byte for byte in body[middle : middle + 9]) + body[middle + 9 :])


def stall(handler: Handler, body: bytes) -> None:
    """Send half, then nothing, and keep the connection."""
    cut(handler, body)
    handler.wfile.flush()
    handler.hub.closing.wait(20)


def mute(handler: Handler, body: bytes) -> None:
    """Accept the request and never answer."""
    handler.hub.closing.wait(20)


def web_page(handler: Handler, body: bytes) -> None:
    """Status 200 and HTML, as captive portals and log-in walls do, with no hash of any file."""
    handler.send(HTML, kind="text/html", hashes=False)


def wrong_range(handler: Handler, body: bytes) -> None:
    """Answer 206 with the bytes from the start, whatever was asked for."""
    handler.send(body, code=206, Content_Range=f"bytes 0-{len(body) - 1}/{len(body)}")
