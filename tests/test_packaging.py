"""What publishing needs agrees with setup.cfg: the conda recipe, the citation, the workflows."""

import configparser
import re
from pathlib import Path

import pytest
import yaml

import dcp_zoo

ROOT = Path(__file__).parents[1]
CONDA_NAMES = {"torch": "pytorch", "open_clip_torch": "open-clip-torch"}


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["metadata"]["version"] == "attr: dcp_zoo.__version__"
    config["metadata"]["version"] = dcp_zoo.__version__
    return config


def test_conda_recipe(setup):
    version, text = setup["metadata"]["version"], (ROOT / "hub/conda/meta.yaml").read_text()
    assert f'{{% set version = "{version}" %}}' in text
    text = re.sub(r"{%.*%}", "", text).replace("{{ PYTHON }}", "python")
    recipe = yaml.safe_load(re.sub(r"{{ (\w+) }}", r"\1", text))
    required = [line for line in setup["options"]["install_requires"].split("\n") if line and line[0] != "#"]
    names = [re.split(r"(?=[<>=])", line, maxsplit=1) for line in required]
    run = {f"{CONDA_NAMES.get(name, name).lower()} {bounds}" for name, bounds in names}
    assert set(recipe["requirements"]["run"]) == run | {"python >=python_min"}
    assert recipe["build"]["entry_points"] == ["dcp-zoo = dcp_zoo.cli:main"]


def test_citation(setup):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (setup["metadata"]["version"], setup["metadata"]["license"])
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda path: path.name)
def test_actions_are_pinned(path):
    used = re.findall(r"uses: (\S+)", path.read_text())
    assert used
    assert [action for action in used if not re.search(r"@[0-9a-f]{40}$", action)] == []
