"""Methods of other packages: the example of docs/own_method.md, installed as its entry point says."""

import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from PIL import Image

from dcp_zoo.training.methods import table

TAKEN = table.METHODS["gda"]
PAGE = Path(__file__).parents[1] / "docs" / "own_method.md"
CODE = """
import sys
from dcp_zoo.cli.train import HEADS
from dcp_zoo.training.methods.table import METHODS
assert "torch" not in sys.modules
assert "nearest-mean" in METHODS and "nearest-mean" in HEADS
import dcp_zoo
classifier = dcp_zoo.FewShotClassifier(method="nearest-mean").fit("photos")
print(classifier.predict(["photos/red/0.png", "photos/blue/0.png"]))
classifier.save("head")
"""


@pytest.fixture
def package(tmp_path):
    """The files of the page in a folder, with what pip makes of its pyproject.toml, and photographs of two classes."""
    files = {}
    for token in MarkdownIt().parse(PAGE.read_text()):
        if token.type == "fence" and 'title="' in token.info:
            files[token.info.split('title="')[1].rstrip('"')] = token.content
    group = (
        files["pyproject.toml"].replace('project.entry-points."dcp_zoo.methods"', "dcp_zoo.methods").replace('"', "")
    )
    files["nearest_mean-1.dist-info/entry_points.txt"] = group
    files["nearest_mean-1.dist-info/METADATA"] = "Name: nearest-mean\nVersion: 1\n"
    for name, text in files.items():
        if name.endswith((".py", ".txt", "METADATA")):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
    for colour in ("red", "blue"):
        (tmp_path / "photos" / colour).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (64 + i, 64), colour).save(tmp_path / "photos" / colour / f"{i}.png")
    return tmp_path


def test_the_example_of_the_page(package):
    path = os.pathsep.join([str(package), str(PAGE.parents[1])])
    run = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=package,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["['red'", "'blue']"]
    assert '"method": "nearest-mean"' in (package / "head" / "config.json").read_text()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_package:METHOD", "No module named 'no_such_package'"),
        ("json:dumps", "json:dumps is not a dcp_zoo.training.Method"),
        ("test_own_method:TAKEN", "there is a method 'gda' already"),
    ],
)
def test_what_cannot_be_loaded_is_left_out(value, message, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setattr(table, "entry_points", lambda group: [EntryPoint("mine", value, group)])
    with pytest.warns(UserWarning, match="mine.* is left out") as caught:
        assert table.installed() == {}
    assert message in str(caught[0].message)
