"""An HTTP server for an exported head: FastAPI and ONNX Runtime, neither torch nor CLIP."""

import asyncio
import ctypes
import platform
import time
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import yaml
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from dcp_zoo.answers import Answering
from dcp_zoo.data.images import count_pixels
from dcp_zoo.deploy.limits import DEFAULT_LIMITS, Budget, Full, Limits
from dcp_zoo.deploy.onnx_classifier import OnnxClassifier
from dcp_zoo.deploy.requests import Named, decode_upload, gather, read_images
from dcp_zoo.fields import Values
from dcp_zoo.files import sha256_of

T = TypeVar("T")

BYTES, PIXELS = 64_000_000, 200_000_000  # of all requests in progress; pixels of small, and of large images
LARGE = 4_000_000  # pixels; decoding larger images leaves a thread to the others
BATCH, WAITING = 16, 256  # images per batch, and images that may wait; further ones get status 503
REQUEST_IMAGES = 2  # of the most pixels, which a request may have
MMAP_THRESHOLD = -3  # of mallopt
GONE = 499  # nginx's status for a client that hung up


class Service:
    """A loaded file: `answer` answers requests while `running`."""

    def __init__(self, path: Path, limits: Limits, threads: int, name: str, device: str) -> None:
        with suppress(Exception):  # not glibc, which keeps the memory of freed images and bodies for itself
            ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 2**20)
        self.classifier, self.limits = OnnxClassifier(path, threads, device), limits
        self.bytes = Budget(max(BYTES, 2 * limits.max_bytes))
        self.small = ThreadPoolExecutor(threads, "decode")
        self.large = ThreadPoolExecutor(max(1, threads // 2), "decode-large")
        waiting_pixels = max(PIXELS, 2 * REQUEST_IMAGES * limits.max_pixels)  # for either
        self.small_pixels, self.large_pixels = Budget(waiting_pixels), Budget(waiting_pixels)
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("dcp_requests", "Requests by status.", ["status"], registry=registry)
        self.seconds = Histogram("dcp_request_seconds", "Time from a request to its answer.", registry=registry)
        sizes = Histogram("dcp_batch_images", "Images per batch.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry)
        self.batcher = Batcher(self._compute, BATCH, WAITING, sizes.observe)
        waiting = Gauge("dcp_waiting_images", "Images that wait for the model.", registry=registry)
        waiting.set_function(self.batcher.queue.qsize)
        versions = {name: version(name) for name in ("dcp_zoo", "onnxruntime")} | {"python": platform.python_version()}
        self.info = {
            "head": name if name and not name.endswith(".onnx") else self.classifier.name,
            "classes": self.classifier.classnames,
            "file": path.name,
            "sha256": sha256_of(path),
            "precision": self.classifier.info.get("precision", "float32"),
            "versions": versions,
            "limits": vars(limits),
        }

    @asynccontextmanager
    async def running(self, app: FastAPI) -> AsyncIterator[None]:
        with self.small, self.large:
            async with self.batcher.running():
                yield

    async def answer(self, request: Request, top_k: int) -> Response:
        """The answer to a request, which is counted by its status."""
        start, status = time.perf_counter(), 500
        try:
            with self.bytes.share() as take:
                images = await read_images(request, self.limits, take)
                answers = await unless_gone(request, self.classify(images, top_k))
            status = 200
            return JSONResponse({"images": answers})
        except Exception as error:
            release(error)
            if isinstance(error, ClientDisconnect):
                status = GONE
                return Response(status_code=GONE)  # which nobody receives
            if isinstance(error, Full):
                headers = {"Retry-After": "1", "Connection": "close"}
                error = HTTPException(503, "Too much is waiting: try again.", headers)
            if isinstance(error, StarletteHTTPException):  # FastAPI's, and that of a form that cannot be read
                status = error.status_code
            raise error
        finally:
            self.requests.labels(status).inc()
            self.seconds.observe(time.perf_counter() - start)

    async def classify(self, images: Sequence[Named], top_k: int) -> list[Values]:
        """The names of a request's images with their most probable classes."""
        run = asyncio.get_running_loop().run_in_executor
        sizes = await gather(run(self.small, decode_upload, *image, self.limits, count_pixels) for image in images)
        most = REQUEST_IMAGES * self.limits.max_pixels
        if sum(sizes) > most:
            raise HTTPException(422, f"{sum(sizes):,} pixels in one request, more than the limit of {most:,}.")
        answer = Answering(top_k, self.classifier.info.get("threshold"))
        lanes = [self.large if size > LARGE else self.small for size in sizes]

        async def one(lane: ThreadPoolExecutor, name: str, data: bytes) -> Values:
            image = await run(lane, lambda: self.classifier.preprocess(decode_upload(name, data, self.limits)))
            logits, distance = await self.batcher(image)
            return {"name": name} | answer(logits[None], self.classifier.classnames, distance)[0]

        with self.small_pixels.share() as take_small, self.large_pixels.share() as take_large:
            for lane, size in zip(lanes, sizes, strict=True):
                (take_large if lane is self.large else take_small)(size)
            return await gather(one(lane, *image) for lane, image in zip(lanes, images, strict=True))

    def _compute(self, images: np.ndarray) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Logits (C,) of each image, and its distance (1,)."""
        logits, distances = self.classifier.outputs(images)
        return [(z, None if distances is None else distances[i : i + 1]) for i, z in enumerate(logits)]


def release(error: BaseException | None) -> None:
    """Free what the functions that an exception ended hold, such as bodies, without waiting for garbage collection."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work` for a request whose body was read; ClientDisconnect, and its end, if the client hangs up."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # or asyncio logs that nobody asked


def application(
    path: Path,
    limits: Limits = DEFAULT_LIMITS,
    threads: int = 1,
    name: str = "",
    hosts: Sequence[str] = ("*",),
    device: str = "cpu",
) -> FastAPI:
    """The server's ASGI application for a file from `dcp-zoo export`: so many `threads` run the model, and as many
    decode; `name` is shown, by default the one in the file; clients may call the server by the names `hosts`, such as
    "*.example.org"."""
    service = Service(path, limits, threads, name, device)
    about = {"title": service.info["head"], "version": version("dcp_zoo")}
    app = FastAPIOffline(**about, lifespan=service.running, redoc_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)

    @app.get("/", include_in_schema=False)
    async def root() -> RedirectResponse:
        return RedirectResponse("docs")

    @app.post("/predict", **yaml.safe_load((Path(__file__).parent / "predict.yaml").read_text()))
    async def predict(request: Request, top_k: Annotated[int, Query(ge=1)] = 5) -> Response:
        """Classify the image in the body (`curl --data-binary @photo.jpg`) or the files of a form (`curl -F`)."""
        if unknown := [name for name in request.query_params if name != "top_k"]:
            raise HTTPException(422, f"There is no parameter {', '.join(unknown)}: the only one is top_k.")
        return await service.answer(request, top_k)

    @app.get("/health", responses={503: {"description": "the model no longer runs"}})
    async def health() -> dict[str, str]:
        """Whether the server can classify."""
        if not service.batcher.alive:
            raise HTTPException(503, "The model no longer runs.")
        return {"status": "ok"}

    @app.get("/info")
    async def info() -> Values:
        """The head, its classes, the hash of its file, versions and limits."""
        return service.info

    @app.get("/metrics")
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(generate_latest(service.registry), media_type=CONTENT_TYPE_LATEST)

    return app


class Batcher:
    """Runs a model, batch (B, ...) -> B rows, in a thread: what waits is its next batch, up to `most` images."""

    def __init__(
        self, model: Callable[[np.ndarray], Sequence[Any]], most: int, waiting: int, observe: Callable[[int], object]
    ) -> None:
        self.model, self.most, self.observe = model, most, observe
        self.queue: asyncio.Queue[tuple[np.ndarray, asyncio.Future]] = asyncio.Queue(waiting)
        self.thread = ThreadPoolExecutor(1, "model")
        self.task: asyncio.Task | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        with self.thread:
            self.task = asyncio.get_running_loop().create_task(self._run())
            yield
            self.task.cancel()

    @property
    def alive(self) -> bool:
        return self.task is not None and not self.task.done()

    async def __call__(self, image: np.ndarray) -> Any:
        """One image (...) -> its answer."""
        future = asyncio.get_running_loop().create_future()
        try:
            self.queue.put_nowait((image, future))
        except asyncio.QueueFull:
            raise Full from None
        return await future

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self.queue.get()]
            while len(batch) < self.most and not self.queue.empty():
                batch.append(self.queue.get_nowait())
            waiting = [(image, future) for image, future in batch if not future.done()]  # others were cancelled
            if not waiting:
                continue
            self.observe(len(waiting))
            try:
                images = np.stack([image for image, _ in waiting])
                rows: Sequence[Any] = await loop.run_in_executor(self.thread, self.model, images)
            except Exception as error:  # the next batch may work
                rows = [error] * len(waiting)
            for (_, future), row in zip(waiting, rows, strict=True):
                if not future.done():
                    (future.set_exception if isinstance(row, Exception) else future.set_result)(row)
