"""What a server accepts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Of one request, and of all that wait."""

    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    max_images: int = 16
    max_waiting: int = 256
    max_batch: int = 16
    seconds: float = 30  # to receive a request; to finish those in progress when the server stops
