"""Methods of other packages: the example of docs/baselines.md."""

import re
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

import dcp_zoo
from dcp_zoo.errors import ZooError
from dcp_zoo.training.methods import table

TAKEN = table.METHODS["gda"]
MINE = replace(TAKEN, name="mine")
PAGE = Path(__file__).parents[1] / "docs" / "baselines.md"


def test_the_example_of_the_page(folder, tmp_path, monkeypatch):
    """As if its package was installed: by its module and its entry point."""
    for token in MarkdownIt().parse(PAGE.read_text()):
        if token.type == "fence" and re.search(r'title="[\w/]+\.\w+"', token.info):
            file = tmp_path / token.info.split('title="')[1].rstrip('"')
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(token.content)
    name, value = re.search(r'methods"\]\n(\S+) = "(\S+)"', (tmp_path / "pyproject.toml").read_text()).groups()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(table, "entry_points", lambda group: [EntryPoint(name, value, group)])
    monkeypatch.setattr(table.METHODS, "places", table.Methods().places)
    photos = [folder / "red" / "0.png", folder / "blue" / "0.png"]
    classifier = dcp_zoo.FewShotClassifier(method="nearest-mean").fit(folder)
    assert list(classifier.predict(photos)) == ["red", "blue"]
    classifier.save(tmp_path / "head")
    loaded = dcp_zoo.create_model(f"local-dir:{tmp_path / 'head'}", True)
    assert [best.name for (best,) in dcp_zoo.predict(loaded, photos)] == ["red", "blue"]
    assert '"method": "nearest-mean"' in (tmp_path / "head/config.json").read_text()


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
