"""`hub/build.py` from nothing to a full registry, on small data and a Hub that takes uploads; what it refuses; and
`hub/fill.ipynb`."""

import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import build
import pytest
import real_table
import submit
import torch
import trees
from helpers import process_unchanged
from PIL import Image
from shared import CommandLine
from upload_hub import TOKEN

import dcp_zoo
from dcp_zoo import ZooError
from dcp_zoo.benchmark import Settings, Trial, pace, store
from dcp_zoo.benchmark.sweep import TrialImages
from dcp_zoo.data import DATASETS, list_datasets, packaged
from dcp_zoo.data.download import downloadable
from dcp_zoo.data.packaged import Archive
from dcp_zoo.release.publish import Release, refusals
from dcp_zoo.training.methods import METHODS, fit_head
from dcp_zoo.training.run import plan
from dcp_zoo.training.task import Task
from dcp_zoo.zoo import registry, specs

NAMES = ["red", "green", "blue", "grey"]
DEAD = Archive("http://127.0.0.1:9/images.tar")
COUNTS = {"imagenet": [8, 0, 4], "fgvc_aircraft": [4, 4, 4]}


@pytest.fixture
def run(monkeypatch, capsys) -> CommandLine:
    return CommandLine(monkeypatch, capsys, build.app)


def draw(path: Path) -> None:
    """A picture, with a colour of its own for every name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number = sum(path.stem.encode()) * 37
    Image.new("RGB", (32, 32), (number % 256, number * 7 % 256, number * 3 % 256)).save(path)


@pytest.fixture
def small(tmp_path, manifest, monkeypatch) -> Iterator[Path]:
    """The data of a protocol with four datasets, of each layout, with four classes and a few images each.
    The miniature trains for four steps."""
    full = dict(DATASETS)
    for name in set(list_datasets()) - {"imagenet", "caltech101", "fgvc_aircraft", "oxford_pets"}:
        del DATASETS[name]
    put = monkeypatch.setattr
    put(packaged, "_class_names", lambda: dict.fromkeys((spec.names for spec in full.values()), NAMES))
    put(packaged, "split_rows", lambda name: None)
    put(packaged, "drawn", lambda *args: None)
    put(packaged, "wnid_names", lambda: dict(zip(trees.WNIDS, NAMES, strict=True)))
    put(trees, "WNIDS", trees.WNIDS[: len(NAMES)])
    for name in list_datasets():
        counts = COUNTS.get(name, [8, 4, 4])
        DATASETS[name] = replace(full[name], num_classes=len(NAMES), counts=counts, archives=(DEAD,))
        trees.write_tree(tmp_path / "DATA", name, draw)
    mini = specs.MODELS["dcp_mini"]  # every step has all images, so that the loss falls
    short = replace(mini, recipe=mini.recipe | {"epochs": 4, "batch_size": 4})
    monkeypatch.setitem(specs.MODELS, "dcp_mini", short)
    yield tmp_path
    monkeypatch.undo()
    DATASETS.clear()
    DATASETS.update(full)  # in their order
    registry.all_heads.cache_clear()
    registry.trained_heads.cache_clear()


def arguments(folder: Path, *more: str) -> list[str]:
    shared = ["--data-root", str(folder / "DATA"), "--output", str(folder / "BUILD"), "--shots", "1", "--seeds", "1"]
    return ["--models", "dcp_mini", *shared, *more]


def check_full(hub, folder: Path, monkeypatch, datasets: list[str]) -> None:
    """Every head is published once, pinned, and loads from the Hub by its pin."""
    names = [f"dcp_mini.{dataset}-1shot" for dataset in datasets]
    assert hub.published() == {f"our-org/{name}": 1 for name in names} | {"our-org/dcp-zoo-index": len(names)}
    manifest = json.loads((folder / "checkout/dcp_zoo/zoo/heads.json").read_text())
    assert sorted(manifest) == sorted(names)
    heads = {name: registry.HeadEntry.named(name, **entry) for name, entry in manifest.items()}
    monkeypatch.setattr(registry, "all_heads", lambda: heads)
    name = names[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = dcp_zoo.create_model(name, True)
    assert model.classnames == NAMES
    assert model.info["metrics"].items() <= heads[name].metrics.items()  # which has those of other protocols, too
    assert "top1_no_classifier" in model.info["metrics"]


PACE = pace.Pace(image=0.01, step=0.1, per_class=0.02)


def test_a_dry_run_says_what_a_build_takes(small, uploads, run, monkeypatch):
    monkeypatch.setattr(pace, "pace", lambda *args: PACE)
    out = run.ok(*arguments(small, "--dry-run"))
    assert uploads.requests == []
    assert not (small / "BUILD").exists()
    assert "Downloads: no datasets, 0.0 GB." in out
    assert "The 4 heads take 0.0" in out
    assert "Time of dcp_mini: about 0.0 hours for 8 trials" in out
    assert "a training step with 100 classes takes 2.1 s here, and an image 0.01 s" in out
    monkeypatch.setattr(pace, "gigabytes", lambda specs: 1.0)
    out = run.ok("--models", "dcp_mini", "--datasets", "fgvc_aircraft", "--dry-run")
    assert "Downloads: fgvc_aircraft, 1.0 GB" in out  # nothing else is needed
    assert "Pass --models MODEL, --data-root DIR, --output DIR: python hub/build.py" in run()[2]


def test_the_smoke_preset_is_small(run, monkeypatch):
    """Also with other choices; a model that cannot be measured does not stop the others."""

    def measured(model: str, *args: object) -> pace.Pace:
        if model == "dcp_mini":
            raise ZooError("no tokenizer")
        return pace.Pace(*(100 * seconds for seconds in PACE))

    monkeypatch.setattr(pace, "pace", measured)
    monkeypatch.setattr(pace, "gigabytes", lambda specs: 0.2)
    out = run.ok("--preset", "smoke", "--dry-run")
    assert "Disk: 1.0 GB at most, as archives stay until they are unpacked" in out
    assert "Downloads: caltech101, eurosat, 0.2 GB." in out
    assert "Weights of CLIP: dcp_vitb32 0.6 GB" in out
    others = ("--models", "dcp_vitb32,dcp_mini", "--datasets", "eurosat", "--shots", 4, "--protocols", "base-to-new")
    out = run.ok("--preset", "smoke", *others, "--dry-run")
    assert "Time of dcp_mini: not measured. no tokenizer" in out
    # 20 epochs of batches of 4, for ten classes and for five; 8,100 test images, which each DCP reads again
    seconds = 200 * (10 + 10 * 2) + 100 * (10 + 5 * 2) + 3 * (40 + 20) + (1 + 1 + 1) * 8100
    assert f"Time of dcp_vitb32: about {seconds / 3600:.1f} hours for 4 trials" in out
    assert "smok" in run.refused("--preset", "smok", "--dry-run")


@pytest.mark.scripts
def test_a_pace_is_measured(clip, monkeypatch):
    monkeypatch.setattr(pace, "plain_clip", lambda model, with_weights: clip)
    with process_unchanged("pace"):
        measured = pace.pace("dcp_mini", "cpu")
    assert all(0 <= seconds < 10 for seconds in measured)
    assert measured.image > 0 < measured.step + measured.per_class


@pytest.mark.scripts
def test_a_build_survives_stops_and_a_busy_hub(small, uploads, run, monkeypatch, capsys):
    """From nothing to a full registry; a build that is finished asks for nothing. A card, the manifest and
    the index have the figures of other protocols, whose heads do not take its place."""
    few = ("--org", "our-org", "--datasets", "caltech101,fgvc_aircraft", "--protocols", "base-to-new,domain-shift")
    write, few_only = store.write_json, arguments(small, *few)
    uploads.faults = [("/commit/main", 429), ("/commit/main", 0)]
    for kind in ("results", "published"):  # while it trains, and while it publishes

        def stop(path: Path, content: object, kind: str = kind) -> None:
            write(path, content)
            if path.parent.name == kind:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(store, "write_json", stop)
            assert run(*few_only)[0] == 130
    assert "2 published." in run.ok(*few_only)
    check_full(uploads, small, monkeypatch, ["caltech101", "fgvc_aircraft"])
    name = "dcp_mini.caltech101-1shot"
    alone = (
        "publish",
        small / "BUILD/heads" / name,
        "--to",
        f"our-org/{name}",
        "--data-root",
        small / "DATA",
        "--dry-run",
    )
    assert "The checkpoint is valid" in CommandLine(monkeypatch, capsys)(*alone)[2]  # it has all that a build has
    requests = len(uploads.requests)
    assert "2 published." in run.ok(*few_only)
    assert len(uploads.requests) == requests
    card = uploads.files(f"our-org/{name}")["README.md"].decode()
    assert all(re.search(rf"\| base-to-new, {part} \| \d+\.\d\d \|", card) for part in ("base", "new")), card
    assert json.loads(uploads.files(f"our-org/{name}")["config.json"])["label_names"] == NAMES
    manifest = json.loads((small / "checkout/dcp_zoo/zoo/heads.json").read_text())
    index = json.loads(uploads.files("our-org/dcp-zoo-index")["heads.json"])
    for entry in (manifest[name], index[name]):
        assert {"base-to-new, base", "base-to-new, new", "top1_stored"} <= entry["metrics"].keys()


CELLS = [
    "".join(cell["source"])
    for cell in json.loads(Path(build.__file__).with_name("fill.ipynb").read_text())["cells"]
    if cell["cell_type"] == "code"
]
SHELL = re.compile(r"^(\s*)[!%](.*)$", re.MULTILINE)


class Notebook:
    """Runs the cells of `hub/fill.ipynb` in this process: its commands by their scripts, and not what prepares a
    new machine. `choices` replaces what the reader may choose."""

    def __init__(self, monkeypatch, capsys, drive: str, **choices: object) -> None:
        scripts = {"hub/build.py": build.app, "benchmarks/real_table.py": real_table.app}
        self.programs = {name: CommandLine(monkeypatch, capsys, script) for name, script in scripts.items()}
        self.choices = choices
        self.outputs: list[str] = []
        answers = iter(["our-org", drive])
        monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
        monkeypatch.setattr("getpass.getpass", lambda prompt: TOKEN)

    def shell(self, line: str) -> None:
        program, script, *arguments = shlex.split(line)
        if program == "python":
            code, out, err = self.programs[script](*arguments)
            self.outputs.append(f"exit code {code}: {out} {err}")
        else:
            assert program in ("git", "cd", "pip")

    def run(self, cells: list[str] = CELLS) -> list[str]:
        """The outputs of the commands, in order."""
        names = {"shell": self.shell}
        for cell in cells:
            exec(SHELL.sub(r"\1shell(f'''\2''')", cell), names)
            names |= self.choices
        return self.outputs


def lost_at(dataset: str, notebook: Notebook) -> None:
    """Run a notebook, in a process of its own, until the head of a dataset is trained; then it is killed."""
    write = store.write_json

    def stop(path: Path, content: object) -> None:
        if path.parent.name == "results" and path.name.startswith(f"few-shot.dcp_mini.{dataset}-1shot"):
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, content)

    store.write_json = stop
    notebook.run()


@pytest.mark.scripts
@pytest.mark.skipif(torch.cuda.is_available(), reason="a forked process cannot compute on a GPU")
@pytest.mark.parametrize("drive", ["", "drive"])
def test_the_notebook_goes_on_where_a_lost_machine_stopped(small, uploads, monkeypatch, capsys, drive):
    """With its state on the Hub, after the disk was lost, or on a drive. A dataset whose heads are published is not
    read again, and no head is trained or published twice."""
    monkeypatch.chdir(small)
    monkeypatch.setattr(pace, "pace", lambda *args: PACE)
    monkeypatch.setattr(METHODS, "data", dict(METHODS.data))  # to which the table adds one
    choices = {"models": "dcp_mini", "shots": "1", "datasets": ["caltech101", "fgvc_aircraft"]}
    choices["compared"] = "fgvc_aircraft"
    lost = Notebook(monkeypatch, capsys, drive, **choices)
    process = multiprocessing.get_context("fork").Process(target=lost_at, args=("fgvc_aircraft", lost))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    heads = [f"our-org/dcp_mini.{name}-1shot" for name in ("caltech101", "fgvc_aircraft")]
    assert heads[0] in uploads.published()
    assert heads[1] not in uploads.published()

    shutil.rmtree(small / "BUILD", ignore_errors=True)
    shutil.rmtree(small / "DATA/caltech-101")
    plan, first, second, table = Notebook(monkeypatch, capsys, drive, **choices).run()
    assert "1 published, 1 planned." in plan
    hours = plan.partition("Hours, without downloads")[2]
    assert "fgvc_aircraft" in hours
    assert "caltech101" not in hours
    assert "done" not in first
    assert "done 1/1 few-shot.dcp_mini.fgvc_aircraft-1shot-seed1.dcp" in second
    assert f"published as {heads[1]}" in second
    assert all(title in table for title in real_table.TITLES.values())
    assert "for 3 trials" in table  # DCP and zero-shot CLIP are measured
    assert [output[:11] for output in (plan, first, second, table)] == ["exit code 0"] * 4
    published = uploads.published()
    assert [published.pop(head) for head in heads] == [1, 1]
    assert published.pop("our-org/dcp-zoo-index") == 2
    assert [*published] == ([] if drive else ["our-org/dcp-zoo-build"])
    if not drive:
        kept = uploads.repos["our-org/dcp-zoo-build"]
        assert kept.private
        assert {name.split("/")[0] for name in uploads.files("our-org/dcp-zoo-build")} == {"published", "results"}


def test_the_notebook_says_what_the_gpu_will_manage(small, uploads, monkeypatch, capsys):
    """In the order in which it builds, and trains nothing."""
    monkeypatch.chdir(small)
    monkeypatch.setattr(pace, "pace", lambda *args: pace.Pace(*(1000 * seconds for seconds in PACE)))
    choices = {"models": "dcp_mini", "shots": "4,1", "datasets": ["fgvc_aircraft", "caltech101"]}
    (plan,) = Notebook(monkeypatch, capsys, "", **choices).run(CELLS[:-2])
    rows = re.findall(r"│ (\w+) +│ (\d) +│ ([\d.]+) +│ ([\d.]+) +│", plan.partition("Hours, without downloads")[2])
    assert [row[:2] for row in rows] == [("fgvc_aircraft", "2"), ("caltech101", "2")]
    # four epochs of batches of 4, of 16 and of 4 images, are 16 + 4 steps of 180 s; an image takes 10 s: four to test
    # on, which each of two heads reads again, and those to train on, plain, mirrored, and by the head's prompts
    seconds = (16 + 4) * (100 + 4 * 20) + 10 * (4 + 2 * 4 + 3 * (16 + 4))
    assert rows[0][2] == rows[0][3] == f"{seconds / 3600:.1f}"
    assert float(rows[1][3]) == pytest.approx(2 * seconds / 3600, abs=0.1)
    assert not (small / "BUILD").exists()
    assert uploads.published() == {}


def test_the_notebook_fills_the_zoo_with_all_that_downloads_by_itself():
    names: dict[str, object] = {}
    (cell,) = (cell for cell in CELLS if "datasets = [" in cell)
    exec(cell, names)
    datasets = names["datasets"]
    assert sorted(datasets) == sorted({*list_datasets()} & {*downloadable()})
    assert {*names["compared"].split(",")} <= {*datasets[:3]}
    trials = build.build_trials(
        [], names["models"].split(","), datasets, [int(k) for k in names["shots"].split(",")], [1]
    )
    heads = [trial.head for trial in trials if trial.method == build.METHOD]
    assert heads[:2] == ["dcp_vitb16.caltech101-16shot", "dcp_vitb16.caltech101-4shot"]
    assert len(heads) == len({*heads}) == 2 * 2 * len(datasets)
    assert {*heads} <= {*registry.all_heads()}


@pytest.mark.scripts
def test_the_table_of_a_real_clip_is_submitted(small, monkeypatch, capsys):
    """On stand-ins: says what it takes, stops, resumes, and `submit.py` takes all rows."""
    monkeypatch.setattr(pace, "pace", lambda *args: PACE)
    monkeypatch.setattr(submit, "split_sha256", lambda name: None)
    monkeypatch.setattr(METHODS, "data", dict(METHODS.data))  # to which it adds one
    table = CommandLine(monkeypatch, capsys, real_table.app)
    command = ["--model", "dcp_mini", "--datasets", "caltech101,fgvc_aircraft", "--shots", "1", "--seeds", "1,2"]
    command += ["--data-root", small / "DATA", "--output", small / "TABLE"]
    assert "for 18 trials" in table.ok(*command, "--dry-run")
    assert not (small / "TABLE").exists()
    table.ok(*command[:-4], *command[-4:], "--seeds", "1")
    out = table.ok(*command)
    assert "for 8 trials" in out
    assert [out.index(title) for title in real_table.TITLES.values()] == sorted(
        map(out.index, real_table.TITLES.values())
    )
    rows = json.loads(
        CommandLine(monkeypatch, capsys, submit.app).ok(small / "TABLE/submission.csv").split("\nAdmitted")[0]
    )
    assert len(rows) == 2 * (len(real_table.TITLES) - 1)
    for row in rows:
        assert (row["shots"], row["seeds"], row["measured"]) == (1, [1, 2], None)
    (alone,) = (row for row in rows if (row["method"], row["dataset"]) == ("DCP alone", "caltech101"))
    results = [json.loads(path.read_text()) for path in (small / "TABLE/results").glob("*caltech101-1shot*.dcp.json")]
    tops = [entry["top1"] for result in results for entry in result["results"] if entry["stats"] == "no_classifier"]
    assert alone["reported"] == round(sum(tops) / 2, 2)
    assert alone["recipe"] == results[0]["recipe"]
    head = fit_head(real_table.EMBEDDING, planned_task(small / "DATA"))
    assert head.num_features == 512  # and not what the stem has before it


def planned_task(data_root: Path) -> Task:
    images = TrialImages("dcp_mini", Settings(data_root, data_root, "cpu"))
    trial = Trial("few-shot", "dcp_mini", real_table.EMBEDDING, "caltech101", 1, 1)
    run = plan(images.split("caltech101"), "dcp_mini", trial.method, shots=1, recipe=trial.recipe, device="cpu")
    return run.task(images)


def test_rows_of_a_table_are_submissions(tmp_path):
    (path := tmp_path / "rows.csv").write_text("by,seeds\n1,[]\n")
    with pytest.raises(ZooError, match="rows.csv: by must be a string, not 1; .*seeds must be a list"):
        submit.read_submissions(path)
    path.write_text("\n")
    with pytest.raises(ZooError, match="rows.csv: by must be a string, not None"):
        submit.read_submissions(path)
    path.write_text("by\nA. Author\n")
    with pytest.raises(ZooError, match="rows.csv cannot be read"):  # no JSON
        submit.read_submissions(path)


INFO = dict.fromkeys(("dataset", "shots", "seed", "recipe", "split_sha256", "subset_sha256"), "known")
MEASURED = {"first_loss": 2.0, "last_loss": 0.5, "metrics": {"top1_stored": 70.0, "top1_batch": 70.5}}


def test_gates():
    zero_shot = {"results": [{"images": 1000, "top1": 69.0, "stats": ""}], "split_sha256": "known"}
    for change, reason in (
        ({}, ""),
        ({"test_images": 1000}, ""),
        ({"metrics": {"top1_stored": 65.0, "top1_batch": 65.0}}, ""),  # within 2 points and chance
        (
            {"metrics": {"top1_stored": 64.0, "top1_batch": 64.0}},
            "is too far below zero-shot CLIP's 69.00",
        ),
        ({"metrics": {"top1_stored": 70.0, "top1_batch": 74.5}}, "are too far apart"),
        ({"last_loss": float("nan")}, "not finite"),
        ({"split_sha256": "other"}, "tested on other images"),
        ({"test_images": 999}, "tested on other images"),
        ({"metrics": {"top1_stored": 70.0}}, "not measured with both kinds of statistics"),
    ):
        head = registry.HeadEntry.named("dcp_mini.dtd-1shot")
        release = Release(Path(), head, "org/head", None, INFO | MEASURED | change, {})
        found = refusals(release, zero_shot, "")
        assert [reason in text for text in found] == ([True] if reason else []), found
