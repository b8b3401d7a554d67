"""Honest clients of `dcp-zoo serve` while others attack it: waiting times, refusals and memory.

    python benchmarks/soak.py                  five minutes; writes results/soak.csv, and soak.png with matplotlib
    python benchmarks/soak.py --minutes 30     the long one

The server has its defaults, on two cores where the system lets us choose. The attackers take turns, and in the end come
together:

    bodies       64 connections that send 15 MB without a pause, and again when they are answered
    bombs        forms of sixteen PNGs of 49 megapixels, and of two, whose clients hang up when they have sent them
    headers      520 connections that send one byte a second of a header that never ends
    slow bodies  520 connections that announce a body of a megabyte and send one byte a second of it
    readers      64 connections that ask for a page and never read it

Four honest clients send photographs of 500 x 375 pixels, each two a second, on new connections. A window is ten
seconds; p99 is of the answers with status 200 in it, and memory the largest of the server process.
"""

import argparse
import asyncio
import contextlib
import csv
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty

import psutil
from serving import HEAD, photographs

from dcp_zoo.deploy.onnx_cache import onnx_file

HERE = Path(__file__).parent
WINDOW, HONEST, PAUSE = 10, 4, 0.5
FORM = "multipart/form-data; boundary=b"


def request(body: bytes, kind: str = "image/jpeg", path: str = "/predict") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + body


async def ask(port: int, data: bytes, seconds: float = 60) -> int:
    """Send a request on a connection of its own; the status, or 0 without an answer."""
    writer = None
    try:
        reader, writer = await asyncio.wait_for(asyncio.open_connection("127.0.0.1", port), seconds)
        writer.write(data)
        line = await asyncio.wait_for(reader.readline(), seconds)
        await asyncio.wait_for(reader.read(), seconds)
        return int(line.split()[1])
    except (OSError, asyncio.TimeoutError, IndexError):
        return 0
    finally:
        if writer:
            writer.transport.abort()


async def drip(port: int, start: bytes) -> None:
    """Send `start`, then a byte a second until the server closes the connection."""
    with contextlib.suppress(OSError):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(start)
        while not reader.at_eof() and not writer.is_closing():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(reader.read(1000), 1)
            writer.write(b"x")


async def stare(port: int) -> None:
    """Ask for the largest page and do not read it."""
    with contextlib.suppress(OSError):
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.transport.pause_reading()
        for _ in range(50):
            writer.write(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await asyncio.sleep(1)


def bombs(images: int) -> bytes:
    """A form of so many PNGs of 49 megapixels each."""
    from io import BytesIO

    from PIL import Image

    file = BytesIO()
    Image.new("RGB", (7000, 7000), (90, 120, 30)).save(file, "PNG")
    part = b'--b\r\nContent-Disposition: form-data; name="images"; filename="x.png"\r\n\r\n' + file.getvalue() + b"\r\n"
    return request(part * images + b"--b--\r\n", FORM)


async def hang_up(port: int, data: bytes) -> None:
    with contextlib.suppress(OSError):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(data)
        await writer.drain()
        await asyncio.sleep(0.2)
        writer.transport.abort()


def attacks(port: int) -> dict[str, list[Callable]]:
    """What each of an attack's clients does again and again."""
    large, sixteen, two = request(os.urandom(15_000_000)), bombs(16), bombs(2)
    header = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nX: "
    body = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"
    every: dict[str, list[Callable]] = {
        "bodies": [lambda: ask(port, large)] * 64,
        "bombs": [lambda: hang_up(port, sixteen), lambda: hang_up(port, two)] * 2,
        "headers": [lambda: drip(port, header)] * 520,
        "slow bodies": [lambda: drip(port, body)] * 520,
        "readers": [lambda: stare(port)] * 64,
    }
    return {"none": []} | every | {"all": [work for part in every.values() for work in part]}


def attack(clients: list[Callable], seconds: float) -> None:
    """A process of attackers."""

    async def endless(work: Callable) -> None:
        while True:
            await work()
            await asyncio.sleep(0.02)

    async def run() -> None:
        tasks = [asyncio.create_task(endless(work)) for work in clients]
        await asyncio.sleep(seconds)
        for task in tasks:
            task.cancel()

    asyncio.run(run())


def be_honest(port: int, queue: multiprocessing.Queue, seconds: float) -> None:
    """A process of honest clients, which puts (time, status, seconds) of each request."""
    photos = [request(photo) for photo in photographs()]

    async def client(data: list[bytes]) -> None:
        while True:
            await asyncio.sleep(random.uniform(0.5, 1.5) * PAUSE)
            start = time.time()
            status = await ask(port, random.choice(data))
            queue.put((start, status, time.time() - start))

    async def run() -> None:
        tasks = [asyncio.create_task(client(photos)) for _ in range(HONEST)]
        await asyncio.sleep(seconds)
        for task in tasks:
            task.cancel()

    asyncio.run(run())


def window(name: str, start: float, seen: list, memory: list[float]) -> dict:
    answered = sorted(seconds for _, status, seconds in seen if status == 200)
    return {
        "attack": name,
        "second": round(start),
        "requests": len(seen),
        "answered": len(answered),
        "status_503": sum(status == 503 for _, status, _ in seen),
        "failed": sum(status not in (200, 503) for _, status, _ in seen),
        "p50_ms": round(1000 * statistics.median(answered)) if answered else "",
        "p99_ms": round(1000 * answered[min(len(answered) - 1, int(0.99 * len(answered)))]) if answered else "",
        "rss_mb": round(max(memory)),
        "load": round(psutil.getloadavg()[0], 1),
    }


def measure(port: int, process: psutil.Process, minutes: float) -> list[dict]:
    """The windows of all attacks."""
    every, context = attacks(port), multiprocessing.get_context("fork")
    windows = max(1, round(60 * minutes / WINDOW / len(every)))
    queue: multiprocessing.Queue = context.Queue()
    total = WINDOW * windows * len(every)
    honest = context.Process(target=be_honest, args=(port, queue, total + 60), daemon=True)
    honest.start()
    begin, rows = time.time(), []
    for name, clients in every.items():
        hostile = context.Process(target=attack, args=(clients, WINDOW * windows), daemon=True)
        hostile.start()
        for _ in range(windows):
            end, memory, seen = time.time() + WINDOW, [], []
            while time.time() < end:
                memory.append(process.memory_info().rss / 1e6)
                with contextlib.suppress(Empty):
                    while True:
                        seen.append(queue.get(timeout=0.05))
            rows.append(window(name, end - WINDOW - begin, seen, memory))
            print(rows[-1], flush=True)
        hostile.terminate()
        hostile.join()
    honest.terminate()
    return rows


def plot(rows: list[dict], path: Path) -> None:
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(9, 5), layout="constrained")
    seconds = [row["second"] + WINDOW / 2 for row in rows]
    top.plot(seconds, [row["p99_ms"] or float("nan") for row in rows], ".-")
    top.set_ylabel("p99 of honest clients, ms")
    bottom.plot(seconds, [row["rss_mb"] for row in rows], ".-")
    bottom.set_ylabel("memory, MB")
    bottom.set_xlabel("seconds")
    for before, row in zip([{"attack": ""}, *rows], rows, strict=False):
        if row["attack"] != before["attack"]:
            for axes in (top, bottom):
                axes.axvline(row["second"], color="0.8", zorder=0)
            top.annotate(row["attack"], (row["second"], 1.02), xycoords=("data", "axes fraction"), fontsize=8)
    for axes in (top, bottom):
        axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "soak.csv")
    args = parser.parse_args()
    command = [sys.executable, "-m", "dcp_zoo", "serve", "--head", str(onnx_file(HEAD)), "--port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        process = psutil.Process(server.pid)
        if hasattr(process, "cpu_affinity"):
            process.cpu_affinity(process.cpu_affinity()[:2])
        port = int(server.stdout.readline().split(" at ")[1].split()[0].rpartition(":")[2])
        rows = measure(port, process, args.minutes)
    finally:
        server.terminate()
    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, args.output.with_suffix(".png"))
    asked = sum(row["requests"] for row in rows)
    print(
        f"{asked} honest requests, {100 * sum(row['status_503'] for row in rows) / asked:.1f} % with 503, "
        f"{sum(row['failed'] for row in rows)} failed, largest p99 {max(row['p99_ms'] or 60_000 for row in rows)} ms, "
        f"largest memory {max(row['rss_mb'] for row in rows)} MB, load {psutil.getloadavg()[1]:.1f}"
    )


if __name__ == "__main__":
    main()
