"""The command line: every command as a user calls it, and the messages for bad input."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import pytest
import torch
import typer
from helpers import photo
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from dcp_zoo import ZooError
from dcp_zoo.cli import console, main, show
from dcp_zoo.cli.app import app
from dcp_zoo.cli.benchmark import split_commas
from dcp_zoo.cli.console import progress_bar
from dcp_zoo.cli.heads import show_evaluation
from dcp_zoo.cli.options import class_list, parse_changes, single_values, takes_options
from dcp_zoo.data import Item
from dcp_zoo.data.packaged import sample_images
from dcp_zoo.training.accuracy import Accuracy
from dcp_zoo.training.evaluation import Evaluation
from dcp_zoo.training.methods import METHODS
from dcp_zoo.training.recipes import PRECISIONS
from dcp_zoo.zoo.registry import MODELS, WEIGHTS, get_spec


@pytest.fixture(scope="module")
def animals(tmp_path_factory):
    """A folder-per-class dataset: 6 grey images per class, some brighter."""
    root = tmp_path_factory.mktemp("animals")
    for c, name in enumerate(["cat", "dog"]):
        (root / name).mkdir()
        for i in range(6):
            Image.new("L", (130, 140), 20 + 150 * c + i).save(root / name / f"{i}.jpg")
    return root


@pytest.fixture(scope="module")
def head(animals, tmp_path_factory):
    """A head trained with the command line."""
    folder = tmp_path_factory.mktemp("run") / "head"
    args = ["train", animals, "--method", "dcp", "--shots", "2", "--output", folder]
    with pytest.MonkeyPatch.context() as patch:
        args += ["--set", "epochs=2", "--set", "batch_size=2", "--set", "share_cmpa=false"]
        args += ["--report", folder.parent / "pages" / "dcp.html"]
        patch.setattr("sys.argv", ["dcp-zoo", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            main()
    assert not stop.value.code
    return folder


def test_every_command_explains_itself(run):
    out = run.ok("--help")
    for command in ("list", "info", "predict", "train", "eval"):
        assert command in out
        assert "Usage" in run.ok(command, "--help")


def test_list(run):
    out = run.ok("list")
    for text in ("dcp_vitl14_336", "ViT-L-14-336", "dcp_mini.caltech101-16shot", "90.1 %", "1, 2, 4, 8, 16"):
        assert text in out
    assert "dcp_vitb16." not in out
    shown = " ".join(out.split())
    assert "head status method alone with text probe" in shown
    assert "dcp_mini.caltech101-16shot bundled 77.2 % 90.1 %" in shown
    assert "oxford_flowers50 is a part of oxford_flowers: 50 of 102 classes, 400 of 2,463 test images" in shown
    _, out, _ = run("list", "*b32*")
    assert "dcp_vitb32" in out
    assert "dcp_vitb16" not in out
    _, out, _ = run("list", "*.caltech101-16shot")
    assert "dcp_mini.caltech101-16shot" in out
    assert "dcp_mini.caltech101-1shot" not in out


def test_models_to_choose_from(run, monkeypatch):
    """Those that no cheaper one beats. The time is that of a core, divided by those here."""
    monkeypatch.setattr(show, "available_cores", lambda: 2)
    out = run.ok("list", "--recommend")
    costs = re.search(r"\ndcp_datacomp_b32_256 +mit +0.6 GB +([\d.]+) GB +(\d+) s +74.7 +72.8", out)
    spec = get_spec("dcp_datacomp_b32_256")
    assert "dcp_vitb16" not in out
    for text in ("as published by others; not measured here", "in many languages: dcp_siglip2_b32"):
        assert text in " ".join(out.split())
    assert list(map(float, costs.groups())) == [round(spec.memory_mb / 1000, 1), round(spec.core_ms / 20)]
    assert "omit FILTER" in run.refused("list", "*b32*", "--recommend")


@pytest.mark.parametrize(("columns", "args", "most"), [(80, [], 60), (100, [], 60), (80, ["--recommend"], 40)])
def test_list_fits_a_screen(columns, args, most, run, monkeypatch):
    monkeypatch.setattr(console.output, "_width", columns)
    lines = run.ok("list", *args).splitlines()
    assert len(lines) <= most
    assert max(map(len, lines)) <= columns
    assert not any("…" in line for line in lines)


def test_the_tables_of_an_evaluation_fit_a_screen(monkeypatch, capsys):
    """Names and paths are whole; those in the working folder start there."""
    monkeypatch.setattr(console.output, "_width", 80)
    names = ["balloon flower", "canterburybell", "spring crocuses"]
    items = [Item(str(Path.cwd() / "flowers" / name / "1.jpg"), "", label) for label, name in enumerate(names)]
    show_evaluation(Evaluation(names, items, torch.eye(3).roll(1, 0)))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith(f"flowers/{names[2]}/1.jpg") for line in lines)
    assert sum(line.startswith(names[0]) for line in lines) == 2  # in two tables, one below the other


def test_list_names_a_planned_head(run):
    told = " ".join(run.ok("list", "*vitb32.ucf101*").split())
    assert "5 heads for 1, 2, 4, 8, 16 images per class are planned" in told
    assert told.endswith("How to train one: dcp-zoo info dcp_vitb32.ucf101-1shot")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["list", "dcp_vitb17*"], "No model or head matches 'dcp_vitb17*'. Nearest: dcp_vitb16"),
        (["list", "dcp_vitb16.dtd-3*"], "No model or head matches"),
    ],
)
def test_a_filter_that_matches_nothing(run, args, message):
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert message in err


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


def test_version(run):
    assert run("--version")[:2] == (0, f"dcp_zoo {version('dcp_zoo')}\n")


def test_info(run):
    _, out, _ = run("info", "dcp_vitb16.eurosat-4shot")
    assert "planned" in out
    assert "dcp-zoo train --head dcp_vitb16.eurosat-4shot" in out
    _, out, _ = run("info", "dcp_vitb16", "--json")
    assert json.loads(out)["recipe"]["lr"] == 0.0035
    assert "Nearest: dcp_vitb1" in run.refused("info", "dcp_vitb17")


def test_info_says_how_good_of_what_and_when(head, run):
    stored = json.loads((head / "config.json").read_text())["dcp"]
    percent, images = stored["metrics"]["top1_stored"], stored["test_images"]
    low, high = Accuracy("", round(percent * images / 100), images).interval
    out = run.ok("info", head)
    for text in (f"{percent:.1f} % (", f"of {images}; 95 % interval {low:.0f} to {high:.0f})", f"{date.today()}"):
        assert text in out
    assert "sha256" not in out
    assert json.loads(run("info", head, "--json")[1])["metrics"] == stored["metrics"]
    for name, text in (
        (
            "dcp_mini.caltech101-16shot",
            "90.1 % (2222 of 2465; 95 % interval 89 to 91) with the text probe; 77.2 % without",
        ),
        ("dcp_mini.oxford_flowers50-16shot", "oxford_flowers50 is a part of oxford_flowers: 50 of 102 classes"),
    ):
        assert text in " ".join(run.ok("info", name).replace("│", "").split())


def test_train_with_every_kind_of_flag(head, animals, run):
    config = json.loads((head / "config.json").read_text())
    assert config["label_names"] == ["cat", "dog"]
    assert config["dcp"]["recipe"]["epochs"] == 2
    assert config["model_args"]["share_cmpa"] is False
    assert config["dcp"]["metrics"].keys() == {"top1_stored", "top1_batch", "top1_no_classifier"}
    err = run.refused("train", animals, "--output", head)
    assert "already holds a checkpoint" in err


def test_eval(head, animals, run):
    result = json.loads(run.ok("eval", "--head", head, "--data-root", animals, "--json"))
    trained = json.loads((head / "config.json").read_text())["dcp"]["metrics"]
    assert result["top1"] == trained["top1_stored"]
    assert (result["stats"], result["dataset"]) == ("stored", "folder")


def test_train_writes_the_page_that_eval_writes(head, animals, run, tmp_path):
    """For DCP and for another method."""
    pages, gda = head.parent / "pages", tmp_path / "gda"
    run.ok("train", animals, "--method", "gda", "--no-refit", "--report", pages / "gda.html", "--output", gda)
    for folder, page in ((head, pages / "dcp.html"), (gda, pages / "gda.html")):
        run.ok("eval", "--head", folder, "--data-root", animals, "--report", tmp_path / "page.html", "--overwrite")
        assert page.read_text() == (tmp_path / "page.html").read_text()
        assert f"<h1>{folder} on folder</h1>" in page.read_text()


@pytest.mark.parametrize("method", ["dcp", "gda"])
def test_a_page_needs_test_images(animals, run, tmp_path, method):
    args = ("--method", method, "--report", tmp_path / "page.html", "--output", tmp_path / "out")
    err = run.refused("train", animals, *args, "--test", "0")
    assert "--report shows mistakes on test images, but there are no test images" in err
    (tmp_path / "page.html").write_text("")
    err = run.refused("train", animals, *args[:2], "--report", tmp_path / "page.html" / "x", *args[4:])
    assert "hoose another --report" in err
    assert not (tmp_path / "out").exists()


def test_data_check(run, tmp_path):
    out = run.ok("data", "check", "--data-root", tmp_path)
    assert out.count("missing") >= 15
    assert "caltech101" in out
    assert "nothing" in run.refused("data", "check", "--data-root", tmp_path / "nothing")


def test_predict_json_and_table(head, animals, run, monkeypatch, tmp_path):
    monkeypatch.setenv("DCP_ZOO_CACHE", str(tmp_path))
    path = animals / "cat" / "0.jpg"
    (answer,) = json.loads(run.ok("predict", path, "--head", head, "--json"))
    assert answer["image"] == str(path)
    assert {p["class"] for p in answer["predictions"]} == {"cat", "dog"}
    assert sum(p["probability"] for p in answer["predictions"]) == pytest.approx(1, abs=1e-3)
    code, out, err = run("predict", path, "--head", head, "--top-k", 1)
    assert code == 0
    assert "0.jpg" in out
    assert "miniature" in err
    assert "miniature" not in run("predict", path, "--head", head)[2], "said once"


def test_repeated_class_names_get_a_note(head, run):
    code, _, err = run("predict", "--sample", "--head", head, "--classes", "ant, Ant")
    assert code == 0
    assert "Note: Repeated class names cannot be told apart: 'Ant', 'ant'" in err


def test_predict_with_other_classes(head, run):
    _, out, _ = run("predict", "--sample", "--head", head, "--classes", "flower, temple", "--json")
    answers = json.loads(out)
    assert [a["image"] for a in answers] == sample_images()
    assert {p["class"] for p in answers[0]["predictions"]} == {"flower", "temple"}


DIGITS = ["train", "digits", "--method", "dcp", "--output", "OUT"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["predict"], "Pass images, a folder of images, or --sample"),
        (["predict", "--sample", "--head", "HEADX"], "neither a checkpoint folder nor a head"),
        (["predict", "--sample", "--head", "HEAD", "--device", "tpu"], "--device auto or cpu"),
        (["predict", "--sample", "--head", "dcp_mini.nothing-16shot"], "has no head 'nothing-16shot'"),
        ([*DIGITS, "--model", "dcp_mega"], "Unknown model 'dcp_mega'"),
        ([*DIGITS, "--model", "ViT-B-32"], "Unknown model 'ViT-B-32'. open_clip's ViT-B-32 is open_clip:ViT-B-32/TAG"),
        (["train", "caltec101", "--output", "OUT"], "caltech101"),
        (["train", "caltech101", "--output", "OUT"], "--data-root"),
        (["train", "caltech101", "--output", "OUT", "--data-root", "ROOT"], "caltech-101"),
        (["train", "folder", "--output", "OUT", "--data-root", "ROOT/nothing"], "nothing"),
        ([*DIGITS, "--set", "coupling=both"], "bidirectional or text_to_vision"),
        ([*DIGITS, "--set", "coupling"], "--set takes NAME=VALUE"),
        ([*DIGITS, "--set", "epoch=3"], "--set: epoch is none of n_ctx"),
        (["train", "digits", "--output", "OUT", "--set", "epochs=3"], "none of augment, classifier."),
        ([*DIGITS, "--set", "epochs=many"], "--set: epochs must be an integer or null, not 'many'"),
        ([*DIGITS, "--set", "depth=1,3"], "--set depth has 2 values: pass one"),
        ([*DIGITS, "--set", "depth=1", "--set", "depth=3"], "--set depth has 2 values"),
        (["train", "--output", "OUT", "--epochs", "50"], "use --set epochs=50"),
        (["train", "--output", "OUT", "--batch-size=8"], "use --set batch_size=8"),
        (["train", "--share-cmpa", "--output", "OUT"], "use --set share_cmpa=VALUE"),
        (["benchmark", "few-shot", "--output", "OUT", "--epochs", "50"], "use --set epochs=50"),
        ([*DIGITS, "--precision", "int8"], "float32, bfloat16, float16"),
        ([*DIGITS, "--method", "dcp", "--recipe", "slow"], "Unknown recipe 'slow': choose from fast, release, paper"),
        (["eval", "--head", "ROOT"], "no config.json"),
        (["predict", f"{'a' * 5000}.zip"], "This path is too long for the system: 'aaaa"),
        (["train", "a" * 5000, "--output", "OUT"], "This path is too long"),
        (["predict", "--sample", "--output", f"{'a' * 5000}.csv"], "This path is too long"),
    ],
)
def test_bad_input_gets_one_message(run, head, tmp_path, args, message):
    root = tmp_path / "root"
    root.mkdir()
    places = {"ROOT": str(root), "HEAD": str(head), "OUT": str(tmp_path / "out")}
    for name, place in places.items():
        args = [arg.replace(name, place) for arg in args]
    err = run.refused(*args)
    assert message in err
    assert err.count("Error:") == 1
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_class_with_fewer_images_than_shots_uses_all_with_a_note(run, animals, tmp_path):
    code, _, err = run("train", animals, "--shots", 5, "--output", tmp_path)
    assert code == 0
    assert "Note:" in err
    assert "cat (4)" in err  # 70 % of six


def test_other_usage_errors_end_with_code_2_too(run):
    assert "No such option: --outputs" in run.refused("train", "--outputs", "x")


def test_the_fields_of_a_dataclass_are_options():
    @dataclass(frozen=True)
    class Chosen:
        place: Annotated[Path, typer.Argument(help="A folder.")]
        names: Annotated[list[str], typer.Option(help="Its names.")] = ()

    done, small = [], typer.Typer()

    @small.command()
    @takes_options
    def work(chosen: Chosen) -> None:
        done.append(chosen)

    for args, names in ((["here", "--names", "a", "--names", "b"], ["a", "b"]), (["here"], [])):
        assert CliRunner().invoke(small, args).exit_code == 0
        assert done.pop() == Chosen(Path("here"), names)
    assert "A folder." in CliRunner().invoke(small, ["--help"]).stdout


# -------------------------------------------------------------------------------------------------------------- recipe


def test_set_takes_json_or_text():
    changes = parse_changes(
        ["depth=1, 3", "depth=5", "lr=1e-3", "share_cmpa=false", "stop_epoch=null", "pooling=max,mean"]
    )
    assert changes == {
        "depth": [1, 3, 5],
        "lr": [1e-3],
        "share_cmpa": [False],
        "stop_epoch": [None],
        "pooling": ["max", "mean"],
    }


def test_a_text_may_have_commas():
    phrases = ["ctx_init=a photo, or a drawing, of a", "ctx_init=art"]
    assert parse_changes(phrases) == {"ctx_init": ["a photo, or a drawing, of a", "art"]}
    assert single_values(parse_changes(phrases[:1])) == {"ctx_init": "a photo, or a drawing, of a"}
    with pytest.raises(ZooError, match="ctx_init has 2 values"):
        single_values(parse_changes(phrases))


@pytest.mark.parametrize("method", [None, *METHODS])
def test_help_of_train_lists_every_field_of_the_recipe(run, method):
    _, out, _ = run("train", *(["--method", method] if method else []), "--help")
    for part in fields(METHODS[method or "dcp"].config):
        assert re.search(rf"- {part.name} \([^)]+\): {re.escape(part.metadata['help'])}", out)
        assert ", ".join(part.metadata.get("choices", ())) in out
        assert part.metadata.get("min") is None or f"; at least {part.metadata['min']}" in out


def test_names_and_defaults_in_help_texts_match_the_code(run):
    """Help texts do not import these: their modules import torch."""
    from dcp_zoo.benchmark.cluster import Resources
    from dcp_zoo.benchmark.plan import PROTOCOLS

    helps = {name: run(name, "--help")[1] for name in ("benchmark", "train")}
    assert ", ".join(PROTOCOLS) in helps["benchmark"]
    assert Resources() == Resources(cpus=1, gpus=None, retries=2)
    assert all(name in helps["train"] for name in PRECISIONS)


def test_a_log_says_now_and_then_how_far_a_run_is(monkeypatch, capsys):
    """Also while a sweep shows bars that vanish, which a log cannot."""
    monkeypatch.setattr("dcp_zoo.cli.console.QUIET", 1e9)
    list(progress_bar(range(3), "steps", 3, transient=True))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("dcp_zoo.cli.console.QUIET", 0)
    list(progress_bar(range(3), "steps", 3, transient=True))
    assert re.findall(r"steps: (\d) of 3 in 0 s\n", capsys.readouterr().err) == ["1", "2"], "too early to say more"
    monkeypatch.setattr("dcp_zoo.cli.console.AT_ONCE", 0)
    list(progress_bar(range(3), "steps", 3, transient=True))
    assert capsys.readouterr().err.count(" of 3 in 0 s, about 0 s left\n") == 2
    list(progress_bar(range(3), "steps", 3))
    assert capsys.readouterr().err.endswith("steps: 3 of 3 in 0 s\n")


# --------------------------------------------------------------------------------------------------------------- speed

CHECKPOINT = str(WEIGHTS / "dcp_mini.caltech101-1shot")  # a checkpoint folder like any other
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
    assert len(options(inner["predict"])) <= 14
    assert sum(len(getattr(part, "commands", [part])) for part in inner.values()) <= 15


def test_commands_without_a_model_import_nothing_heavy():
    """One after the other in one process: what one imports is said of all later ones."""
    refused = [["train", "--epochs", "50"], ["train", CHECKPOINT]]  # which is no folder with a folder per class
    refused += [["train", "digits", "--output", CHECKPOINT]]  # which is finished
    tried = [
        *([*words, "--help"] for words in commands(get_command(app))),
        ["--version"],
        ["list"],
        *(["info", name] for name in (*MODELS, "dcp_mini.caltech101-16shot", "dcp_vitl14.dtd-1shot", CHECKPOINT)),
        ["data", "check", "--data-root", "."],
        *refused,
    ]
    done = subprocess.run([sys.executable, "-c", FRESH, json.dumps(tried)], capture_output=True, text=True, check=False)
    expected = [f"{' '.join(args)}: {2 if args in refused else 0}" for args in tried]
    assert done.stdout.splitlines() == expected, done.stderr


@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("eval digits --head dcp_mini.eurosat_small-16shot --report FILE", "page.html"),
        ("train digits --output head --report FILE", "page.html"),
        ("predict --sample --sheet FILE", "page.html"),
        ("export --head dcp_mini.eurosat_small-16shot --output FILE", "head.onnx"),
        ("inspect photos --output .", "inspection.csv"),
        ("report . --output .", "report.md"),
    ],
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


def test_a_device_is_refused_before_the_work(run, tmp_path):
    os.mkfifo(tmp_path / "pipe.html")
    for place, what in ((tmp_path / "pipe.html", "pipe, socket or device"), (tmp_path, "folder")):
        said = run.refused("predict", "--sample", "--sheet", place, "--overwrite")
        assert f"Cannot write to {place}: it is a {what}, not a file. Choose another --sheet." in said


def test_flags_take_no_value_in_help(run):
    for command in ([], ["train"], ["classes"]):
        assert "<bool>" not in run.ok(*command, "--help")


def test_classes_are_names_or_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert class_list("cat, dog,tea cup") == ["cat", "dog", "tea cup"]
    assert class_list(",".join(f"name {i}" for i in range(500)))[499] == "name 499"
    assert class_list('cat, "dandelion, yellow", 32""') == ["cat", "dandelion, yellow", '32""']
    assert split_commas(["/d/{train,test},dtd", "eurosat"]) == [
        "/d/{train,test}",
        "dtd",
        "eurosat",
    ]
    assert class_list(None) is None
    assert class_list("") == [""]  # which is refused
    Path("cats.txt").write_text("Siamese\nPersian cat\n \n")
    Path("cats.json").write_text('["Siamese", "Persian cat"]')
    assert class_list("cats.txt") == class_list("cats.json") == ["Siamese", "Persian cat"]
    for name in ("cat.txt", "lists/cats.JSON"):
        with pytest.raises(ZooError, match=f"There is no file {name}. --classes takes a file, or names"):
            class_list(name)


def test_names_are_shown_as_they_are(run, flowers):
    photo(flowers / "rose" / "x [/y].jpg")
    code, out, err = run("predict", "MY_PHOTOS/rose", "--classes", "[red]rose,[/b]")
    assert (code, "y].jpg" in out, "[red]rose" in out) == (0, True, True), err
    code, out, err = run("predict", flowers / "rose" / "x [/y].jpg", "--classes", "[red]rose,[/b]")
    assert (code, "[red]rose" in out, "[/b]" in out) == (0, True, True), err


def test_predict_and_export_read_the_file(run, my_head, exported_names):
    Path("names.txt").write_text("hall\nflower\n")
    _, out, _ = run("predict", "--sample", "--head", "my_head", "--classes", "names.txt", "--json")
    assert {p["class"] for p in json.loads(out)[0]["predictions"]} == {"hall", "flower"}
    run.ok("export", "--head", "my_head", "--classes", "names.txt", "--output", "my.onnx")
    assert Path("my.onnx").read_text() == "['hall', 'flower']"
    assert run("export", "--head", "my_head", "--classes", "name.txt")[0] == 2


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [
        (["export", "--head", "my_head"], "onnx", "export"),
        (["export", "--head", "my_head", "--output", "x.onnx"], "onnxscript", "export"),
        (["export", "--head", "my_head", "--format", "onnx"], "onnxruntime", "export"),
        (["report", "out"], "pandas", "plots"),
        (["report", "out"], "matplotlib", "plots"),
        (["benchmark", "few-shot", "--datasets", "dtd", "--output", "out"], "pandas", "plots"),
        (["benchmark", "few-shot", "--datasets", "dtd", "--output", "out", "--ray", "local"], "ray", "ray"),
    ],
)
def test_a_missing_extra_is_named_before_the_work(run, my_head, monkeypatch, command, module, extra):
    def work(*args, **options):
        pytest.fail("the error should have come first")

    for name in ("zoo.factory.create_model", "benchmark.sweep.execute", "benchmark.store.gather"):
        monkeypatch.setattr(f"dcp_zoo.{name}", work)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", work)
    monkeypatch.setitem(sys.modules, module, None)
    assert f"pip install 'dcp_zoo[{extra}]'" in run.refused(*command)
    assert not Path("out").exists()
