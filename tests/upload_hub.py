"""A Hub in memory that takes uploads from the stock client: repositories, commits and LFS objects.

It answers the client's requests: create, preupload, LFS batch (basic transfer), commit (NDJSON), info,
resolve, search. No package at hand does: olah has no uploads, and hf-local-hub's wheel comes without its server.
"""

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import yaml
from helpers import http_server

TOKEN = "hf_of_the_tests"
LFS = (".safetensors", ".bin")


def git_oid(content: bytes) -> str:
    """The name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    """A repository: the files of each commit, oldest first."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit and the files of a revision; None if there is no such commit."""
        head = next(reversed(self.commits))
        oid = head if revision == "main" else self.tags.get(revision, revision)
        return (oid, self.commits[oid]) if oid in self.commits else None

    def commit(self, files: dict[str, bytes], oid: str | None = None) -> str:
        """Add a commit, such as the one that a row of models.yaml has pinned; returns its name."""
        content = "".join(f"{name}{git_oid(data)}" for name, data in files.items())
        oid = oid or hashlib.sha1(f"{len(self.commits)}{content}".encode()).hexdigest()
        self.commits[oid] = files
        return oid


class UploadHub:
    """The state of the Hub. `faults` are answered once each, in order, to requests whose path matches."""

    def __init__(self) -> None:
        self.url = ""
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.gated: set[str] = set()  # nobody has access to these
        # pattern and status; 0 cuts the connection after the work is done, 206 within a file; 200 takes no
        # range
        self.faults: list[tuple[str, int]] = []
        self.ranges: list[str] = []  # that were asked for
        self.requests: list[str] = []
        self.lock = threading.RLock()

    def add(self, repo_id: str, files: dict[str, Path], tag: str = "") -> str:
        """Add a commit of these files; returns its name."""
        repo = self.repos.setdefault(repo_id, Repo(private=False))
        repo.tags[tag] = repo.commit({name: path.read_bytes() for name, path in files.items()})
        return repo.tags[tag]

    def files(self, repo_id: str) -> dict[str, bytes]:
        """The newest files of a repository."""
        _, files = self.repos[repo_id].at("main")
        return files

    def published(self) -> dict[str, int]:
        """How many commits with files each repository has."""
        return {name: len(repo.commits) - 1 for name, repo in self.repos.items()}

    def take_fault(self, method: str, path: str) -> int | None:
        for fault in self.faults:
            if re.search(fault[0], f"{method} {path}"):
                self.faults.remove(fault)
                return fault[1]
        return None


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, code: str = "", body: Any = None) -> None:
        self.status, self.code, self.body = status, code, {"error": code} if body is None else body


class Answers(BaseHTTPRequestHandler):
    """One request: the first of `ROUTES` that matches answers it."""

    hub: UploadHub
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.extra: dict[str, str] = {}
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            self.query = urllib.parse.parse_qs(url.query)
            fault = self.hub.take_fault(self.command, path)
            try:
                if fault not in (None, 0, 200, 206):
                    raise Refusal(fault, "fault of the tests")
                content, status = self.dispatch(path), 200
            except Refusal as refusal:
                content, status = refusal.body, refusal.status
                told = {"X-Error-Code": refusal.code} if refusal.code else {"X-Error-Message": "Invalid username."}
                self.extra |= {**told, "Retry-After": "0"}
        if fault == 0:
            self.close_connection = True
            return
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        if (wanted := self.headers.get("Range")) and status == 200:
            self.hub.ranges.append(wanted)
            if fault != 200:
                start = int(wanted.removeprefix("bytes=").rstrip("-"))
                status = 206 if start < len(data) else 416
                self.extra["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                data = data[start:]
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | self.extra).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with suppress(ConnectionError):  # of a client that was killed
                self.wfile.write(data[: len(data) // 2] if fault == 206 else data)
            self.close_connection = self.close_connection or fault == 206

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def dispatch(self, path: str) -> Any:
        for methods, pattern, function in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split():
                if self.command in ("POST", "PUT") and not path.startswith("/lfs/") and "validate" not in path:
                    self.check_token()
                return function(self, *match.groups())
        raise Refusal(404, "EntryNotFound")

    def check_token(self) -> None:
        given = self.headers.get("Authorization", "")
        if given != f"Bearer {TOKEN}":
            raise Refusal(403 if given else 401)

    def repo(self, repo_id: str) -> Repo:
        if repo_id not in self.hub.repos:  # those who are not logged in are told what they are told of private repos
            raise Refusal(404, "RepoNotFound") if "Authorization" in self.headers else Refusal(401)
        return self.hub.repos[repo_id]

    def revision(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]]:
        found = self.repo(repo_id).at(revision)
        if found is None:
            raise Refusal(404, "RevisionNotFound")
        return found

    def create(self) -> Any:
        request = json.loads(self.body)
        repo_id = f"{request['organization']}/{request['name']}"
        if repo_id in self.hub.repos:
            raise Refusal(409, body={"url": f"{self.hub.url}/{repo_id}"})
        private = request.get("private") or request.get("visibility") == "private"
        self.hub.repos[repo_id] = Repo(private)
        self.hub.repos[repo_id].commit({})
        return {"url": f"{self.hub.url}/{repo_id}", "id": "1", "name": repo_id}

    def preupload(self, repo_id: str, revision: str) -> Any:
        _, files = self.revision(repo_id, revision)
        modes = []
        for file in json.loads(self.body)["files"]:
            name, old = file["path"], files.get(file["path"])
            is_lfs = name.endswith(LFS)
            oid = None if old is None else hashlib.sha256(old).hexdigest() if is_lfs else git_oid(old)
            modes.append(
                {"path": name, "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False, "oid": oid}
            )
        return {"files": modes}

    def batch(self, repo_id: str) -> Any:
        self.repo(repo_id)
        objects = []
        for item in json.loads(self.body)["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}", "header": {}}}}
            objects.append(item | ({} if item["oid"] in self.hub.objects else upload))
        return {"transfer": "basic", "objects": objects}

    def put(self, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(422)
        self.hub.objects[oid] = self.body
        return {}

    def commit(self, repo_id: str, revision: str) -> Any:
        parent, files = self.revision(repo_id, revision)
        files = dict(files)
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header" and value.get("parentCommit", parent) != parent:
                raise Refusal(412)
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        oid = self.repo(repo_id).commit(files)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}"}

    def info(self, repo_id: str, revision: str | None = None) -> Any:
        oid, files = self.revision(repo_id, revision or "main")
        siblings = [{"rfilename": name} for name in files]
        private = self.repo(repo_id).private
        return {"id": repo_id, "modelId": repo_id, "sha": oid, "private": private, "siblings": siblings, "tags": []}

    def tree(self, repo_id: str, revision: str) -> Any:
        """The files of a commit, as for the download of all of them."""
        _, files = self.revision(repo_id, revision)
        return [{"type": "file", "path": name, "size": len(data), "oid": git_oid(data)} for name, data in files.items()]

    def search(self) -> Any:
        """The repositories with all tags of `filter`, as by GET /api/models with full and cardData; private
        ones only for those who are logged in. Tags are what a card says, by the kind of its fields."""
        found = []
        for repo_id, repo in self.hub.repos.items():
            oid, files = repo.at("main")
            if "README.md" not in files or (repo.private and "Authorization" not in self.headers):
                continue
            card = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
            library = card.get("library_name")
            fields = [f"{kind}:{value}" for kind in ("dataset", "license") for value in listed(card, kind)]
            tags = [*filter(None, [library]), *card.get("tags", []), *fields, "region:us"]
            info = {"_id": repo_id, "id": repo_id, "modelId": repo_id, "author": repo_id.split("/")[0], "sha": oid}
            info |= {"private": repo.private, "gated": False, "downloads": 0, "likes": 0, "library_name": library}
            info |= {"lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z"}
            info |= {"tags": tags, "pipeline_tag": card.get("pipeline_tag"), "cardData": card}
            if {*self.query.get("filter", [])} <= {*tags}:
                found.append(info | {"siblings": [{"rfilename": name} for name in files]})
        return found

    def resolve(self, repo_id: str, revision: str, name: str) -> Any:
        oid, files = self.revision(repo_id, revision)
        self.extra["X-Repo-Commit"] = oid
        if repo_id in self.hub.gated:
            raise Refusal(403, "GatedRepo")
        if name not in files:
            raise Refusal(404, "EntryNotFound")
        content = files[name]
        etag = hashlib.sha256(content).hexdigest() if name.endswith(LFS) else git_oid(content)
        self.extra |= {"ETag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        return content

    def log_message(self, *args: object) -> None:
        pass


def listed(card: dict[str, Any], kind: str) -> list[str]:
    """The values of a card's field, which may be one or several."""
    values = card.get(kind) or card.get(f"{kind}s") or []
    return values if isinstance(values, list) else [values]


REPO, REVISION = r"([\w.-]+/[\w.-]+)", r"([\w.-]+)"
ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("HEAD GET", "/?", lambda self: {}),
    ("GET", "/api/models", Answers.search),
    ("POST", "/api/repos/create", Answers.create),
    ("POST", "/api/validate-yaml", lambda self: {"errors": [], "warnings": []}),
    ("POST", f"/api/models/{REPO}/preupload/{REVISION}", Answers.preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Answers.batch),
    ("PUT", r"/lfs/(\w+)", Answers.put),
    ("POST", f"/api/models/{REPO}/commit/{REVISION}", Answers.commit),
    ("GET", f"/api/models/{REPO}", Answers.info),
    ("GET", f"/api/models/{REPO}/revision/{REVISION}", Answers.info),
    ("GET", f"/api/models/{REPO}/tree/{REVISION}", Answers.tree),
    ("GET HEAD", f"/{REPO}/resolve/{REVISION}/(.+)", Answers.resolve),
]


@contextmanager
def serve_uploads() -> Iterator[UploadHub]:
    """Serve an empty Hub on a free port."""
    hub = UploadHub()
    handler = type("Handler", (Answers,), {"hub": hub})
    with http_server(handler) as hub.url:
        yield hub
