"""What a request to the server contains, read within limits; anything else is a 4xx answer that says why."""

import asyncio
import json
from base64 import b64decode
from collections.abc import Callable

from fastapi import HTTPException, Request
from python_multipart.exceptions import MultipartParseError
from starlette.datastructures import UploadFile
from starlette.types import Message

from dcp_zoo.serve.limits import Limits

DISCARDED = 10  # times the most bytes, which are read of a request that is too large
JSON_KEYS = ("images", "image", "inputs", "instances")
JSON_HELP = 'Expected {"images": ["<base64>", ...]}, or "inputs" or "instances" in its place.'
OPTIONS_HELP = "Options belong in the URL, such as ?top_k=1."

Named = tuple[str, bytes]


async def read_images(request: Request, limits: Limits, take: Callable[[int], bool]) -> list[Named]:
    """A request's images by name: its body, files of a form, or those in JSON. QueueFull if `take` refuses a size."""
    try:
        body = await asyncio.wait_for(_body(request, limits, take), limits.timeout)
    except asyncio.TimeoutError:
        raise HTTPException(408, f"Not here within {limits.timeout:g} seconds.", {"Connection": "close"}) from None
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        images = await _from_form(request, body, limits)
    elif kind == "application/json" or body.startswith(b"{"):  # as no image does
        images = await asyncio.to_thread(_from_json, body)
    else:
        images = [("image", body)] if body else []
    if not images:
        raise HTTPException(400, "No image: send one as the body, or several as files of a multipart form.")
    if len(images) > limits.max_images:
        raise HTTPException(413, f"More than {limits.max_images} images in one request.")
    return images


async def _body(request: Request, limits: Limits, take: Callable[[int], bool]) -> bytes:
    """The bytes of a request. What is too much is read for a while, as most clients send it all, but not kept."""
    most, body, size, fits = limits.max_bytes, bytearray(), 0, True
    async for part in request.stream():
        size += len(part)
        if fits := fits and size <= most and take(len(part)):
            body += part
        elif size > DISCARDED * most:
            break
    if size > most:
        raise HTTPException(413, f"The request is larger than {most:,} bytes.", {"Connection": "close"})
    if not fits:
        raise asyncio.QueueFull
    return bytes(body)


async def _from_form(request: Request, body: bytes, limits: Limits) -> list[Named]:
    async def receive() -> Message:
        return {"type": "http.request", "body": body}

    try:
        again = Request(request.scope, receive)
        async with again.form(max_files=limits.max_images, max_fields=limits.max_images) as form:
            parts = form.multi_items()
            files = [(part.filename or name, await part.read()) for name, part in parts if isinstance(part, UploadFile)]
    except MultipartParseError as error:  # of which older versions of starlette make no answer
        raise HTTPException(400, f"No image: the form is damaged ({error}).") from error
    if len(files) < len(parts):
        raise HTTPException(400, OPTIONS_HELP)
    return [(name[:100], data) for name, data in files]


def _from_json(body: bytes) -> list[Named]:
    """The images in the forms of Hugging Face's and TensorFlow's servers: base64 text, data URIs, {"b64": text}."""
    try:
        document = json.loads(body)
        value = next(document[key] for key in JSON_KEYS if key in document)
        options = document.get("parameters")
    except (ValueError, TypeError, LookupError, AttributeError, StopIteration, RecursionError):
        raise HTTPException(400, f"No image in this JSON. {JSON_HELP}") from None
    if options:
        raise HTTPException(400, OPTIONS_HELP)
    return [_entry(f"image {i}", entry) for i, entry in enumerate(value if isinstance(value, list) else [value], 1)]


def _entry(name: str, entry: object) -> Named:
    text = entry.get("b64") if isinstance(entry, dict) else entry
    if not isinstance(text, str) or not text:
        raise HTTPException(400, f"{name} is not base64 text. {JSON_HELP}")
    try:
        encoded = text.partition(",")[2] if text.startswith("data:") else text
        return name, b64decode("".join(encoded.split()), validate=True)
    except ValueError:
        raise HTTPException(400, f"{name} is not base64, from {text[:20]!r} on. {JSON_HELP}") from None
