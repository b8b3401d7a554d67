"""Methods of other packages: the example of docs/baselines.md, installed by pip."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from PIL import Image

import dcp_zoo
from dcp_zoo.errors import ZooError
from dcp_zoo.training.methods import table

TAKEN = table.METHODS["gda"]
MINE = replace(TAKEN, name="mine")
PAGE = Path(__file__).parents[1] / "docs" / "baselines.md"
CODE = """
import sys
import dcp_zoo.cli.train
from dcp_zoo.training.methods.table import METHODS
assert "torch" not in sys.modules
assert "nearest-mean" in METHODS
"""


@pytest.fixture
def package(tmp_path):
    """The package of the page as pip installs it, into the folder "site", and photographs of two classes."""
    for token in MarkdownIt().parse(PAGE.read_text()):
        if token.type == "fence" and re.search(r'title="[\w/]+\.\w+"', token.info):
            file = tmp_path / "package" / token.info.split('title="')[1].rstrip('"')
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(token.content)
    (tmp_path / "package" / "my_head").mkdir()  # as its commands leave there: no package
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", tmp_path / "site")
    subprocess.run([sys.executable, "-m", "pip", "install", *options, tmp_path / "package"], check=True)
    for colour in ("red", "blue"):
        (tmp_path / "photos" / colour).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (64 + i, 64), colour).save(tmp_path / "photos" / colour / f"{i}.png")
    return tmp_path


@pytest.mark.scripts  # pip takes seconds
def test_the_example_of_the_page(package, monkeypatch):
    path = os.pathsep.join([str(package / "site"), str(PAGE.parents[1])])
    subprocess.run([sys.executable, "-c", CODE], cwd=package, env={**os.environ, "PYTHONPATH": path}, check=True)

    monkeypatch.syspath_prepend(package / "site")
    monkeypatch.chdir(package)
    monkeypatch.setattr(table.METHODS, "places", table.Methods().places)
    photos = ["photos/red/0.png", "photos/blue/0.png"]
    classifier = dcp_zoo.FewShotClassifier(method="nearest-mean").fit("photos")
    assert list(classifier.predict(photos)) == ["red", "blue"]
    classifier.save("head")
    loaded = dcp_zoo.create_model("local-dir:head", True)
    assert [best.name for (best,) in dcp_zoo.predict(loaded, photos)] == ["red", "blue"]
    assert '"method": "nearest-mean"' in Path("head/config.json").read_text()


def test_what_cannot_be_loaded_is_refused_when_it_is_used(monkeypatch):
    """A method that can be is one of the table."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    for value, message in (
        ("no_such_package:METHOD", "of no_such_package cannot be used: No module named 'no_such_package'. Repair"),
        ("json:dumps", "json:dumps is not a dcp_zoo.training.Method"),
        ("test_own_method:TAKEN", "test_own_method:TAKEN is not a dcp_zoo.training.Method of that name"),
    ):
        monkeypatch.setattr(table, "entry_points", lambda group, value=value: [EntryPoint("mine", value, group)])
        methods = table.Methods()
        assert [*methods] == [*table.OWN, "mine"]
        with pytest.raises(ZooError, match=message):
            methods["mine"]
    given = EntryPoint("mine", "test_own_method:MINE", table.GROUP), EntryPoint("gda", "json:dumps", table.GROUP)
    monkeypatch.setattr(table, "entry_points", lambda group: given)
    with pytest.warns(UserWarning, match="'gda' of json is left out: there is one of that name already"):
        methods = table.Methods()
    assert (methods["mine"], methods["gda"]) == (MINE, TAKEN)
