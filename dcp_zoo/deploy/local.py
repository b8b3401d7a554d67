"""A page for the person at this machine: a server that no other machine and no other page in the browser can use."""

import json
from base64 import b64encode
from collections.abc import Callable
from contextlib import nullcontext
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from secrets import compare_digest, token_urlsafe
from threading import Lock
from urllib.parse import unquote

from dcp_zoo.deploy.bulk.review import Review
from dcp_zoo.deploy.limits import listen

TEXT = "text/plain; charset=utf-8"
MOST = 100_000  # bytes that the page may send
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src 'self' data:; style-src 'unsafe-inline'; frame-ancestors 'none'; "
    "script-src 'sha256-{}'"  # of this package's script: one that another has put into a page does not run
)


def serve_review(review: Review, port: int, say: Callable[[str], None]) -> None:
    """Serve a page until Ctrl-C, and save what is said there. Port 0 picks a free one; `say` gets the address, in which
    there is a secret."""
    listening, lock, token = listen("127.0.0.1", port), Lock(), token_urlsafe(24)
    origin = f"http://127.0.0.1:{listening.getsockname()[1]}"
    headers = {
        "Content-Security-Policy": POLICY.format(b64encode(sha256(review.script.encode()).digest()).decode()),
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
    answers: dict[str, tuple[str, Callable[[str], str | bytes | None]]] = {
        "GET ": ("text/html; charset=utf-8", lambda _: review.html),
        "GET marks": ("application/json", lambda _: json.dumps([*review.marks.items()])),
        "GET picture": ("image/jpeg", lambda name: review.picture(json.loads(name))),
        "POST say": (TEXT, lambda said: review.say(*json.loads(said))),
    }

    class Handler(BaseHTTPRequestHandler):
        timeout = 60  # seconds for a request to arrive

        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            secret, _, name = path[1:].partition("/")
            callers = {f"http://{self.headers['Host']}", self.headers["Origin"] or origin}
            allowed = callers == {origin} and compare_digest(secret.encode(), token.encode())
            kind, answer = answers.get(f"{self.command} {name}", (TEXT, None))
            content: str | bytes | None = "Open the address that dcp-zoo review has printed."
            status = 403
            if allowed and answer:
                try:
                    size = min(int(self.headers["Content-Length"] or 0), MOST)
                    text = unquote(query) or self.rfile.read(size).decode()
                    with nullcontext() if name == "picture" else lock:  # large ones take a while
                        status, content = 200, answer(text)
                except (ValueError, TypeError, OSError) as error:  # a ZooError is one
                    status, kind, content = 409, TEXT, str(error)
            body = content if isinstance(content, bytes) else (content or "").encode(errors="replace")
            self.send_response(status)
            for header, value in {**headers, "Content-Type": kind, "Content-Length": str(len(body))}.items():
                self.send_header(header, value)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = listening
    say(f"{origin}/{token}/")
    try:
        server.serve_forever()
    finally:
        lock.acquire()  # what is being saved is saved before the process ends
