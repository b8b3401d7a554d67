"""An HTTP server for an exported head: FastAPI and ONNX Runtime, neither torch nor CLIP."""

import asyncio
import platform
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector
from starlette.exceptions import HTTPException as StarletteHTTPException

from dcp_zoo.deploy.batcher import Batcher, Full
from dcp_zoo.deploy.endpoint import DEFAULT_LIMITS, Limits
from dcp_zoo.deploy.onnx_classifier import OnnxClassifier
from dcp_zoo.deploy.ranking import top_classes
from dcp_zoo.deploy.requests import decode_upload, read_images
from dcp_zoo.files import sha256_of

CONNECTIONS = 512  # further ones get 503

# what /docs says of /predict
BINARY = {"schema": {"type": "string", "format": "binary"}}
FORM = {"type": "object", "properties": {"images": {"type": "array", "items": BINARY["schema"]}}}
BODY = {"required": True, "content": {"image/*": BINARY, "multipart/form-data": {"schema": FORM}}}
ANSWER = {"images": [{"name": "image", "predictions": [{"class": "lotus", "probability": 0.9312}]}]}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "classes, best first", "content": {"application/json": {"example": ANSWER}}},
    400: {"description": "no image"},
    403: {"description": "an address that is not allowed"},
    408: {"description": "too slow"},
    413: {"description": "too large, or too many images"},
    415: {"description": "not an image"},
    422: {"description": "damaged, or too many pixels"},
    424: {"description": "an address that cannot be fetched"},
    503: {"description": "too many images are waiting"},
}


class Service:
    """A loaded file: `classify` answers requests, `batcher` must be started in the event loop."""

    def __init__(self, path: Path, limits: Limits, urls: Sequence[str], threads: int, name: str) -> None:
        self.classifier, self.limits, self.urls = OnnxClassifier(path, threads), limits, urls
        self.decoders = ThreadPoolExecutor(threads, "decode")
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("dcp_requests", "Requests by status.", ["status"], registry=registry)
        self.seconds = Histogram("dcp_request_seconds", "Time from a request to its answer.", registry=registry)
        sizes = Histogram("dcp_batch_images", "Images per batch.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry)
        self.batcher = Batcher(self.classifier.probabilities, limits.max_batch, limits.max_waiting, sizes.observe)
        waiting = Gauge("dcp_waiting_images", "Images that wait for the model.", registry=registry)
        waiting.set_function(self.batcher.queue.qsize)
        self.info = {
            "head": name if name and not name.endswith(".onnx") else self.classifier.name,
            "classes": self.classifier.classnames,
            "file": path.name,
            "sha256": sha256_of(path),
            "precision": self.classifier.info.get("precision", "float32"),
            "versions": {name: version(name) for name in ("dcp_zoo", "onnxruntime")}
            | {"python": platform.python_version()},
            "limits": vars(limits),
        }

    @asynccontextmanager
    async def running(self, app: FastAPI) -> AsyncIterator[None]:
        """The lifespan of an application."""
        self.batcher.start()
        yield
        self.batcher.stop()
        self.decoders.shutdown()

    async def answer(self, request: Request, top_k: int) -> Response:
        """The answer to a request, which is counted by its status."""
        start, status = time.perf_counter(), 500
        try:
            answer = JSONResponse({"images": await self.classify(request, top_k)})
            status = 200
            return answer
        except Full:
            status = 503
            raise HTTPException(503, "Too many images are waiting: try again.", {"Retry-After": "1"}) from None
        except StarletteHTTPException as error:  # FastAPI's, and that of a form that cannot be read
            status = error.status_code
            raise
        finally:
            self.requests.labels(status).inc()
            self.seconds.observe(time.perf_counter() - start)

    async def classify(self, request: Request, top_k: int) -> list[dict[str, Any]]:
        """The names of a request's images with their most probable classes."""
        images = await read_images(request, self.limits, self.urls)
        loop = asyncio.get_running_loop()

        async def one(name: str, data: bytes) -> dict[str, Any]:
            row = await self.batcher(await loop.run_in_executor(self.decoders, self._prepare, name, data))
            return {"name": name, "predictions": top_classes(row[None], self.classifier.classnames, top_k)[0]}

        answers = await asyncio.gather(*(one(*image) for image in images), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers  # type: ignore[return-value]

    def _prepare(self, name: str, data: bytes) -> np.ndarray:
        return self.classifier.preprocess(decode_upload(name, data, self.limits))


def application(
    path: Path, limits: Limits = DEFAULT_LIMITS, urls: Sequence[str] = (), threads: int = 1, name: str = ""
) -> FastAPI:
    """The server's ASGI application.

    Args:
        path: a file from `dcp-zoo export`.
        limits: of requests.
        urls: prefixes of addresses from which images may be fetched; none by default.
        threads: for the model, and as many that decode.
        name: of the head, as shown. Default, and for that of a file: the one in the file.

    Raises:
        ZooError: not an exported file.
    """
    service = Service(path, limits, urls, threads, name)
    app = FastAPIOffline(
        title=service.info["head"], version=version("dcp_zoo"), lifespan=service.running, redoc_url=None
    )

    @app.post("/predict", openapi_extra={"requestBody": BODY}, responses=RESPONSES)
    async def predict(request: Request, top_k: Annotated[int, Query(ge=1)] = 5) -> Response:
        """Classify the image in the body (`curl --data-binary @photo.jpg`) or the files of a form (`curl -F`)."""
        return await service.answer(request, top_k)

    @app.get("/health", responses={503: {"description": "the model no longer runs"}})
    async def health() -> dict[str, str]:
        """Whether the server can classify."""
        if not service.batcher.alive:
            raise HTTPException(503, "The model no longer runs.")
        return {"status": "ok"}

    @app.get("/info")
    async def info() -> dict[str, Any]:
        """The head, its classes, the hash of its file, versions and limits."""
        return service.info

    @app.get("/metrics")
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(generate_latest(service.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def server(app: FastAPI, limits: Limits) -> uvicorn.Server:
    """A server that, when it is stopped, first answers the requests in progress."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=round(limits.seconds),
    )
    return uvicorn.Server(config)
