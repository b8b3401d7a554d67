"""What a person says on a page of predict --sheet or inspect, saved when it is said: in a table, and if the run wrote
them in the folders of sorted images and in keywords. The page is served to the person at this machine: no other machine
and no other page in the browser can use it."""

import json
import os
import re
from base64 import b64decode, b64encode
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from secrets import compare_digest, token_urlsafe
from threading import Lock
from urllib.parse import unquote

from dcp_zoo.answers import Hierarchy
from dcp_zoo.data.images import jpeg_base64, load_image
from dcp_zoo.deploy.bulk.journal import Journal, lines_of, undo
from dcp_zoo.deploy.bulk.on_disk import write_keywords
from dcp_zoo.deploy.bulk.sorted_folders import move_into
from dcp_zoo.deploy.limits import listen
from dcp_zoo.errors import ZooError, as_zoo_error
from dcp_zoo.files import templates
from dcp_zoo.texts import NONE, class_folders, csv_bytes, is_reserved, read_csv

TABLES = {"class": "corrections.csv", "change": "changes.csv"}  # next to the page, by the column that people fill
SIDE = 1200  # pixels of a large picture
TEXT = "text/plain; charset=utf-8"
MOST = 100_000  # bytes that the page may send
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src 'self' data:; style-src 'unsafe-inline'; frame-ancestors 'none'; "
    "script-src 'sha256-{}'"  # of this package's script: one that another has put into a page does not run
)


class Review:
    """The images of a page by their names on it, and what was said of them. A correction that was being saved when the
    last review was killed is saved first. ZooError for another page, or one of another version of this package."""

    def __init__(self, page: Path) -> None:
        with as_zoo_error(f"{page} is not the sheet.html of predict --sheet or the inspection.html of inspect ({{}})."):
            self.html = page.read_text("utf-8")
            about = json.loads(re.findall('id="about">(.*?)</script>', self.html)[0])
            self.column, self.none, self.run = about["column"], about["none"], about["run"]
            self.classes = {*about["classes"]}
            self.table, here = page.with_name(TABLES[self.column]).absolute(), page.parent.absolute()
        self.script = templates(__package__).get_template("review.js").render()
        if self.script not in self.html:
            raise ZooError(f"{page} was written by another version of dcp_zoo: write it again with this one.")
        self.journal = Journal(self.table.with_suffix(".undo.jsonl"))
        self.mark = f"{sha256(self.html.encode(errors='replace')).hexdigest()[:12]} "  # names return on later pages
        lines = [
            line | {"of": line["of"].removeprefix(self.mark)}
            for line in (lines_of(self.journal.file) if self.journal.file.exists() else ())
            if line["of"].startswith(self.mark)
        ]
        moves = {(line["of"], line["from"]): line["to"] for line in lines if "from" in line}
        self.root = os.path.normpath(here / (self.run.get("sorted") or "."))
        self.first = {name: os.path.normpath(here / place) for name, place in about["places"].items()}
        self.places = dict(self.first)  # where each is now
        for name, place in self.first.items():
            while os.path.lexists(moves.get((name, place), "")):
                place = self.places[name] = moves[name, place]
        self.said = {row[0]: row[1] for row in read_csv(self.table)[1:]} if self.table.exists() else {}  # by file
        answers = [line for line in lines if "said" in line]
        before, last = ({line["of"]: line for line in found} for found in (answers, lines))
        cut = {name: line["said"] for name, line in before.items() if "done" not in last[name]}
        for line in answers:
            if line["of"] in cut:
                self.said.pop(line["was"], None)
        new = {name: said for name, said in self.marks.items() if name not in before or before[name]["said"] != said}
        for name, answer in (new | cut).items():
            if self._is_there(name):
                self.say(name, answer)

    @property
    def marks(self) -> dict[str, str]:
        """What was said, by the names of the images."""
        names = {self._file(name): name for name in self.places}
        return {names.get(file, file): answer for file, answer in self.said.items()}

    def say(self, name: str, answer: str | None) -> None:
        """Save what an image shows, or with None that nothing is said of it. ZooError if it is not there any more."""
        journal, file = replace(self.journal, of=self.mark + name), self._file(name)
        if not self._is_there(name):
            raise ZooError(f"{self.places[name]} is not there any more: start dcp-zoo review again.")
        if answer is not None and (not answer or is_reserved(answer)) and answer != self.none:
            raise ZooError(f"{answer!r} is not a class: choose another name.")
        journal.note({"said": answer, "was": file})
        undo(journal.file, journal.of)
        if name in self.places:
            if not self._is_there(name):  # it is back
                self.places[name] = self.first[name]
            if answer is not None:
                self._apply(name, answer, journal)
        self.said.pop(file, None)
        self.said |= {} if answer is None else {self._file(name): answer}
        content = csv_bytes(["file", self.column], self.said.items()) if self.said else b""
        if content != (self.table.read_bytes() if self.table.exists() else b""):
            self.journal.write(self.table, content)
        journal.note({"done": True})

    def _apply(self, name: str, answer: str, journal: Journal) -> None:
        """Move an image to the folder of its class, if it was sorted, and write the class as keyword."""
        path = Path(self.places[name])
        if self.run["sorted"] and path.is_relative_to(self.root):
            folder, *below, _ = path.relative_to(self.root).parts
            right = class_folders({*self.classes, *self.said.values(), answer})[answer]
            if folder != right:
                reserved = {os.path.splitext(first)[0] for first in self.first.values()}  # noqa: PTH122
                folders = [str(Path(right, *below))]
                path = move_into([str(path)], folders, Path(self.root), journal, reserved)[0] or path
                self.places[name] = str(path)
        if keywords := self.run["keywords"]:
            tree = Hierarchy(**keywords["hierarchy"]) if keywords["hierarchy"] else None
            names = [] if answer == NONE else tree.path_to(answer) if tree else [answer]
            write_keywords([path], [names], keywords["embed"], journal)

    def _is_there(self, name: str) -> bool:
        return name not in self.places or os.path.lexists(self.places[name])

    def _file(self, name: str) -> str:
        """What an image is called in the table: its name, but of one that was moved after its run where it is."""
        stays = name not in self.places or not self.run["moved"] or self.places[name] == self.first[name]
        return name if stays else self.places[name]

    def picture(self, name: str) -> bytes:
        """An image of the page as a JPEG."""
        if name not in self.places:
            raise ZooError(f"There is no larger picture of {name}.")
        return b64decode(jpeg_base64(load_image(self.places[name]), SIDE))


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
