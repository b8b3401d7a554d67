"""The command line: every command as a user calls it, the messages for bad input, and how heads are
named."""

import json
import math
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import fields
from datetime import date
from pathlib import Path

import pytest
from PIL import Image
from shared import BUNDLED, printed_warnings
from typer.main import get_command
from typer.testing import CliRunner

import dcp_zoo
from dcp_zoo import ZooError
from dcp_zoo.accuracy import Accuracy
from dcp_zoo.cli import app, console, main
from dcp_zoo.cli.benchmark import split_commas
from dcp_zoo.cli.options import class_list, parse_changes
from dcp_zoo.training.methods import METHODS
from dcp_zoo.zoo.registry import WEIGHTS, get_head
from dcp_zoo.zoo.resolve import name_of, parse_name
from dcp_zoo.zoo.specs import MODELS


@pytest.fixture(scope="module")
def head(folder, tmp_path_factory):
    """A head trained with the command line."""
    output = tmp_path_factory.mktemp("run") / "head"
    args = ["train", folder, "--method", "dcp", "--shots", "2", "--output", output]
    with pytest.MonkeyPatch.context() as patch:
        args += ["--set", "epochs=2", "--set", "batch_size=2", "--set", "share_cmpa=false"]
        args += ["--report", output.parent / "pages" / "dcp.html"]
        patch.setattr("sys.argv", ["dcp-zoo", *map(str, args)])
        with printed_warnings(), pytest.raises(SystemExit) as stop:
            main()
    assert not stop.value.code
    return output


def test_list(run):
    shown = " ".join(run.ok("list").split())
    for text in ("dcp_datacomp_b32_256 mit 0.6 GB 74.7 72.8", "as published by others; not measured here",
                 "head status method alone with text probe",
                 "dcp_mini.caltech101-16shot bundled 77.2 % 89.6 %",
                 "oxford_flowers50 is a part of oxford_flowers: accuracies"):  # fmt: skip
        assert text in shown
    assert "dcp_vitb16." not in shown
    out = run.ok("list", "*.caltech101-16shot")
    assert ("dcp_mini.caltech101-16shot" in out, "dcp_mini.caltech101-1shot" in out) == (True, False)
    told = " ".join(run.ok("list", "*vitb32.ucf101*").split())
    assert "5 heads are planned" in told
    assert "dcp_vitb32.ucf101-1shot planned" in told  # a filter with a dot asks for heads
    assert told.endswith("How to train one: dcp-zoo info dcp_vitb32.ucf101-1shot")


def test_list_fits_a_screen(run, monkeypatch):
    monkeypatch.setattr(console.output, "_width", 80)
    lines = run.ok("list").splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)


def test_shell_completion(monkeypatch):
    monkeypatch.setenv("_DCP_ZOO_COMPLETE", "complete_bash")
    for words, expected in (
        ("dcp-zoo pre", ["predict"]),
        ("dcp-zoo predict --head dcp_mini.caltech101-1", ["dcp_mini.caltech101-16shot", "dcp_mini.caltech101-1shot"]),
        ("dcp-zoo train --model dcp_vitl14_", ["dcp_vitl14_336"]),
    ):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
        result = CliRunner().invoke(app, prog_name="dcp-zoo")
        assert sorted(result.stdout.split()) == expected


def test_info(head, run):
    """How good it is, of what and since when; also of a planned head and a model."""
    assert "dcp-zoo train --head dcp_vitb16.eurosat-4shot" in run.ok("info", "dcp_vitb16.eurosat-4shot")
    assert json.loads(run.ok("info", "dcp_vitb16", "--json"))["recipe"]["lr"] == 0.0035
    assert "Nearest: dcp_vitb1" in run.refused("info", "dcp_vitb17")
    stored = json.loads((head / "config.json").read_text())["dcp"]
    percent, images = stored["metrics"]["top1_stored"], stored["test_images"]
    low, high = Accuracy("", round(percent * images / 100), images).interval
    out = run.ok("info", head)
    for text in (
        f"{percent:.1f} % (",
        f"of {images}; 95 % interval {math.floor(low)} to {math.ceil(high)})",
        f"{date.today()}",
    ):
        assert text in out
    assert json.loads(run("info", head, "--json")[1])["metrics"] == stored["metrics"]
    told = " ".join(run.ok("info", "dcp_mini.caltech101-16shot").replace("│", "").split())
    assert f"{Accuracy('', 2208, 2465)} with the text probe; 77.2 % without" in told


def test_eval(head, folder, run):
    config = json.loads((head / "config.json").read_text())
    assert (config["dcp"]["recipe"]["epochs"], config["model_args"]["share_cmpa"]) == (2, False)
    result = json.loads(run.ok("eval", "--head", head, "--data-root", folder, "--json"))
    assert result["top1"] == config["dcp"]["metrics"]["top1_stored"]
    assert (result["stats"], result["dataset"]) == ("stored", "folder")
    page = head.parent / "page.html"
    run.ok("eval", "--head", head, "--data-root", folder, "--report", page)
    assert page.read_text() == (head.parent / "pages" / "dcp.html").read_text(), "the one that training wrote"


DIGITS = ["train", "digits", "--method", "dcp", "--output", "OUT"]
GDA = ["train", "MY_PHOTOS", "--method", "gda", "--output", "OUT"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["predict"], "Pass images, a folder of images, or --sample"),
        (["predict", "--sample", "--head", "HEAD", "--device", "tpu"], "--device auto or cpu"),
        (["train", "--output", "OUT"], "or train caltech101 --data-root DATA"),
        (["train", "digts"], "There is no folder digts, and no dataset of this name. Nearest: digits"),
        (["train", "MY_PHOTOS", "--head", "dcp_vitb16.dtd-1shot"], "already sets PHOTOS"),
        (["train", "--head", "dcp_vitb16.dtd-1shot", "--method", "coop"], "already sets PHOTOS"),
        (["train", "floder"], "no dataset of this name. Nearest: oxford_flowers"),
        ([*GDA, "--recipe", "release"], "The recipe release is for DCP: omit it, or use --method dcp"),
        ([*GDA, "--data-root", "MY_PHOTOS"], "MY_PHOTOS has your own images: omit --data-root"),
        ([*DIGITS, "--warmup-lr=3"], "no option --warmup-lr, but a field of the recipe: --set warmup_lr="),
        ([*GDA, "--set", "beta=2"], "--set: beta is none of augment"),
        ([*GDA, "--set", "classifier=svm"], "classifier must be none or text-probe, not 'svm'"),
        ([*DIGITS, "--set", "depth=1,3"], "--set depth has 2 values: pass one"),
        (["predict", "a.jpg", "--output", "a" * 5000 + ".csv"], "File name too long"),
    ],
)
def test_bad_input_gets_one_message(run, head, flowers, tmp_path, args, message):
    places = {"HEAD": str(head), "OUT": str(tmp_path / "out")}
    for name, place in places.items():
        args, message = [arg.replace(name, place) for arg in args], message.replace(name, place)
    err = run.refused(*args)
    assert message in err
    assert err.count("Error:") == 1
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_text_may_have_commas():
    phrases = ["ctx_init=a photo, or a drawing, of a", "ctx_init=art"]
    assert parse_changes(phrases) == {"ctx_init": ["a photo, or a drawing, of a", "art"]}
    words = ["share_cmpa=False,true", "epochs=None, 3"]  # Python's, too, as reports have them
    assert parse_changes(words) == {"share_cmpa": [False, True], "epochs": [None, 3]}


def test_help_of_train_lists_every_field_of_the_recipe(run):
    out, method = run.ok("train", "--method", "dcp", "--help"), "dcp"
    for part in fields(METHODS[method].config):
        assert re.search(rf"- {part.name} \([^)]+\): {re.escape(part.metadata['help'])}", out)
        assert ", ".join(part.metadata.get("choices", ())) in out
        assert part.metadata.get("min") is None or f"; at least {part.metadata['min']}" in out


CHECKPOINT = str(WEIGHTS / BUNDLED)  # a checkpoint folder like any other
HEAVY = ("torch", "torchvision", "timm", "open_clip", "huggingface_hub", "numpy", "pandas", "sklearn")
FRESH = f"""
import contextlib, io, json, sys
from dcp_zoo.cli import main
for args in json.loads(sys.argv[1]):
    sys.argv = ["dcp-zoo", *args]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            main()
    except SystemExit as stop:
        heavy = [name for name in {HEAVY} if name in sys.modules]
        print(" ".join(args), stop.code or 0, *heavy, sep=": ")
"""


def commands(group, *names: str) -> list[list[str]]:
    """The words of every command and group of commands."""
    inner = getattr(group, "commands", {})
    return [list(names), *(words for name in inner for words in commands(inner[name], *names, name))]


def options(command) -> list[str]:
    """The options of a command, and of the commands of a group; without --help, a pair of flags once."""
    inner = getattr(command, "commands", {}).values()
    own = [part.opts[0] for part in command.params if part.param_type_name == "option"]
    return [name for part in inner for name in options(part)] if inner else own


def test_the_commands_stay_few_and_have_few_options():
    inner = get_command(app).commands
    assert len(options(get_command(app))) <= 100
    assert len(options(inner["predict"])) <= 15
    assert sum(len(getattr(part, "commands", [part])) for part in inner.values()) <= 15


def test_commands_without_a_model_import_nothing_heavy():
    """One after the other in one process: what one imports is said of all later ones."""
    refused = [["train", "--epochs", "50"], ["train", CHECKPOINT]]  # which is no folder with a folder per class
    refused += [["train", "digits", "--output", CHECKPOINT]]  # which is finished
    tried = [
        *([*words, "--help"] for words in commands(get_command(app))),
        ["--version"],
        *(["info", name] for name in ("dcp_mini.caltech101-16shot", CHECKPOINT)),
        ["data", "check", "--data-root", "."],
        *refused,
    ]
    asking = [["list"], *(["info", name] for name in (*MODELS, "dcp_vitl14.dtd-1shot"))]  # the Hub's index of heads
    done = subprocess.run(
        [sys.executable, "-c", FRESH, json.dumps(tried + asking)], capture_output=True, text=True, check=False
    )
    expected = [f"{' '.join(args)}: {2 if args in refused else 0}" for args in tried]
    expected += [f"{' '.join(args)}: 0: huggingface_hub" for args in asking]
    assert done.stdout.splitlines() == expected, done.stderr


@pytest.mark.parametrize(
    ("command", "file"),
    [("predict --sample --sheet FILE", "page.html"), ("inspect photos --output .", "inspection.csv")],
)
def test_no_command_replaces_a_file_unasked(run, tmp_path, monkeypatch, command, file):
    """Nor a photograph when asked."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for name in (file, "photo.jpg"):
        Path(name).write_text("mine")
    said = run.refused(*command.replace("FILE", file).split())
    assert re.search(rf"{file} exists already: choose another --\w+, or pass --overwrite\.", said)
    if "FILE" in command:
        said = run.refused(*command.replace("FILE", "photo.jpg").split(), "--overwrite")
        assert re.search(r"photo.jpg exists already: choose another --\w+\.", said)
    assert Path(file).read_text() == Path("photo.jpg").read_text() == "mine"
    assert sorted(path.name for path in Path().iterdir()) == sorted({file, "photo.jpg", "photos"})


def test_predict_explains_a_few_images(run, tmp_path, monkeypatch):
    """With a picture of each that can be read."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    Image.effect_noise((90, 60), 50).save("photos/a.png")
    Path("photos/b.png").write_text("no image")
    run("predict", "photos", "--head", BUNDLED, "--explain", "why")
    assert [path.name for path in Path("why").iterdir()] == ["1_a.png"]
    assert Image.open("why/1_a.png").size == (2 * 192, 192)
    for i in range(50):
        shutil.copy("photos/a.png", f"photos/{i}.png")
    said = run.refused("predict", "photos", "--head", BUNDLED, "--explain", "why")
    assert "pass at most 50" in said


def test_classes_are_names_or_a_file(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert class_list(",".join(f"name {i}" for i in range(500)))[499] == "name 499"
    assert class_list('cat, "dandelion, yellow", 32""') == ["cat", "dandelion, yellow", '32""']
    assert split_commas(["/d/{train,test},dtd", "eurosat"]) == ["/d/{train,test}", "dtd", "eurosat"]
    assert class_list("") == [""]  # which is refused
    Path("cats.txt").write_text("Siamese\nPersian cat\n \n")
    Path("cats.json").write_text('["Siamese", "Persian cat"]')
    assert class_list("cats.txt") == class_list("cats.json") == ["Siamese", "Persian cat"]
    said = json.loads(run.ok("predict", "--sample", "--head", BUNDLED, "--classes", "cats.txt", "--json"))
    assert {answer["class"] for answer in said[0]["predictions"]} == {"Siamese", "Persian cat"}
    with pytest.raises(ZooError, match="There is no file cat.txt. --classes takes a file, or names"):
        class_list("cat.txt")


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [
        (["export", "--head", "my_head", "--output", "x.onnx"], "onnxscript", "export"),
        (["predict", "--sample", "--output", "x.parquet"], "pyarrow", "data"),
        (["benchmark", "few-shot", "--datasets", "dtd", "--output", "out", "--ray", "local"], "ray", "ray"),
    ],
)
def test_a_missing_extra_is_named_before_the_work(run, my_head, no_work, monkeypatch, command, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    assert f"pip install 'dcp_zoo[{extra}]'" in run.refused(*command)
    assert not Path("out").exists()


COMMANDS = [["predict", "--sample"], ["eval", "digits"], ["export"]]


def test_every_name_of_a_checkpoint_works(my_head):
    for name in ("my_head", "my_head/", "my_head/model.safetensors", "local-dir:my_head"):
        assert dcp_zoo.create_model(name, True).classnames == ["rose", "tulip"]
    with pytest.raises(ZooError, match="neither a checkpoint folder nor a head of the zoo"):
        dcp_zoo.create_model("x" * 1000, True)
    Path("dcp_mini").mkdir()  # any folder with the name of a model
    assert str(parse_name("dcp_mini")) == "dcp_mini"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_every_command_takes_a_head_in_the_same_way(run, my_head, no_work, command):
    for name, message in {
        "my_haed": "'my_haed' is neither a checkpoint folder nor a head of the zoo. Nearest: my_head",
        "local-dir:my_haed": "is neither a checkpoint folder nor a head of the zoo. Nearest: my_head",
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said above
        assert dcp_zoo.create_model(name_of(Path(place)), True).classnames == classes  # as `train` says
    assert bool(re.search(rf"\n{re.escape(name)} +local +95\.\d % +97\.\d %", run.ok("list"))) == (name == PLANNED)
    assert ("dog" in run.ok("info", name)) == is_folder


def test_info_on_a_head_saved_from_python(run, flowers):
    """With the labels where they are not the names."""
    paths, names = dcp_zoo.list_labelled_images(flowers)
    labels = {"rose": 0, "tulip": 1}
    classifier = dcp_zoo.FewShotClassifier(method="gda", classnames=list(labels))
    classifier.fit(paths, [labels[name] for name in names]).save("python_head")
    details = json.loads(run.ok("info", "python_head", "--json"))
    assert details["labels"] == labels
    assert {"recipe", "versions"} < details.keys()
    out = run.ok("info", "python_head/model.safetensors")
    for text in ("2: rose, tulip", "all else: dcp-zoo info python_head/model.safetensors --json"):
        assert text in out
