"""Heads on the command line: how they are named, and what is said of them."""

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
from shared import BUNDLED

import dcp_zoo
from dcp_zoo import ZooError
from dcp_zoo.cli.options import head_name
from dcp_zoo.zoo.registry import get_head
from dcp_zoo.zoo.resolve import name_of

pytestmark = pytest.mark.usefixtures("quick_probe")

COMMANDS = [["predict", "--sample"], ["eval", "digits"], ["export"]]


def test_every_name_of_a_checkpoint_works(my_head):
    for name in ("my_head", "my_head/", "my_head/model.safetensors", "local-dir:my_head"):
        assert dcp_zoo.create_model(name, True).classnames == ["rose", "tulip"]
    with pytest.raises(ZooError, match="neither a checkpoint folder nor a head of the zoo"):
        dcp_zoo.create_model("x" * 1000, True)
    Path("dcp_mini").mkdir()  # any folder with the name of a model
    assert head_name("dcp_mini") == "dcp_mini"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_every_command_takes_a_head_in_the_same_way(run, my_head, no_work, command):
    for name, message in {
        "my_haed": "'my_haed' is neither a checkpoint folder nor a head of the zoo. Nearest: my_head",
        "local-dir:nothing": "nothing is not a checkpoint: it has no config.json",
        "s3:bucket/head": "neither a checkpoint folder nor a head",
    }.items():
        assert message in run.refused(*command, "--head", name)


PLANNED, MINE = "dcp_mini.dtd-1shot", "dcp_mini.mine"  # the second cannot be a head of the zoo


@pytest.mark.parametrize(
    ("name", "is_folder", "said"),
    [
        (PLANNED, True, f"{PLANNED} is the head that was trained in"),
        (BUNDLED, False, f"{BUNDLED} is the bundled head {BUNDLED}, not the one in"),
        (MINE, True, ""),
        (f"local-dir:{BUNDLED}", True, ""),
    ],
)
def test_a_folder_stands_for_a_planned_head_never_for_a_bundled_one(name, is_folder, said, run, tmp_path, monkeypatch):
    """In Python as on the command line; which one it is, is said."""
    monkeypatch.chdir(tmp_path)
    place, pacs = name.removeprefix("local-dir:"), get_head("dcp_mini.pacs_photo-16shot").bundled_dir
    shutil.copytree(pacs, place)
    classes = dcp_zoo.create_model(f"local-dir:{pacs}", True).classnames
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert (dcp_zoo.create_model(name, True).classnames == classes) == is_folder
    assert [str(w.message).startswith(said) for w in warned] == [True] * bool(said)
    _, out, err = run("predict", "--sample", "--head", name, "--json", "--top-k", "7")
    assert ({p["class"] for p in json.loads(out)[0]["predictions"]} == set(classes)) == is_folder
    assert said in err
    assert dcp_zoo.create_model(name_of(Path(place)), True).classnames == classes  # as `train` says
    assert bool(re.search(rf"\n{re.escape(name)} +local +95\.\d % +97\.\d %", run.ok("list"))) == (name == PLANNED)
    assert ("dog" in run.ok("info", name)) == is_folder


def test_info_on_a_head_saved_from_python(run, flowers):
    """With the labels where they are not the names."""
    paths, names = dcp_zoo.list_labelled_images(flowers)
    labels = {"rose": 0, "tulip": 1}
    classifier = dcp_zoo.FewShotClassifier(classnames=list(labels))
    classifier.fit(paths, [labels[name] for name in names]).save("python_head")
    details = json.loads(run.ok("info", "python_head", "--json"))
    assert details["labels"] == labels
    assert {"recipe", "versions"} < details.keys()
    out = run.ok("info", "python_head/model.safetensors")
    for text in ("2: rose, tulip", "all else: dcp-zoo info python_head/model.safetensors --json"):
        assert text in out
