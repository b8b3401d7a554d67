"""The command line: every command as a user calls it, and what bad input gets to read."""

import json
import re
import subprocess
import sys

import pytest
from PIL import Image

from dcp_zoo.cli import main
from dcp_zoo.cli.predict import sample_images


@pytest.fixture
def run(monkeypatch, capsys):
    """Call `dcp-zoo ARGS`: exit code, stdout and stderr, without colours and line breaks."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["dcp-zoo", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "250")
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, re.sub(r"\x1b\[[0-9;]*m", "", out), re.sub(r"\s+", " ", err)

    return call


@pytest.fixture(scope="module")
def animals(tmp_path_factory):
    """A folder-per-class data set: 6 grey images a class, some brighter."""
    root = tmp_path_factory.mktemp("animals")
    for c, name in enumerate(["cat", "dog"]):
        (root / name).mkdir()
        for i in range(6):
            Image.new("L", (130, 140), 20 + 150 * c + i).save(root / name / f"{i}.jpg")
    return root


@pytest.fixture(scope="module")
def head(animals, tmp_path_factory):
    """A head trained by the command line itself."""
    folder = tmp_path_factory.mktemp("run") / "head"
    args = ["train", "--dataset", "folder", "--data-root", animals, "--shots", "2", "--output", folder]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["dcp-zoo", *map(str, args), "--epochs", "2", "--batch-size", "2", "--per-block"])
        with pytest.raises(SystemExit) as stop:
            main()
    assert not stop.value.code
    return folder


def test_every_command_explains_itself(run):
    code, out, _ = run("--help")
    assert code == 0
    for command in ("list", "info", "predict", "train", "eval"):
        assert command in out
        code, text, _ = run(command, "--help")
        assert code == 0
        assert "Usage" in text


def test_list(run):
    code, out, _ = run("list")
    assert code == 0
    for name in ("dcp_vitl14_336", "dcp_vitb16.imagenet-16shot", "dcp_mini.caltech101-16shot", "planned"):
        assert name in out
    _, out, _ = run("list", "*b32*")
    assert "dcp_vitb32.ucf101-1shot" in out
    assert "dcp_vitb16" not in out
    assert "No head matches" in run("list", "nothing")[1]


def test_info(run):
    _, out, _ = run("info", "dcp_vitb16.eurosat-4shot")
    assert "planned" in out
    assert "dcp-zoo train --head dcp_vitb16.eurosat-4shot" in out
    _, out, _ = run("info", "dcp_vitb16", "--json")
    assert json.loads(out)["recipe"]["lr"] == 0.0035
    code, _, err = run("info", "dcp_vitb17")
    assert code == 2
    assert "Nearest: dcp_vitb1" in err


def test_train_with_every_kind_of_flag(head, animals, run):
    config = json.loads((head / "config.json").read_text())
    assert config["label_names"] == ["cat", "dog"]
    assert config["dcp"]["recipe"]["epochs"] == 2
    assert config["dcp"]["shared"] is False
    assert config["dcp"]["metrics"].keys() == {"top1_calibrated", "top1_batch"}
    code, _, err = run("train", "--dataset", "folder", "--data-root", animals, "--output", head)
    assert code == 2
    assert "already holds a checkpoint" in err


def test_eval(head, animals, run):
    code, out, _ = run("eval", "--head", head, "--data-root", animals, "--json")
    assert code == 0
    result = json.loads(out)
    trained = json.loads((head / "config.json").read_text())["dcp"]["metrics"]
    assert result["top1"] == trained["top1_calibrated"]
    assert (result["context"], result["dataset"]) == ("calibrated", "folder")


def test_data_check(run, tmp_path):
    code, out, _ = run("data", "check", "--data-root", tmp_path)
    assert code == 0
    assert out.count("missing") >= 15
    assert "caltech101" in out
    code, _, err = run("data", "check", "--data-root", tmp_path / "nothing")
    assert code == 2
    assert "nothing" in err


def test_predict_json_and_table(head, animals, run):
    path = animals / "cat" / "0.jpg"
    code, out, _ = run("predict", path, "--head", head, "--json")
    assert code == 0
    (answer,) = json.loads(out)
    assert answer["image"] == str(path)
    assert {p["class"] for p in answer["predictions"]} == {"cat", "dog"}
    assert sum(p["probability"] for p in answer["predictions"]) == pytest.approx(1, abs=1e-3)
    code, out, err = run("predict", path, "--head", head, "--top-k", 1)
    assert code == 0
    assert "0.jpg" in out
    assert "miniature" in err


def test_predict_with_other_classes(head, run):
    _, out, _ = run("predict", "--sample", "--head", head, "--classes", "flower, temple", "--json")
    answers = json.loads(out)
    assert [a["image"] for a in answers] == sample_images()
    assert {p["class"] for p in answers[0]["predictions"]} == {"flower", "temple"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["predict"], "Name at least one image"),
        (["predict", "nothing.jpg", "--head", "HEAD"], "nothing.jpg"),
        (["predict", "ROOT", "--head", "HEAD"], "is a folder: name its images"),
        (["predict", "--sample", "--head", "HEADX"], "no checkpoint folder here"),
        (["predict", "ROOT/text.jpg", "--head", "HEAD"], "text.jpg"),
        (["predict", "ROOT/cut.jpg", "--head", "HEAD"], "cut.jpg"),
        (["predict", "--sample", "--head", "HEAD", "--classes", "ant, Ant"], "cannot be told apart"),
        (["predict", "--sample", "--head", "HEAD", "--context", "average"], "batch, calibrated, sample"),
        (["predict", "--sample", "--head", "HEAD", "--device", "tpu"], "--device auto or cpu"),
        (["predict", "--sample", "--head", "dcp_mini.nothing-16shot"], "has no head 'nothing-16shot'"),
        (["train", "--output", "OUT", "--model", "dcp_mega"], "Unknown model 'dcp_mega'"),
        (["train", "--output", "OUT", "--dataset", "caltec101"], "caltech101"),
        (["train", "--output", "OUT", "--dataset", "caltech101"], "--data-root"),
        (["train", "--output", "OUT", "--dataset", "caltech101", "--data-root", "ROOT"], "caltech-101"),
        (["train", "--output", "OUT", "--dataset", "folder", "--data-root", "ROOT/nothing"], "nothing"),
        (["train", "--output", "OUT", "--coupling", "both"], "bidirectional, text_to_vision"),
        (["train", "--output", "OUT", "--precision", "int8"], "float32, bfloat16, float16"),
        (["train", "--output", "OUT", "--recipe", "none.yaml"], "no recipe file"),
        (["eval", "--head", "ROOT"], "no config.json"),
    ],
)
def test_bad_input_gets_one_message(run, head, animals, tmp_path, args, message):
    root = tmp_path / "root"
    root.mkdir()
    (root / "text.jpg").write_text("not an image")
    (root / "cut.jpg").write_bytes((animals / "cat" / "0.jpg").read_bytes()[:300])
    places = {"ROOT": str(root), "HEAD": str(head), "OUT": str(tmp_path / "out")}
    for name, place in places.items():
        args = [arg.replace(name, place) for arg in args]
    code, _, err = run(*args)
    assert code == 2
    assert message in err
    assert err.count("Error:") == 1
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_class_with_fewer_images_than_shots_gives_all_and_is_named(run, animals, tmp_path):
    args = ["--dataset", "folder", "--data-root", animals, "--epochs", 1, "--batch-size", 2]
    code, _, err = run("train", *args, "--shots", 5, "--output", tmp_path)
    assert code == 0
    assert "Note:" in err
    assert "cat (3)" in err


def test_what_only_some_commands_need_is_not_imported_by_all():
    """Every command pays for what the command line imports."""
    script = "import sys, dcp_zoo.cli; print([m for m in ('open_clip', 'pandas', 'sklearn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
