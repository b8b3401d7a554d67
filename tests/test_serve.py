"""The server, started once: answers equal to Python's, batches, limits, bad input, and a stop that loses
nothing."""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from contextlib import ExitStack, contextmanager
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest
from helpers import answers as predictions
from helpers import encoded, png_that_claims, until
from PIL import Image

for module in ("onnxruntime", "fastapi_offline", "python_multipart"):
    pytest.importorskip(module, reason="the server needs dcp_zoo[serve,export]")

from dcp_zoo import ZooError  # noqa: E402
from dcp_zoo.data import load_image  # noqa: E402
from dcp_zoo.data.packaged import sample_images  # noqa: E402
from dcp_zoo.prediction.onnx import OnnxClassifier  # noqa: E402
from dcp_zoo.serve import DEFAULT_LIMITS, Limits, allowed_hosts  # noqa: E402
from dcp_zoo.serve import app as deploy_server  # noqa: E402
from dcp_zoo.serve import server as web_server  # noqa: E402

ROOT = Path(__file__).parents[1]
PHOTO = sample_images()[0]
BOUNDARY = "b0undary"


WITHOUT = """import sys
sys.modules.update(dict.fromkeys({}))
from functools import partial
from dcp_zoo.cli import deploy, main
deploy.Limits = partial(deploy.Limits, max_pixels=1_000_000, max_images=3, timeout=2)
main()"""


def missing_in_container() -> list[str]:
    """Modules of the core's dependencies that are not installed in the container."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    installed = (ROOT / "hub/docker/requirements.txt").read_text()
    core, there = (
        {re.split(r"[>=<,]", line)[0].lower() for line in text.split("\n") if line[:1].isalpha()}
        for text in (setup["options"]["install_requires"], installed)
    )
    assert "torch" in core - there
    missing = core - there | {"tqdm"}  # which huggingface_hub brings
    return [name for name, owners in packages_distributions().items() if {o.lower() for o in owners} & missing]


@pytest.fixture(scope="module")
def server(onnx_file):
    """The process and port of `dcp-zoo serve`, stopped at the end as a container is."""
    command = [sys.executable, "-O", "-c", WITHOUT.format(missing_in_container())]  # -O: without assertions
    command += ["serve", "--head", str(onnx_file), "--port", "0", "--max-mb", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert " at http://127.0.0.1:" in line, line + process.stderr.read()
    yield process, int(line.split("127.0.0.1:")[1].split()[0])
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) in (0, -signal.SIGTERM)
    assert "Traceback" not in process.stderr.read()


@pytest.fixture
def ask(server):
    """A request -> its status and JSON."""

    def call(body=b"", path="/predict", method="POST", **headers):
        connection = http.client.HTTPConnection("127.0.0.1", server[1], timeout=30)
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        text = response.read()
        connection.close()
        return response.status, json.loads(text) if response.headers["content-type"] == "application/json" else text

    return call


def form(*files):
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="images"; filename="{name}"\r\n\r\n'.encode() + data
        for name, data in files
    ]
    return b"\r\n".join([*parts, f"--{BOUNDARY}--\r\n".encode()])


FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
NOISE = encoded(Image.effect_noise((70, 40), 90).convert("RGB"))


def test_answers_are_pythons_alone_and_in_batches(ask, onnx_file):
    classifier = OnnxClassifier(onnx_file)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (30 + i, 50, 3), np.uint8)) for i in range(24)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, map(encoded, images)))
    for image, (status, answer) in zip(images, answers, strict=True):
        assert status == 200
        expected = predictions(classifier, image)
        found = answer["images"][0]["predictions"]
        assert [row["class"] for row in found] == [row["class"] for row in expected]
        for a, b in zip(found, expected, strict=True):
            assert a["probability"] == pytest.approx(b["probability"], abs=1e-4)


def test_forms(ask):
    _, answer = ask(form(("a.png", NOISE), ("b.jpg", Path(PHOTO).read_bytes())), path="/predict?top_k=2", **FORM)
    assert [(image["name"], len(image["predictions"])) for image in answer["images"]] == [("a.png", 2), ("b.jpg", 2)]
    _, answer = ask(form(("a.png", NOISE[:99]), ("b.png", NOISE), ("c.txt", b"hello")), **FORM)
    first, second, third = answer["images"]
    assert second == ask(NOISE)[1]["images"][0] | {"name": "b.png"}
    assert [*first, *third] == ["name", "error"] * 2
    assert ("image a.png: " in first["error"], "image c.txt: not in a supported" in third["error"]) == (True, True)
    for top_k in ("0", "-1", "two", "1.5", ""):
        code, answer = ask(NOISE, path=f"/predict?top_k={top_k}")
        assert (code, answer["detail"].startswith("top_k: Input should be ")) == (422, True)
    assert ask(NOISE, path="/predict?topk=3") == (422, {"detail": "topk: Extra inputs are not permitted."})


BAD = {
    "nothing": (b"", {}, 400, "No image"),
    "text": (b"hello", {}, 415, "not in a supported format"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", {}, 415, "not in a supported format"),
    "truncated": (encoded(load_image(PHOTO), "JPEG")[:20_000], {}, 422, "truncated"),
    "bomb": (png_that_claims(40_000, zlib.compress(b"\0" * 10**6)), {}, 422, "more than the limit of 1,000,000"),
    "large": (b"x" * 5_000_000, {}, 413, "larger than 1,000,000 bytes"),
    "broken form": (b"--nonsense", FORM, 400, ""),
    "many": (form(*[("a.png", NOISE)] * 4), FORM, 400, "Maximum number of files is 3"),
    "bad files in a form": (
        form(("b.txt", b"hello"), ("c.png", NOISE[:99])),
        FORM,
        415,
        "image b.txt: not in a supported format",
    ),
    "HEIC": (b"\0\0\0\x18ftypheic" + b"\0" * 50, {}, 415, "HEIC"),
    "strange host": (NOISE, {"Host": "example.org"}, 400, ""),
    "length that is no number": (NOISE, {"Content-Length": "many"}, 400, ""),
    "thin": (encoded(Image.new("RGB", (20_000, 1)), "PNG"), {}, 422, "one side over 100 times the other"),
}


def test_bad_input_is_answered(ask):
    for name, (body, headers, expected, message) in BAD.items():
        status, answer = ask(body, **headers)
        told = answer["detail"] if isinstance(answer, dict) else ""
        assert (status, message in told) == (expected, True), (name, told)
    assert ask(NOISE)[0] == 200


def test_bad_input_leaves_nothing_behind(ask, server):
    """No memory, threads, files or connections are kept after many bad requests, slow clients and endless
    uploads."""
    process, port = server
    state = Path(f"/proc/{process.pid}")
    if not state.is_dir():
        pytest.skip("needs /proc")

    def kept():
        status = dict(line.split(":", 1) for line in (state / "status").read_text().splitlines())
        return int(status["VmRSS"].split()[0]) / 1000, int(status["Threads"]), len(list((state / "fd").iterdir()))

    for _ in range(2):  # warm up
        [ask(body, **headers) for body, headers, _, _ in BAD.values()]
    before = kept()
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
    for connection in slow:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nabc")
    endless = socket.create_connection(("127.0.0.1", port))
    endless.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
    megabyte = b"f4240\r\n" + b"x" * 1_000_000 + b"\r\n"
    endless.sendall(20 * megabyte)  # which are not kept, nor what comes after
    for _ in range(6):
        [ask(body, **headers) for body, headers, _, _ in BAD.values()]
    for connection in slow:
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
        connection.close()
    assert endless.recv(1000).startswith(b"HTTP/1.1 408")
    endless.close()
    with socket.create_connection(("127.0.0.1", port)) as aborted:
        aborted.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nabc")
    time.sleep(0.5)
    megabytes, threads, files = (after - was for after, was in zip(kept(), before, strict=True))
    assert megabytes < 30
    assert threads <= 1
    assert files <= 1


def test_health_and_pages_that_need_no_network(ask, server, onnx_file):
    classes = OnnxClassifier(onnx_file).classnames
    assert ask(path="/health", method="GET") == (200, {"head": "custom", "file": onnx_file.name, "classes": classes})
    assert deploy_server.application(onnx_file, name="my_head").title == "my_head"
    _, page = ask(path="/docs", method="GET")
    assert b"https://" not in page.replace(b"https://github.com", b"")
    _, schema = ask(path="/openapi.json", method="GET")
    assert "image/*" in schema["paths"]["/predict"]["post"]["requestBody"]["content"]


def test_a_full_queue_takes_no_image(onnx_file, monkeypatch):
    gate, original, sizes = threading.Event(), OnnxClassifier.compute, []

    def compute(self, pixels):
        sizes.append(len(pixels))
        gate.wait(20)
        return original(self, pixels)

    monkeypatch.setattr(deploy_server, "WAITING", 2)
    monkeypatch.setattr(OnnxClassifier, "compute", compute)
    with started(onnx_file) as (_, send):
        asked = []
        for _ in range(3):  # the first is being computed
            asked.append(send(NOISE))
            time.sleep(0.3)
        answer = send(NOISE).recv(4000)
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"retry-after: 1" in answer
        gate.set()
        assert [status(connection) for connection in asked] == [200] * 3
    assert sizes == [1, 2]  # what waits is one batch


@contextmanager
def started(onnx_file, limits=DEFAULT_LIMITS, **options):
    """A server in a thread, and a function that sends it the beginning of a request on a new connection."""
    running = web_server(deploy_server.application(onnx_file, limits, **options), 10)
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    until(lambda: running.started)
    opened = []

    def send(data, length=None, **headers):
        opened.append(socket.create_connection(listening.getsockname(), timeout=10))
        head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {length or len(data)}\r\n"
        opened[-1].sendall((head + "".join(f"{k}: {v}\r\n" for k, v in headers.items()) + "\r\n").encode() + data)
        return opened[-1]

    try:
        yield running, send
    finally:
        for connection in opened:
            connection.close()
        running.should_exit = True
        thread.join(15)
    assert not thread.is_alive()


def status(connection):
    return int(connection.recv(4000).split()[1])


def test_requests_at_hand_are_answered_when_it_stops(onnx_file):
    with started(onnx_file) as (running, send):
        connection = send(NOISE[:100], len(NOISE))
        time.sleep(0.3)
        running.should_exit = True
        time.sleep(0.3)
        connection.sendall(NOISE[100:])
        assert status(connection) == 200


def test_large_requests_do_not_fill_the_memory_or_shut_out_small_ones(onnx_file, monkeypatch):
    monkeypatch.setattr(deploy_server, "BYTES", 1_000_000)
    with started(onnx_file, Limits(max_bytes=400_000)) as (_, send):
        uploads = [send(b"x" * 300_000, 300_001) for _ in range(2)]
        time.sleep(0.3)
        answer = send(b"x" * 300_000).recv(4000)
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"retry-after: 1" in answer
        assert status(send(NOISE)) == 200
        for upload in uploads:
            upload.sendall(b"x")
            assert status(upload) == 415
        assert status(send(b"x" * 300_000)) == 415


def test_slow_clients_keep_nobody_waiting(onnx_file):
    with started(onnx_file) as (_, send):
        upload = send(NOISE[:100], len(NOISE))
        with ExitStack() as opened:
            address = upload.getpeername()
            slow = [opened.enter_context(socket.create_connection(address)) for _ in range(100)]
            for text in (b"POST /predict HTTP/1.1\r\nX: ", b"a", b"b"):
                for connection in slow:
                    connection.sendall(text)
                assert status(send(NOISE)) == 200
        upload.sendall(NOISE[100:])
        assert status(upload) == 200


def test_hosts():
    assert "10.0.0.5" in allowed_hosts("10.0.0.5")
    with pytest.raises(ZooError, match="without scheme and port"):
        allowed_hosts("0.0.0.0", ["https://example.org"])
