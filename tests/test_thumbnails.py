"""Pictures beside the answers, in pseudo-terminals of several kinds, and none where nobody looks at a terminal."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time

import pytest

from dcp_zoo.data.samples import sample_images

SHOW = f"""
import sys
sys.modules['MISSING'] = None
import numpy as np
from dcp_zoo.deploy.bulk.predictor import Predictor
from dcp_zoo.deploy.bulk.job import Job
from dcp_zoo.cli import predict
from dcp_zoo.data.find import find_images
def compute(pixels):
    return np.float32([[1, 2]]) * np.ones((len(pixels), 1), np.float32), None
fake = Predictor("fake", ["dark", "bright"], {{"input_size": [3, 8, 8], "crop_pct": 1.0}}, compute)
predict.job_of = lambda options, images: Job(lambda: fake, {{}})
predict.show_on_screen(find_images({sample_images()[:2]}), predict.PredictOptions(thumbnails=THUMBNAILS))
"""
SIXEL = {b"\x1b[c": b"\x1b[?62;4c"}
KITTY = {b"\x1b[c": b"\x1b[?62c", b"\x1b_G": b"\x1b_Gi=1;OK\x1b\\"}
PLAIN = {b"\x1b[c": b"\x1b[?6c"}


def in_terminal(
    answers: dict[bytes, bytes], thumbnails: bool = True, columns: int = 100, missing: str = "", **environment: str
) -> str:
    """What the program writes to a terminal that answers its questions so."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    plain = {k: v for k, v in os.environ.items() if k not in ("CI", "NO_COLOR", "COLUMNS", "FORCE_COLOR")}
    environment = plain | {"TERM": "xterm-256color", "COLORTERM": "truecolor"} | environment
    program = SHOW.replace("THUMBNAILS", str(thumbnails)).replace("MISSING", missing)
    process = subprocess.Popen([sys.executable, "-c", program], stdin=side, stdout=side, stderr=side, env=environment)
    os.close(side)
    written, pending, end = b"", dict(answers), time.monotonic() + 60
    while time.monotonic() < end and select.select([main], [], [], 60)[0]:
        try:
            written += os.read(main, 65536)
        except OSError:  # the program has ended
            break
        for question in [question for question in pending if question in written]:
            os.write(main, pending.pop(question))
    os.close(main)
    assert process.wait(10) == 0, written
    return written.decode()


def asked(answers: dict[bytes, bytes], protocol: str) -> str:
    """The same, again if it is not in this protocol: the library waits a tenth of a second for an answer, which is
    short on a busy machine."""
    for _ in range(4):
        written = in_terminal(answers)
        if re.search(protocol, written):
            break
    return written


def test_pictures_in_the_protocol_of_the_terminal() -> None:
    sixel, kitty, plain = asked(SIXEL, "\x1bP"), asked(KITTY, r"\x1b_G[^;]*m="), in_terminal(PLAIN)
    assert sixel.count("\x1bP") == 2
    assert "▀" not in sixel
    assert re.search(r"\x1b_G[^;]*m=[01],f=100", kitty)
    assert "▀" not in kitty
    lines = [line for line in plain.splitlines() if "▀" in line]
    assert 12 <= len(lines) <= 18  # two pictures of up to nine lines
    assert any("bright" in line for line in lines)  # beside the answers
    assert len(set(re.findall(r"38;2;\d+;\d+;\d+", plain))) > 50
    assert "Failed to get cell size" not in plain


@pytest.mark.parametrize(
    "terminal",
    [{"TERM": "dumb"}, {"NO_COLOR": "1"}, {"CI": "true"}, {"columns": 60}, {"thumbnails": False}],
    ids=str,
)
def test_no_pictures_where_they_would_disturb(terminal: dict) -> None:
    written = in_terminal(SIXEL, **terminal)
    assert "bright" in written
    assert "▀" not in written
    assert "\x1b[c" not in written  # the terminal is not even asked


def test_without_the_extra_there_is_a_hint() -> None:
    written = in_terminal(SIXEL, missing="textual_image")
    assert "bright" in written
    assert "▀" not in written
    assert written.count("pip install 'dcp_zoo[pictures]'") == 1
    assert "pip install" not in in_terminal(SIXEL, thumbnails=False, missing="textual_image")


def test_no_pictures_in_pipes() -> None:
    program = [sys.executable, "-c", SHOW.replace("THUMBNAILS", "True")]
    written = subprocess.run(program, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
    assert "bright" in written
    assert "pip install" not in written
    assert "\x1b" not in written
    assert "▀" not in written
