"""The running demo and Space under attack, by requests that their pages do not send: no visitor may read a file of the
machine, read another visitor's, or make the server fetch one."""

import http.client
import json
import re
import runpy
import socket
import threading
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest
from helpers import encoded
from PIL import Image

pytest.importorskip("gradio", reason="the demo needs dcp_zoo[demo]")

import uvicorn

import dcp_zoo
from dcp_zoo import demo

ROOT = Path(__file__).parents[1]
SECRET = "nobody else may read this"


@contextmanager
def running(cache, start):
    """The server that `start` starts, with this folder for its files: host and port."""
    listening = socket.create_server(("127.0.0.1", 0))
    servers = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(cache))
        patch.setattr(demo, "listen", lambda host, port: listening)
        patch.setattr(uvicorn.Server, "run", lambda self, sockets: servers.append(self))
        start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(cache))
        thread = threading.Thread(target=servers[0].run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        servers[0].should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("gradio")


@pytest.fixture(scope="module", params=["demo", "space"])
def place(request, cache):
    starts = {"demo": demo.launch, "space": lambda: runpy.run_path(str(ROOT / "hub" / "space" / "app.py"))}
    with running(cache, starts[request.param]) as place:
        yield place


@pytest.fixture
def secrets(tmp_path):
    """Paths that no request may name: of files of the machine, of the package, of folders, and of other machines."""
    text, picture = tmp_path / "secret.txt", tmp_path / "secret.png"
    text.write_text(SECRET)
    Image.new("RGB", (40, 40), "red").save(picture)
    (tmp_path / "drawing.svg").write_text(f"<svg xmlns='http://www.w3.org/2000/svg'><text>{SECRET}</text></svg>")
    own = Path(dcp_zoo.__file__)
    named = [text, picture, tmp_path / "drawing.svg", own, own.parent / "zoo" / "heads.json", "/etc/hostname"]
    return [
        *map(str, named),
        "/proc/self/environ",
        f"{tmp_path}/x/../secret.txt",
        str(tmp_path),
        "http://127.0.0.1:1/a",
    ]


def ask(place, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection(place, timeout=60)
    connection.request(method, path, body, headers or {})
    answer = connection.getresponse()
    return answer.status, answer.read()


def call(place, function, data):
    """Call a handler of the page as a new visitor -> the status, and what the page is told."""
    visitor = uuid4().hex
    body = {"data": data, "fn_index": function, "session_hash": visitor, "event_data": {"index": 0}}
    status, told = ask(place, "POST", "/gradio_api/queue/join", json.dumps(body), {"Content-Type": "application/json"})
    if status == 200:
        told = ask(place, "GET", f"/gradio_api/queue/data?session_hash={visitor}")[1]
    return status, told.decode()


def functions(place, *kinds):
    """The page's handlers: their numbers, and how many inputs each takes; of these kinds of inputs, if given."""
    page = ask(place, "GET", "/")[1].decode()
    config = json.loads(re.search(r"window\.gradio_config = (.*?);</script>", page)[1])
    kind = {component["id"]: component["type"] for component in config["components"]}
    called = [row for row in config["dependencies"] if row["backend_fn"]]
    if kinds:
        called = [row for row in called if any(kind[i] in kinds for i in row["inputs"])]
    return {row["id"]: len(row["inputs"]) for row in called}


def upload(place, name, content):
    """The place of an upload, as the page is told it."""
    form = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    status, told = ask(place, "POST", "/gradio_api/upload", form + content + b"\r\n--x--\r\n", headers)
    assert status == 200
    return json.loads(told)[0]


def forms(path):
    """A file as a request may name it."""
    file = {"path": path, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
    return [file, [file], {"value": [{"image": file}]}, file | {"url": path}, {"path": path}]


def test_no_call_reads_a_file_of_the_machine(place, secrets, cache):
    count = 0
    for function, inputs in functions(place).items():
        for path in secrets:
            for form in forms(path) if function % 5 == 0 else forms(path)[:2]:
                status, told = call(place, function, [form] * max(inputs, 1))
                assert status == 400
                assert SECRET not in told
                count += 1
    assert count >= 200
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_gradios_own_lock_holds_too(place, secrets, cache, monkeypatch):
    async def none(request):
        return None

    monkeypatch.setattr("dcp_zoo.demo.app.refusal", none)
    for function, inputs in functions(place, "file", "uploadbutton", "image", "textbox").items():
        told = call(place, function, [forms(secrets[function % 2])[0]] * inputs)[1]
        assert SECRET not in told
        assert str(cache) not in told
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_only_the_pages_own_addresses_answer(place, secrets):
    for path in secrets:
        assert ask(place, "GET", f"/gradio_api/file={path}")[0] == 403
        assert ask(place, "GET", f"/gradio_api/proxy={path}")[0] == 404
    for path in ("config", "gradio_api/info", "gradio_api/vibe-code", "gradio_api/runs", "monitoring", "docs"):
        assert ask(place, "GET", f"/{path}")[0] == 404
    for path in ("run/predict", "api/predict", "call/predict", "component_server", "process_recording", "vibe-edit"):
        assert ask(place, "POST", f"/gradio_api/{path}", "{}")[0] == 404
    assert ask(place, "POST", "/gradio_api/queue/join", b" " * 1_000_000)[0] == 413
    assert ask(place, "POST", "/gradio_api/queue/join", b"[" * 100_000)[0] == 400


def test_heads_and_methods_are_those_of_the_menus(place, monkeypatch):
    asked, other = [], ["local-dir:/etc", "hf-hub:someone/else", "open_clip:ViT-B-32/openai"]
    monkeypatch.setattr("dcp_zoo.demo.shared.as_model", lambda *args: asked.append(args))
    monkeypatch.setattr("dcp_zoo.demo.train_room.FewShotClassifier", lambda *args, **options: asked.append(args))
    for function, inputs in functions(place, "dropdown", "radio").items():
        for name in other:
            call(place, function, [name] * inputs)
    assert asked == []


def test_visitors_with_the_same_picture_have_files_of_their_own(place, cache):
    picture = encoded(Image.new("RGB", (40, 30), "red"))
    first, second = (upload(place, "../../photo.png", picture) for _ in range(2))
    assert first != second
    assert Path(first).name == Path(second).name == "photo.png"
    assert Path(first).parents[1] == Path(second).parents[1] == cache
    assert demo.shared.read_uploads(first, 1)[0][0].name == "photo.png"  # what a handler does, and removes the file
    assert ask(place, "GET", f"/gradio_api/file={second}") == (200, picture)
    assert ask(place, "GET", f"/gradio_api/file={first}")[0] == 403
    assert call(place, min(functions(place)), [forms(first)[0]])[0] == 400
    assert demo.shared.read_uploads(second, 1)[1] == []
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_a_file_that_is_too_large_is_refused(place, cache):
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + bytes(20_000_001)
    assert ask(place, "POST", "/gradio_api/upload", form + b"\r\n--x--\r\n", headers)[0] == 413
    assert [path for path in cache.rglob("*") if path.is_file()] == []
