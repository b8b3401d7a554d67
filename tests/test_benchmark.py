"""Benchmarks: the plan of a grid, metrics, one file per trial, and sweeps that are killed and resumed. No
trial learns from the labels of test images: with others there, all that is fitted is the same bit for
bit."""

import errno
import json
import math
import multiprocessing
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers import FEW_STEPS, made_up_result, stopped_in_image_tower, training_steps, until
from PIL import Image
from safetensors.torch import load_file
from trees import write_tree

from dcp_zoo import FewShotClassifier
from dcp_zoo.benchmark import Settings, Trial, pace, plan, plan_trials, store, sweep
from dcp_zoo.data import few_shot, list_datasets, load_image, load_split, subset_sha256
from dcp_zoo.data.packaged import sample_images
from dcp_zoo.errors import ZooError
from dcp_zoo.features.loader import ImageLoader
from dcp_zoo.features.views import PLAIN
from dcp_zoo.training import evaluation as metrics
from dcp_zoo.training.methods import METHODS
from dcp_zoo.training.run import RunOptions, train_head
from dcp_zoo.training.run import plan as plan_run

pytestmark = FEW_STEPS
TRANSFER = [name for name, method in METHODS.items() if method.abilities.transfers]
CLOSED = [name for name in METHODS if name not in TRANSFER]


def test_the_papers_sweep_is_165_trials_planned_in_a_second():
    started = time.process_time()
    trials = plan_trials("few-shot", methods=["dcp"])
    assert time.process_time() - started < 1
    assert len(trials) == 165 == len({trial.key for trial in trials})
    assert {trial.dataset for trial in trials} == set(list_datasets())
    assert trials[0].key == "few-shot.dcp_mini.imagenet-1shot-seed1.dcp"


def test_options_make_a_grid_of_the_methods_that_have_them():
    options = {"depth": [1, 9], "coupling": ["bidirectional", "text_to_vision"]}
    trials = plan_trials("few-shot", ["dcp_vitb16"], ["zero-shot", "dcp"], ["dtd"], [1], [1], options)
    assert [t.changes for t in trials if t.method == "dcp"] == [
        "depth=1",
        "coupling=text_to_vision,depth=1",
        "",  # both equal the recipe's
        "coupling=text_to_vision",
    ]
    assert [t.changes for t in trials if t.method == "zero-shot"] == [""]
    # no text probe can follow a method that is fitted to features
    options = {"classifier": ["text-probe"]}
    trials = plan_trials("few-shot", ["dcp_vitb16"], ["coop", "tip-adapter"], ["dtd"], [1], [1], options)
    assert {t.method: t.changes for t in trials} == {"coop": "classifier=text-probe", "tip-adapter": ""}


def test_domain_shift_and_cross_dataset_targets():
    by_method = {t.method: t for t in plan_trials("domain-shift", datasets=["imagenet"], seeds=[1])}
    variants = ("imagenet", "imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")
    assert all(by_method[name].targets == variants for name in TRANSFER)
    assert all(by_method[name].targets == variants[:3] for name in CLOSED)  # the others have 200 of the classes
    pacs = plan_trials("domain-shift", datasets=["pacs_photo"], seeds=[1])
    assert {t.targets for t in pacs} == {("pacs_photo", "pacs_art_painting", "pacs_cartoon", "pacs_sketch")}
    (cross,) = plan_trials("cross-dataset", methods=["zero-shot"])
    assert cross.targets == tuple(list_datasets())
    (cross,) = plan_trials("cross-dataset", methods=["zero-shot"], targets=["eurosat", "dtd"])
    assert cross.targets == ("dtd", "eurosat")


def test_a_grid_that_cannot_be_is_refused():
    for grid, message in (
        ({"methods": ["copo"]}, "Unknown method for few-shot 'copo': choose from zero-shot"),
        ({"models": ["dcp_minni"]}, "Nearest: dcp_mini"),
        ({"protocol": "base-to-new", "methods": ["linear-probe"]}, "Unknown method for base-to-new 'linear-probe'"),
        ({"protocol": "domain-shift", "targets": ["dtd"]}, "Unknown target 'dtd': choose from imagenet, imagenetv2"),
        ({"targets": ["dtd"]}, "few-shot tests on the dataset itself: omit --targets"),
        ({"seeds": [2**32]}, "The seed must be at most 4294967295, not 4294967296"),
        ({"options": {"dept": [1]}}, "Unknown field of these methods' recipes 'dept': .*depth"),
    ):
        with pytest.raises(ZooError, match=message):
            plan_trials(**{"protocol": "few-shot", "methods": ["dcp"]} | grid)


def test_keys_are_file_names_and_unique():
    odd = [
        Trial("few-shot", "dcp_mini", "dcp", "hf://datasets/org/name", 1, 1),
        Trial("few-shot", "dcp_mini", "dcp", "hf://datasets/org_name", 1, 1),
        Trial("few-shot", "dcp_mini", "dcp", "dtd", 1, 1, options=(("ctx_init", "a photo of a"),)),
        Trial("few-shot", "dcp_mini", "dcp", "dtd", 1, 1, options=(("ctx_init", "a photo of" + " a" * 200),)),
    ]
    keys = [trial.key for trial in odd]
    assert len(set(keys)) == len(keys)
    assert all("/" not in key and " " not in key and len(key) < 230 for key in keys)


def test_calibration_error_and_likelihood_by_hand():
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.35, 0.65]])
    labels = torch.tensor([0, 1, 1, 0])
    # bins of 1/15: both 0.9 in one (accuracy 0.5), 0.7 and 0.65 in two others
    expected = (2 * abs(0.5 - 0.9) + abs(1 - 0.7) + abs(0 - 0.65)) / 4
    assert metrics.expected_calibration_error(probabilities.log(), labels) == pytest.approx(100 * expected, abs=0.01)
    assert metrics.expected_calibration_error(torch.eye(3) * 100, torch.arange(3)) == 0
    bins = metrics.reliability(probabilities.log(), labels)
    found = [(part.images, round(part.confidence, 4), part.accuracy) for part in bins]
    assert found == [(1, 0.65, 0.0), (1, 0.7, 1.0), (2, 0.9, 0.5)]
    loss = -sum(map(math.log, (0.9, 0.1, 0.7, 0.35))) / 4
    assert metrics.negative_log_likelihood(probabilities.log() + 3, labels) == round(loss, 4)


def write_noise(folder: Path, images: int, rng: np.random.Generator) -> None:
    """Write images of each of two classes: noise, so that what fits one labelling of them best fits another
    worse."""
    for name in ("rose", "tulip"):
        (folder / name).mkdir(parents=True)
        for number in range(images):
            pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> Path:
    """A folder with parts, of two images for each class in each part."""
    folder = tmp_path_factory.mktemp("data") / "noise"
    rng = np.random.default_rng(2)
    for part in ("train", "val", "test"):
        write_noise(folder / part, 2, rng)
    return folder


def noisy(path: Path) -> None:
    """Write a tiny picture unlike all others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([*path.as_posix().encode()])
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Path:
    """A data root with EuroSAT and DTD, of four tiny images per class."""
    root = tmp_path_factory.mktemp("tables")
    for name in ("eurosat", "dtd"):
        write_tree(root, name, make=noisy)
    return root


def run_once(trial: Trial, settings: Settings) -> dict[str, Any]:
    """The result of a trial that runs in a sweep of its own, and succeeds."""
    assert sweep.sweep([trial], settings) == {}
    return store.results(settings.output)[trial.key]


# ------------------------------------------------------------------------------------------------ what a trial computes

# How many views of each training image a method is fitted to, where random crops do not make more of them.
FITTED_TO = dict.fromkeys(METHODS, 2) | {"zero-shot": 0, "zero-shot-ensemble": 0, "ss-text": 1, "lp-plus-plus": 1}


def on_two_classes(model: str, method: str) -> Trial:
    """A trial on two images per class, of one step if it is trained; with mirror images in place of random
    crops."""
    options: dict[str, list[object]] = {"epochs": [1], "steps": [1]}
    if METHODS[method].recipe(model, "folder", 2, "few-shot").as_dict().get("augment", "none") != "none":
        options["augment"] = ["flip"]
    if model == "dcp_mini":
        options["classifier"] = ["none"]  # a text probe is fitted for the small model, too
    known = METHODS[method].config
    options = {name: values for name, values in options.items() if hasattr(known, name)}
    (trial,) = plan_trials("few-shot", [model], [method], ["folder"], [2], [1], options)
    return trial


@pytest.fixture(scope="module")
def read_before(noise, small_model) -> sweep.TrialImages:
    """The images of a sweep in which both views of the training images were read already."""
    settings = Settings(noise.parent / "before", noise, "cpu")
    images = sweep.TrialImages(small_model, settings)
    for method in ("tip-adapter", "vpt-deep"):  # from features, and from pixels
        sweep.run_trial(on_two_classes(small_model, method), settings, images=images)
    return images


@pytest.mark.parametrize("method", [*METHODS, "dcp on dcp_mini"])
def test_a_method_is_fitted_to_the_same_rows_on_every_road(
    method, noise, read_before, small_model, tmp_path, monkeypatch
):
    """In a sweep that begins with it, in a sweep after other trials, by `train` and by the estimator: to so
    many views of each training image, and with the same head in the end. DCP trains on tokens of the
    miniature's frozen stem."""
    method, _, model = method.partition(" on ")
    model = model or small_model
    trial = on_two_classes(model, method)
    settings = Settings(tmp_path / "first", noise, "cpu", save_heads=method)
    images = sweep.TrialImages(model, settings)
    subset = images.subset("folder", "all", 2, 1)
    paths, labels = [item.path for item in subset.train], [item.label for item in subset.train]
    validation = [item.path for item in subset.val], [item.label for item in subset.val]
    exact = {"device": "cpu", "precision": "float32"}

    def first() -> Path:
        sweep.run_trial(trial, settings, images=images)
        return settings.output / "heads" / trial.head

    def after_others() -> Path:
        later = replace(settings, output=tmp_path / "later")
        sweep.run_trial(trial, later, images=read_before)
        return later.output / "heads" / trial.head

    def by_train() -> Path:
        split = images.split("folder")
        run = plan_run(split, model, method, shots=2, seed=1, recipe=trial.recipe, **exact)
        return train_head(run, None, RunOptions(test=False))[0].save_pretrained(tmp_path / "train")

    def by_estimator() -> Path:
        estimator = FewShotClassifier(model, method=method, recipe=trial.recipe, memory=False, **exact)
        estimator.set_params(random_state=1, classnames=subset.classnames)
        return estimator.fit(paths, labels, validation=validation).model_.save_pretrained(tmp_path / "estimator")

    views = record_views(monkeypatch, {*paths})
    roads = [first, by_train, by_estimator] if model == "dcp_mini" else [first, after_others, by_train, by_estimator]
    heads = []
    for fit in roads:
        views.clear()
        heads.append(load_file(fit() / "model.safetensors"))
        assert max(views, default=0) == FITTED_TO[method]
    for head in heads[1:]:
        assert head.keys() == heads[0].keys()
        assert all(torch.equal(head[name], heads[0][name]) for name in head)


def record_views(monkeypatch, paths: set[str]) -> list[int]:
    """A list that fills with how many views of the images of these paths are read or shown in shuffled
    batches."""
    views: list[int] = []
    table, shuffled = ImageLoader.table, ImageLoader.shuffled

    def record(loader: ImageLoader, count: int) -> None:
        if {item.path for item in loader.items} <= paths:
            views.append(count)

    def reading(loader, readings=(), views=(PLAIN,), *, facts=False):
        record(loader, len(views))
        return table(loader, readings, views, facts=facts)

    def showing(loader, *args, **options):
        record(loader, len(loader.training_views))
        return shuffled(loader, *args, **options)

    monkeypatch.setattr(ImageLoader, "table", reading)
    monkeypatch.setattr(ImageLoader, "shuffled", showing)
    return views


def test_a_result_says_what_was_tested_and_on_which_images(tables, small_model, tmp_path):
    """Of DCP in three ways of measuring it, and of both halves of the classes, which are drawn as for all of
    them."""
    settings = Settings(tmp_path, tables, "cpu", save_heads="dcp")
    eurosat = load_split("eurosat", tables)
    drawn = few_shot(eurosat, 1, 3).train
    grid = {"models": [small_model], "methods": ["dcp"], "datasets": ["eurosat"], "shots": [1], "seeds": [3]}
    (whole,) = plan_trials("few-shot", **grid, options={"epochs": [1]})
    result = run_once(whole, settings)
    assert [entry["stats"] for entry in result["results"]] == ["stored", "batch", "no_classifier"]
    assert {(e["target"], e["classes"], e["images"]) for e in result["results"]} == {("eurosat", "all", 10)}
    assert result["subset_sha256"] == subset_sha256(drawn)
    (halves,) = plan_trials("base-to-new", **grid, options={"epochs": [1]})
    result = run_once(halves, settings)
    assert {(e["classes"], e["images"]) for e in result["results"]} == {("base", 5), ("new", 5)}
    assert result["subset_sha256"] == subset_sha256([item for item in drawn if item.label < 5])


def test_a_trial_resumes_with_the_targets_that_are_left(tables, small_model, tmp_path):
    """After a stop of the training, and after an error in a target, with the same results as without. A
    target has class names of its own."""
    options = {"models": [small_model], "methods": ["dcp"], "datasets": ["eurosat"], "shots": [1], "seeds": [1]}
    changes = {"epochs": [2], "classifier": ["none"]}
    (trial,) = plan_trials("cross-dataset", **options, targets=["eurosat", "dtd"], options=changes)
    root = Path(shutil.copytree(tables, tmp_path / "root"))
    whole, settings = Settings(tmp_path / "whole", root, "cpu"), Settings(tmp_path / "resumed", root, "cpu")
    with training_steps() as steps:
        before = run_once(trial, whole)
    every = len(steps)
    assert {(entry["target"], entry["images"]) for entry in before["results"]} == {("eurosat", 10), ("dtd", 47)}
    with pytest.raises(KeyboardInterrupt), training_steps(stop_after=2):
        sweep.sweep([trial], settings)
    spoilt = next((root / "dtd" / "images").rglob("*_test_*.jpg"))
    content = spoilt.read_bytes()
    spoilt.write_bytes(bytes(len(content)))
    with training_steps() as steps:
        assert str(spoilt) in sweep.sweep([trial], settings)[trial]
    assert len(steps) == every - 2, "the first two are not taken again"
    spoilt.write_bytes(content)
    with training_steps() as steps:
        after = run_once(trial, settings)
    assert not steps
    assert after["results"] == before["results"]
    assert (after.keys(), after["info"].keys()) == (before.keys(), before["info"].keys())
    assert not [*(tmp_path / "resumed" / "unfinished").iterdir()]


# ------------------------------------------------------------------------------------------------ the folder of a sweep


def grid_on_eurosat(model: str, *seeds: int) -> list[Trial]:
    """Zero-shot CLIP, and a method that takes a moment."""
    return plan_trials("few-shot", [model], ["zero-shot", "ss-text"], ["eurosat"], [1], seeds)


def test_a_failing_trial_is_recorded_and_tried_again(tables, small_model, tmp_path, run):
    """The others run; what it says is not read as markup."""
    root = Path(shutil.copytree(tables, tmp_path / "[red]"))
    drawn = [{item.path for item in few_shot(load_split("eurosat", root), 1, seed).train} for seed in (1, 2, 3)]
    spoilt = Path(min(drawn[1] - drawn[0] - drawn[2]))  # which seed 2 alone draws
    content = spoilt.read_bytes()
    spoilt.write_bytes(bytes(len(content)))
    command = ["benchmark", "few-shot", "--models", small_model, "--methods", "ss-text", "--datasets", "eurosat"]
    command += ["--shots", "1", "--data-root", root, "--output", tmp_path / "out"]
    (failing,) = plan_trials("few-shot", [small_model], ["ss-text"], ["eurosat"], [1], [2])
    err = run.refused(*command)
    assert "Error: 1 of 3 trials failed; the same command tries them again" in err
    assert f"Cannot read the image {spoilt}" in err
    assert len((tmp_path / "out" / "results.csv").read_text().splitlines()) == 1 + 2
    assert str(spoilt) in store.failures(tmp_path / "out")[failing.key]
    assert "Traceback" in json.loads(next((tmp_path / "out" / "failed").iterdir()).read_text())["traceback"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "results").iterdir()}
    assert len(before) == 2
    spoilt.write_bytes(content)
    assert "±" in run.ok(*command)
    assert store.failures(tmp_path / "out") == {}
    assert {path: path.stat().st_mtime_ns for path in before} == before, "these did not run again"
    assert len(store.done(tmp_path / "out")) == 3


def test_results_under_other_conditions_are_rejected(tables, small_model, tmp_path):
    """Of another sweep, on other targets, of other weights, by other versions, or of other images of the
    same names; each with the reason."""
    root = Path(shutil.copytree(tables, tmp_path / "root"))
    settings = Settings(tmp_path / "out", root, "cpu")
    few, more = (
        plan_trials("cross-dataset", [small_model], ["zero-shot"], ["eurosat"], targets=targets)
        for targets in (["dtd"], ["dtd", "eurosat"])
    )
    assert sweep.sweep(few, settings) == {}
    assert sweep.sweep(few, settings, run=lambda trials, _: [pytest.fail("again") for _ in trials]) == {}
    path = settings.output / "results" / f"{few[0].key}.json"
    whole = path.read_text()
    result = json.loads(whole)
    for text, message in (
        (json.dumps(result | {"weights": "other"}), "made with other weights: choose another --output"),
        (json.dumps(result | {"made_by": result["made_by"] | {"timm": "0.1"}}), "made with other timm"),
        (whole[:100], "json cannot be read .* Delete it"),
        ("{}", "json cannot be read .* Delete it"),
    ):
        path.write_text(text)
        with pytest.raises(ZooError, match=message):
            sweep.sweep(few, settings)
    with pytest.raises(ZooError, match="json cannot be read .* Delete it"):
        store.gather(settings.output)
    path.write_text(whole)
    with pytest.raises(ZooError, match="made with other precision: choose another --output"):
        sweep.sweep(few, replace(settings, precision="bfloat16"))
    with pytest.raises(ZooError, match="has no test on eurosat: choose another --output"):
        sweep.sweep(more, settings)
    Image.new("RGB", (60, 60), "red").save(next((root / "dtd" / "images").rglob("*_test_*.jpg")))
    with pytest.raises(ZooError, match="was made with other images of dtd: choose another --output"):
        sweep.sweep(few, settings)


def test_a_later_sweep_sees_that_the_folder_has_changed(noise, small_model, tmp_path):
    folder = Path(shutil.copytree(noise, tmp_path / "photos"))
    trials = plan_trials("few-shot", [small_model], ["zero-shot"], ["folder"])
    settings = Settings(tmp_path / "out", folder, "cpu")
    assert not sweep.sweep(trials, settings)
    Image.new("RGB", (60, 60), "red").save(next((folder / "test" / "rose").iterdir()))
    with pytest.raises(ZooError, match="was made with other images of folder: choose another --output"):
        sweep.sweep(trials, settings)


def slowly(trials: list[Trial], settings: Settings) -> Iterator[sweep.Event]:
    """In place of `run_in_process`: each trial takes a moment, and nothing is measured."""
    for trial in trials:
        with (settings.output / "log").open("a") as log:
            log.write(f"{trial.key}\n")
        time.sleep(0.2)
        store.save_result(settings.output, made_up_result(trial) | settings.conditions(trial))
        yield sweep.Event(trial, "done")


def test_a_killed_sweep_resumes_and_another_in_its_folder_is_refused(tables, tmp_path):
    """No trial that was finished runs again."""
    trials, settings = grid_on_eurosat("dcp_mini", 1, 2, 3, 4, 5), Settings(tmp_path, tables, "cpu")

    def started() -> list[str]:
        return (tmp_path / "log").read_text().split() if (tmp_path / "log").exists() else []

    work = partial(sweep.sweep, trials, settings, run=slowly)
    first, second = (multiprocessing.get_context("fork").Process(target=work) for _ in range(2))
    first.start()
    until(lambda: len(started()) == 3)
    with pytest.raises(ZooError, match="Another process .*: wait, or choose another --output"):
        sweep.sweep(trials, settings)
    first.kill()
    first.join()
    lost = started()[-1]
    assert store.done(tmp_path) == {*started()} - {lost}
    second.start()
    second.join(60)
    assert second.exitcode == 0
    assert sorted(started()) == sorted([lost, *(trial.key for trial in trials)])
    assert store.done(tmp_path) == {*started()}


@pytest.fixture
def known_pace(monkeypatch) -> pace.Pace:
    """One that is not measured, and no size that is asked for."""
    known = pace.Pace(image=0.25, step=2.0, per_class=0.5)
    monkeypatch.setattr(pace, "pace", lambda *args: known)
    monkeypatch.setattr(pace, "gigabytes", lambda specs: 1.5 * len(specs))
    return known


def test_a_dry_run_says_hours_downloads_and_disk(tables, tmp_path, run, known_pace):
    """Of the trials that are left, on what is missing. 2,000 steps of CLIP-LoRA have 32 images, of DCP's so
    many as its recipe says; test images of datasets without a table are counted where they are."""
    command = ["benchmark", "few-shot", "--models", "dcp_vitb32", "--shots", 4, "--seeds", 1, "--dry-run"]
    out = run.ok(*command, "--methods", "dcp,clip-lora,text-probe", "--datasets", "eurosat,dtd")
    assert "Downloads: eurosat, dtd, 3.0 GB." in out
    assert "Weights of CLIP: dcp_vitb32 0.6 GB, if not in the cache." in out
    assert "Disk: 6.6 GB at most" in out
    assert "heads" not in out
    seconds = 0.25 * (8100 + 1692)  # once for all
    for classes, tests in ((10, 8100), (47, 1692)):
        images = 4 * classes
        step = 2 + 0.5 * classes
        seconds += 3 * 2 * images * 0.25 + 0.25 * (images + tests) + step * (20 * images / 4 + 2000 * 32 / 4)
    assert f"about {seconds / 3600:.1f} hours for 6 trials, one after the other" in out

    digits = ["benchmark", "few-shot", "--methods", "zero-shot", "--dry-run", "--datasets"]
    out = run.ok(*digits, "digits")
    assert "Downloads: no datasets, 0.0 GB." in out
    assert f"about {len(load_split('digits').test) * 0.25 / 3600:.1f} hours for 1 trials" in out
    out = run.ok(*digits, "folder")
    assert "Time of dcp_mini: not measured. folder needs a data root" in out
    store.write_json(tmp_path / "results/few-shot.dcp_mini.digits.zero-shot.json", {})
    out = run.ok(*digits, "digits", "--output", tmp_path)
    assert "1 trials, 0 to run" in out
    assert "Time" not in out


def test_missing_targets_are_found_before_anything_is_trained(tmp_path, run, known_pace):
    """Also by a dry run."""
    grid = ("--methods", "zero-shot", "--datasets", "digits", "--output", tmp_path / "x")
    command = ("benchmark", "cross-dataset", *grid)
    assert "needs a data root: pass --data-root DIR" in run.refused(*command)
    for options in ((), ("--dry-run",)):
        err = run.refused(*command, "--data-root", tmp_path, *options)
        assert (err.count("Error:"), err.count(" does not exist")) == (1, 1)
        assert not (tmp_path / "x" / "results").exists()
    assert "1 trials, 1 to run" in run.ok(*command, "--dry-run"), "without a folder nothing is looked for"
    assert "1 trials, 1 to run" in run.ok(*command, "--targets", "digits", "--data-root", tmp_path, "--dry-run")
    assert "--shots takes integers" in run.refused(*command, "--shots", "1,two")
    assert "--shots must be at least 1, not 0" in run.refused(*command, "--shots", "0")
    assert "1 trials, 1 to run" in run.ok(*command, "--seeds", "0", "--dry-run"), "as `train --seed 0`"


def test_ctrl_c_stops_cleanly(tables, small_model, tmp_path, run):
    command = ["benchmark", "few-shot", "--models", small_model, "--methods", "ss-text", "--datasets", "eurosat"]
    command += ["--shots", "1", "--data-root", tables, "--output", tmp_path]
    run.ok(*command, "--seeds", "1")
    with stopped_in_image_tower():
        code, _, err = run(*command)
    assert (code, "What was computed is kept" in err) == (130, True)
    assert (len(store.done(tmp_path)), store.failures(tmp_path)) == (1, {})


@pytest.mark.parametrize(
    "command",
    [
        "train MY_PHOTOS --output out",
        "export --head my_head --output out/my.onnx",
        "benchmark few-shot --datasets folder --data-root MY_PHOTOS --output out",
        "report out",
    ],
)
def test_a_folder_that_is_not_writable_is_found_first(run, flowers, my_head, no_work, monkeypatch, command):
    """A folder's lock and the files that are tried are opened by the system, which may refuse it."""
    monkeypatch.setattr("os.open", Mock(side_effect=OSError(errno.EACCES, "Permission denied")))
    err = run.refused(*command.split())
    assert "Cannot write to out" in err
    assert "Permission denied. Choose another --output" in err


@pytest.mark.parametrize("call", ["os.fsync", "os.open"])
def test_a_full_folder_stops_the_sweep_with_nothing_half_written(tables, small_model, tmp_path, monkeypatch, call):
    trials, settings = grid_on_eurosat(small_model, 1), Settings(tmp_path, tables, "cpu")
    assert sweep.sweep(trials[:1], settings) == {}
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    with monkeypatch.context() as full:
        full.setattr(call, Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(ZooError, match=r"Cannot write .*[Cc]hoose another --output"):
            sweep.sweep(trials, settings)
    files = {path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"}
    assert {path: path.read_bytes() for path in files} == before
    assert sweep.sweep(trials, settings) == {}
    assert len(store.done(tmp_path)) == len(trials)


def test_no_group_of_a_folder_is_in_two_parts(tmp_path, monkeypatch):
    monkeypatch.setenv("DCP_ZOO_CACHE", str(tmp_path / "cache"))
    for i, path in enumerate(sample_images()):
        photo = load_image(path)
        folder = tmp_path / "photos" / f"class {i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        for j, size in enumerate((200, 150, 100)):
            photo.resize((size, size)).save(folder / f"{i} {j}.png")
    split = plan.read_split("folder", tmp_path / "photos")
    parts = [{Path(item.path).name[0] for item in part} for part in (split.train, split.val, split.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 6


# ------------------------------------------------------------------------------------- what no trial may learn from


def trained_head(folder: Path, model: str, output: Path) -> dict[str, torch.Tensor]:
    """The tensors of the head of a whole trial of GDA on a folder with parts."""
    settings = Settings(output, folder, "cpu", save_heads="gda")
    trial = on_two_classes(model, "gda")
    run_once(trial, settings)
    return load_file(output / "heads" / trial.head / "model.safetensors")


@pytest.mark.parametrize("leak", [None, "train", "val"])
def test_labels_of_test_images_change_nothing(leak, noise, small_model, tmp_path):
    """A method gets training and validation images alone; what it gets is the same for all. That it would be
    found otherwise is shown by parts that are the test images, with their labels."""
    heads = []
    for swapped in (False, True):
        folder = Path(shutil.copytree(noise, tmp_path / str(swapped) / "photos"))
        test = folder / "test"
        if swapped:
            (test / "rose").rename(test / "other")
            (test / "tulip").rename(test / "rose")
            (test / "other").rename(test / "tulip")
        if leak:
            shutil.rmtree(folder / leak)
            shutil.copytree(test, folder / leak)
        heads.append(trained_head(folder, small_model, tmp_path / str(swapped) / "out"))
    equal = all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert equal == (leak is None)
