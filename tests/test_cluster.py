"""`predict` and `serve` on a Ray cluster: the rows and answers of one machine, and what happens when workers die."""

import http.client
import json
import os
import signal
import socket
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import classify
from PIL import Image

for module in ("ray.serve", "pyarrow", "onnxruntime", "onnxscript", "webdataset"):
    pytest.importorskip(module, reason="needs dcp_zoo[ray,data,export]")

import pandas as pd  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402

from dcp_zoo import ZooError, cluster  # noqa: E402
from dcp_zoo.data.find import find_images  # noqa: E402
from dcp_zoo.deploy.bulk.classify import Job, Predictor, Summary  # noqa: E402
from dcp_zoo.deploy.bulk.on_ray import Part, run_on_ray  # noqa: E402
from dcp_zoo.deploy.limits import Limits  # noqa: E402
from dcp_zoo.deploy.server import application  # noqa: E402

CFG = {"input_size": [3, 8, 8], "crop_pct": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.fixture(scope="module", autouse=True)
def running() -> Iterator[None]:
    with cluster.connected(num_cpus=2):
        yield


def png(level: int) -> bytes:
    Image.new("RGB", (12, 10), (level,) * 3).save(buffer := BytesIO(), "PNG")
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with 22 images of different levels, the fifth of which is damaged, and a shard of three."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for i in range(22):
        Path(f"photos/{i:02}.png").write_bytes(b"" if i == 4 else png(10 * i))
    with tarfile.open("shard.tar", "w") as tar:
        for i in range(3):
            (member := tarfile.TarInfo(f"{i}.png")).size = len(png(80 * i))
            tar.addfile(member, BytesIO(png(80 * i)))
    return tmp_path


def fake(folder: Path, level: int = -1, deaths: int = 0) -> Callable[[], Predictor]:
    """Loads a classifier into dark and bright that kills its process when it meets a level, so many times. A line in
    `loaded` for every load. Workers get it by value: they cannot import this module."""
    cfg, sigkill = CFG, signal.SIGKILL

    def load() -> Predictor:
        with (folder / "loaded").open("a") as file:
            file.write(f"{os.getpid()}\n")
        return Predictor("fake", ["dark", "bright"], cfg, compute)

    def compute(pixels: np.ndarray) -> tuple[np.ndarray, None]:
        killed = len(list(folder.glob("killed*")))
        if killed < deaths and (pixels[:, 0, 0, 0] == level).any():
            (folder / f"killed{killed}").touch()
            os.kill(os.getpid(), sigkill)
        bright = pixels.mean((1, 2, 3), dtype=np.float32) / 255
        return np.log(np.stack([1 - bright, bright], 1) + 1e-9), None

    return load


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of a folder of parts, as `classify` gives them."""
    rows = []
    for row in pd.read_parquet(folder).to_dict("records"):
        best = [{"class": row[f"class{n}"], "probability": row[f"probability{n}"]} for n in ("", "_2")]
        failed = isinstance(row["error"], str)
        rows.append({"image": row["image"]} | ({"error": row["error"]} if failed else {"predictions": best}))
    return rows


def test_a_killed_worker_and_a_stopped_run_lose_and_repeat_nothing(photos: Path) -> None:
    sources, options = ["photos", "wds://shard.tar"], {"part_images": 4}
    images, local = find_images(sources), fake(photos / "photos")()
    expected = [row for batch in classify(images, local, top_k=2) for row in batch.rows]
    summary = run_on_ray(sources, Job(fake(photos, 100, 1), {"head": "x"}), "out", **options)
    assert summary == Summary(25, 0, 1)
    assert (photos / "killed0").exists()
    assert rows_of(Path("out")) == expected
    loads = Path("loaded").read_text().split()
    assert len(loads) == len(set(loads)) <= 3  # once per actor, and once more for the killed one

    written = {path.name: path.stat().st_mtime_ns for path in Path("out").iterdir()}
    assert len(written) == 8  # six parts of images, one of the shard, the plan
    for lost in (Part(1, "").file, Part(6, "").file):
        Path("out", lost).unlink()
        del written[lost]
    assert run_on_ray(sources, Job(fake(photos), {"head": "x"}), "out", **options) == Summary(25, 18, 1)
    assert written.items() <= {path.name: path.stat().st_mtime_ns for path in Path("out").iterdir()}.items()
    assert rows_of(Path("out")) == expected
    nowhere = options | {"address": "127.0.0.1:9"}  # nothing is left to compute
    assert run_on_ray(sources, Job(fake(photos), {"head": "x"}), "out", **nowhere) == Summary(25, 25, 1)
    with pytest.raises(ZooError, match="out holds the first rows of another run, which differs in head, images"):
        run_on_ray(sources[:1], Job(fake(photos), {"head": "y"}), "out", **options)
    with pytest.raises(ZooError, match="photos holds other files: choose a new folder"):
        run_on_ray(sources[:1], Job(fake(photos), {"head": "y"}), "photos", **options)


def test_a_part_that_kills_every_worker_ends_the_run_with_a_message(photos: Path) -> None:
    with pytest.raises(
        ZooError, match=r"No worker finishes the images from photos/11.png on \(its worker died, 3 .* kept"
    ):
        run_on_ray(["photos"], Job(fake(photos, 210, 99), {}), "out", part_images=11)
    assert len(list(photos.glob("killed*"))) == 3
    assert Path("out", Part(0, "").file).exists()


def test_problems_of_workers_are_told(photos: Path) -> None:
    def broken() -> Predictor:
        raise ZooError("There is no such head.")

    with pytest.raises(ZooError, match=r"^There is no such head.$"):
        run_on_ray(["photos"], Job(broken, {}), "a")
    Path("list.txt").write_text("photos/none.png\nphotos/neither.png")
    with pytest.raises(ZooError, match=r"finds none of 2 images, such as photos/none.png: they must be at URLs"):
        run_on_ray(["list.txt"], Job(fake(photos), {}), "b")
    with pytest.raises(ZooError, match=r"No machine .* has 9 cores .*--threads"):
        run_on_ray(["photos"], Job(fake(photos), {}), "c", resources=cluster.Resources(9))


def test_predict_on_a_cluster(run: Callable, photos: Path, onnx_file: Path) -> None:
    """From URLs to a URL, with the command line's own head."""
    head = ["--onnx", onnx_file, "--top-k", 2]
    assert run("predict", "photos", *head, "--output", "p.jsonl", "--workers", 0)[0] == 1
    url = f"file://{photos}"
    code, _, err = run("predict", f"{url}/photos", *head, "--output", f"{url}/out", "--ray", "local")
    assert (code, f"22 images, of which 1 cannot be read: {url}/out" in err) == (1, True), err
    rows, expected = rows_of(Path("out")), [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == [f"{url}/{row['image']}" for row in expected]
    assert [i for i, row in enumerate(rows) if "error" in row] == [4]
    for row, other in zip(rows, expected, strict=True):
        for found, best in zip(row.get("predictions", []), other.get("predictions", []), strict=True):
            assert found == {"class": best["class"], "probability": pytest.approx(best["probability"], abs=1e-5)}
    code, _, err = run("predict", "photos", *head, "--ray", "local", "--json")
    assert (code, "pass --output FOLDER or a URL" in err) == (2, True), err
    code, _, err = run("predict", "photos", *head, "--output", "s3://bucket/p.csv")
    assert (code, "Without --ray, --output is a file on this machine" in err) == (2, True), err


def test_serve_on_a_cluster(onnx_file: Path) -> None:
    """The answers of the local server, its limits, and a stop that answers the request in progress."""
    from dcp_zoo.deploy.ray_serve import deployed

    limits = Limits(max_mb=0.1, timeout=10)
    photo = png(90)
    requests = [
        ("GET", "/health", None),
        ("GET", "/info", None),
        ("GET", "/openapi.json", None),
        ("POST", "/predict?top_k=3", photo),
        ("POST", "/predict", b""),
        ("POST", "/predict", b"hello"),
        ("POST", "/predict", b"x" * 200_000),
    ]
    with TestClient(application(onnx_file, limits)) as client:
        expected = [client.request(method, path, content=body) for method, path, body in requests]
    with deployed("models/tiny.onnx", lambda: application(onnx_file, limits), limits.timeout, port=0) as address:
        place = address.removeprefix("http://")
        for (method, path, body), answer in zip(requests, expected, strict=True):
            connection = http.client.HTTPConnection(place, timeout=30)
            connection.request(method, path, body)
            response = connection.getresponse()
            assert (response.status, json.loads(response.read())) == (answer.status_code, answer.json())
        host, port = place.split(":")
        slow = socket.create_connection((host, int(port)))
        slow.sendall(f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(photo)}\r\n\r\n".encode() + photo[:20])
        time.sleep(0.5)
        threading.Timer(1, slow.sendall, [photo[20:]]).start()
    slow.settimeout(30)
    assert slow.recv(1000).startswith(b"HTTP/1.1 200")
    with pytest.raises(ConnectionError):
        ask_for_ten_seconds(place)


def ask_for_ten_seconds(place: str) -> None:
    """The proxy closes its port a moment after the application is gone."""
    for _ in range(100):
        http.client.HTTPConnection(place, timeout=5).request("GET", "/health")
        time.sleep(0.1)
