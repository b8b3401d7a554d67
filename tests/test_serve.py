"""The server, started once: answers equal to Python's, batches, limits, bad input, and a stop that loses nothing."""

import asyncio
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
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import packages_distributions
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

for module in ("onnxruntime", "onnxscript", "fastapi_offline", "prometheus_client", "python_multipart"):
    pytest.importorskip(module, reason="the server needs dcp_zoo[serve,export]")

from dcp_zoo import ZooError  # noqa: E402
from dcp_zoo.data import load_image  # noqa: E402
from dcp_zoo.data.samples import sample_images  # noqa: E402
from dcp_zoo.deploy.batcher import Batcher, Full  # noqa: E402
from dcp_zoo.deploy.endpoint import Limits  # noqa: E402
from dcp_zoo.deploy.export import export  # noqa: E402
from dcp_zoo.deploy.onnx_classifier import OnnxClassifier  # noqa: E402
from dcp_zoo.deploy.requests import check_prefix  # noqa: E402

ROOT = Path(__file__).parents[1]
PHOTO = sample_images()[0]
BOUNDARY = "b0undary"


@pytest.fixture(scope="module")
def onnx_file(tiny_head, tmp_path_factory):
    return export(tiny_head, tmp_path_factory.mktemp("serve") / "tiny.onnx")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A web server with a folder that may be fetched from and one that may not."""
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("open", "closed"):
        (folder / name).mkdir()
        (folder / name / "photo.jpg").write_bytes(Path(PHOTO).read_bytes())
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


WITHOUT = "import sys; sys.modules.update(dict.fromkeys({})); from dcp_zoo.cli import main; main()"


def missing_in_container() -> list[str]:
    """Modules of the dependencies in setup.cfg that are not installed in the container."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    installed = (ROOT / "hub/docker/requirements.txt").read_text()
    core, there = (
        {re.split(r"[>=<,]", line)[0].lower() for line in text.split("\n") if line[:1].isalpha()}
        for text in (setup["options"]["install_requires"], installed)
    )
    assert "torch" in core - there
    return [name for name, owners in packages_distributions().items() if {o.lower() for o in owners} & (core - there)]


@pytest.fixture(scope="module")
def server(onnx_file, pictures):
    """The process and port of `dcp-zoo serve`, stopped at the end as a container is."""
    limits = ["--max-mb", "1", "--max-pixels", "1000000", "--max-images", "3", "--timeout", "2"]
    command = [sys.executable, "-c", WITHOUT.format(missing_in_container())]
    command += ["serve", "--head", str(onnx_file), "--port", "0", "--threads", "1", *limits]
    command += ["--allow-urls", f"{pictures}open/"]
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


def encoded(image, format="PNG"):
    file = BytesIO()
    image.save(file, format)
    return file.getvalue()


def form(*files):
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="images"; filename="{name}"\r\n\r\n'.encode() + data
        for name, data in files
    ]
    return b"\r\n".join([*parts, f"--{BOUNDARY}--\r\n".encode()])


FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
JSON = {"Content-Type": "application/json"}
NOISE = encoded(Image.effect_noise((70, 40), 90).convert("RGB"))


def test_answers_are_pythons_alone_and_in_batches(ask, onnx_file):
    classifier = OnnxClassifier(onnx_file)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (30 + i, 50, 3), np.uint8)) for i in range(24)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, map(encoded, images)))
    for image, (status, answer) in zip(images, answers, strict=True):
        assert status == 200
        expected = classifier.classify(image)
        found = answer["images"][0]["predictions"]
        assert [row["class"] for row in found] == [row["class"] for row in expected]
        for a, b in zip(found, expected, strict=True):
            assert a["probability"] == pytest.approx(b["probability"], abs=1e-4)
    _, metrics = ask(path="/metrics", method="GET")
    values = dict(line.rsplit(" ", 1) for line in metrics.decode().splitlines() if not line.startswith("#"))
    assert float(values["dcp_batch_images_sum"]) >= 24
    assert float(values["dcp_batch_images_count"]) < float(values["dcp_batch_images_sum"])  # some were batched


def test_forms_and_urls(ask, pictures):
    status, answer = ask(form(("a.png", NOISE), ("b.jpg", Path(PHOTO).read_bytes())), path="/predict?top_k=2", **FORM)
    assert status == 200
    assert [image["name"] for image in answer["images"]] == ["a.png", "b.jpg"]
    assert all(len(image["predictions"]) == 2 for image in answer["images"])
    status, fetched = ask(json.dumps({"urls": [f"{pictures}open/photo.jpg"]}), path="/predict?top_k=2", **JSON)
    for found, expected in zip(fetched["images"][0]["predictions"], answer["images"][1]["predictions"], strict=True):
        assert found == {"class": expected["class"], "probability": pytest.approx(expected["probability"], abs=1e-5)}
    for address in ("closed/photo.jpg", "open/../closed/photo.jpg", "open/%2e%2e/closed/photo.jpg"):
        assert ask(json.dumps({"urls": [pictures + address]}), **JSON)[0] == 403
    for address in ("none.jpg", "käse.jpg"):
        assert ask(json.dumps({"urls": [f"{pictures}open/{address}"]}), **JSON)[0] == 424
    assert ask("{}", **JSON)[0] == 400
    with pytest.raises(ZooError, match="up to a slash"):
        check_prefix("https://example.com")


def bomb():
    """A PNG that claims 40,000 x 40,000 pixels."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = b"\x00\x00\x9c\x40" * 2 + b"\x08\x02\x00\x00\x00"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10**6))


BAD = {
    "nothing": (b"", {}, 400, "No image"),
    "text": (b"hello", {}, 415, "not an image in a supported format"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", {}, 415, "not an image"),
    "truncated": (encoded(load_image(PHOTO), "JPEG")[:20_000], {}, 422, "truncated"),
    "bomb": (bomb(), {}, 422, "more than the limit of 1,000,000"),
    "large": (b"x" * 5_000_000, {}, 413, "larger than 1,000,000 bytes"),
    "empty form": (form(), FORM, 400, "No image"),
    "broken form": (b"--nonsense", FORM, 400, ""),
    "many": (form(*[("a.png", NOISE)] * 4), FORM, 400, "Maximum number of files is 3"),
    "bad file in a form": (form(("a.png", NOISE), ("b.txt", b"hello")), FORM, 415, "b.txt is not an image"),
    "truncated, with a misleading name": (form(("HEIC.png", NOISE[:-99])), FORM, 422, "truncated"),
    "length that is no number": (NOISE, {"Content-Length": "many"}, 400, ""),
    "thin": (encoded(Image.new("RGB", (20_000, 1)), "PNG"), {}, 422, "one side over 100 times the other"),
    "large, not yet sent": (b"", {"Content-Length": "100000000", "Expect": "100-continue"}, 413, "larger than"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_answered(ask, name):
    body, headers, expected, message = BAD[name]
    status, answer = ask(body, **headers)
    assert status == expected
    assert message in (answer["detail"] if isinstance(answer, dict) else "")
    assert ask(NOISE)[0] == 200


def test_bad_input_leaves_nothing_behind(ask, server):
    """No memory, threads, files or connections are kept after many bad requests, slow clients and endless uploads."""
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
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
    endless = socket.create_connection(("127.0.0.1", port))
    endless.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    megabyte = b"f4240\r\n" + b"x" * 1_000_000 + b"\r\n"
    with pytest.raises(OSError, match=r"reset|Broken"):  # the server closes the connection long before 100 MB
        endless.sendall(100 * megabyte)
    for _ in range(10):
        [ask(body, **headers) for body, headers, _, _ in BAD.values()]
    for connection in slow:
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
        connection.close()
    endless.close()
    time.sleep(0.5)
    megabytes, threads, files = (after - was for after, was in zip(kept(), before, strict=True))
    assert megabytes < 30
    assert threads <= 1
    assert files <= 1
    assert ask(NOISE)[0] == 200


def test_no_bad_request_counts_as_an_error_of_the_server(ask):
    for body, headers, _, _ in BAD.values():
        ask(body, **headers)
    _, metrics = ask(path="/metrics", method="GET")
    assert b'status="400"' in metrics
    assert b'status="500"' not in metrics


def test_health_info_and_pages_that_need_no_network(ask, server, onnx_file):
    assert ask(path="/health", method="GET") == (200, {"status": "ok"})
    _, info = ask(path="/info", method="GET")
    assert info["head"] == "custom"
    assert info["classes"] == OnnxClassifier(onnx_file).classnames
    assert len(info["sha256"]) == 64
    assert info["limits"]["max_bytes"] == 1_000_000
    from dcp_zoo.deploy.server import application

    assert application(onnx_file, name="my_head").title == "my_head"
    _, page = ask(path="/docs", method="GET")
    assert b"https://" not in page.replace(b"https://github.com", b"")
    _, schema = ask(path="/openapi.json", method="GET")
    assert "image/*" in schema["paths"]["/predict"]["post"]["requestBody"]["content"]


def test_batcher():
    """Full queues raise, a failed batch fails its own images only, and a cancelled image costs nothing."""
    sizes, gate = [], threading.Event()

    def model(batch):
        gate.wait(10)
        if (batch < 0).any():
            raise ValueError("negative")
        return 2 * batch

    async def use():
        batcher = Batcher(model, 3, 4, sizes.append)
        batcher.start()
        first = asyncio.create_task(batcher(np.array([1.0])))
        await asyncio.sleep(0.05)  # it is being computed
        others = [asyncio.create_task(batcher(np.array([float(i)]))) for i in (2, 3, 4, -1)]
        await asyncio.sleep(0.05)
        with pytest.raises(Full):
            await batcher(np.array([9.0]))
        others[0].cancel()
        gate.set()
        results = await asyncio.gather(first, *others, return_exceptions=True)
        assert await batcher(np.array([7.0])) == 14
        assert batcher.alive
        batcher.stop()
        return results

    first, cancelled, *rest = asyncio.run(use())
    assert first == 2
    assert isinstance(cancelled, asyncio.CancelledError)
    assert rest[:2] == [6, 8]
    assert isinstance(rest[2], ValueError)
    assert sizes == [1, 2, 1, 1]


def test_requests_at_hand_are_answered_when_it_stops(onnx_file):
    from dcp_zoo.deploy.server import application, server

    running = server(application(onnx_file, Limits(seconds=10)), Limits(seconds=10))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    while not running.started:
        time.sleep(0.05)
    connection = socket.create_connection(listening.getsockname())
    connection.sendall(f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(NOISE)}\r\n\r\n".encode())
    connection.sendall(NOISE[:100])
    time.sleep(0.3)
    running.should_exit = True
    time.sleep(0.3)
    connection.sendall(NOISE[100:])
    assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    connection.close()
    thread.join(15)
    assert not thread.is_alive()
