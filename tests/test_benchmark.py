"""Benchmarks: the plan of a grid, metrics, one file per trial, and sweeps that are killed and resumed. No trial learns
from the labels of test images: with others there, all that is fitted is the same bit for bit."""

import errno
import json
import math
import multiprocessing
import time
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers import Count, StoppedState, made_up_result, no_images, until
from PIL import Image
from safetensors.torch import load_file

from dcp_zoo.benchmark import Settings, Trial, plan, plan_trials, store, sweep
from dcp_zoo.benchmark import sweep as sweep_module
from dcp_zoo.data import Item, Split, few_shot, list_datasets, load_image, load_split, subset_sha256
from dcp_zoo.data.packaged import sample_images
from dcp_zoo.errors import ZooError
from dcp_zoo.training import evaluation as metrics
from dcp_zoo.training.methods import METHODS, promptsrc
from dcp_zoo.training.run import Run, train_head
from dcp_zoo.training.state import TrainingState

pytestmark = pytest.mark.usefixtures("quick_probe")
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
        ({"methods": ["copo"]}, "Unknown method 'copo': choose from zero-shot"),
        ({"models": ["dcp_minni"]}, "Nearest: dcp_mini"),
        ({"protocol": "base-to-new", "methods": ["linear-probe"]}, "linear-probe is limited to the classes"),
        ({"protocol": "domain-shift", "targets": ["dtd"]}, "Unknown target 'dtd': choose from imagenet, imagenetv2"),
        ({"targets": ["dtd"]}, "few-shot tests on the dataset itself: omit --targets"),
        ({"seeds": [2**32]}, "The seed must be from 0 to 4294967295, not 4294967296"),
        ({"options": {"dept": [1]}}, "No method's recipe has a field 'dept': .*depth"),
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


@pytest.fixture(scope="module")
def digits():
    """The digits with one test image per class, also under the names of other datasets; read once, as in a sweep."""

    @cache
    def load(name, root=None):
        split = load_split("digits")
        test = [item for label in range(10) for item in [i for i in split.test if i.label == label][:1]]
        names = split.classnames if name != "dtd" else [f"number {c}" for c in split.classnames]
        return replace(split, name=name, test=test, classnames=names)

    sweep.shared_images.cache_clear()
    yield load
    sweep.shared_images.cache_clear()


@pytest.fixture
def few_digits(digits, monkeypatch):
    """The digits for the sweeps of one test; others read what is there."""
    monkeypatch.setattr(plan, "read_split", digits)
    monkeypatch.setattr(promptsrc, "TEMPLATES", promptsrc.TEMPLATES[:3])  # 60 take longer than the rest
    return digits


@pytest.fixture
def tested(monkeypatch):
    """The class names of each measurement of a trial."""
    found = []

    def record(names, *rest):
        found.append(tuple(names))
        return metrics.Evaluation(names, *rest)

    monkeypatch.setattr(sweep, "Evaluation", record)
    return found


def short(protocol, method, seed=1, **grid):
    """A trial on the digits, of one step if it is trained."""
    options = {"epochs": [1]} if method == "dcp" else None
    (trial,) = plan_trials(protocol, ["dcp_mini"], [method], ["digits"], [1], [seed], options, **grid)
    return trial


def test_dcp_equals_the_head_of_dcp_zoo_train(few_digits, tmp_path):
    """And says what was tested, on which images."""
    trial = short("few-shot", "dcp", seed=3)
    result = sweep.run_trial(trial, Settings(tmp_path, device="cpu", save_heads="dcp"))
    assert [entry["stats"] for entry in result["results"]] == ["stored", "batch", "no_classifier"]
    assert {(e["target"], e["classes"], e["images"]) for e in result["results"]} == {("digits", "all", 10)}
    assert result["subset_sha256"] == subset_sha256(few_shot(few_digits("digits"), 1, 3).train)
    recipe = replace(METHODS["dcp"].recipe("dcp_mini", "digits", 1, "few-shot"), epochs=1)
    train_head(Run("dcp_mini", few_digits("digits"), 1, 3, recipe, torch.device("cpu")), tmp_path / "head")
    folders = tmp_path / "heads" / trial.head, tmp_path / "head"
    ours, theirs = (load_file(folder / "model.safetensors") for folder in folders)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_base_to_new_tests_both_halves_and_draws_as_for_all_classes(few_digits, tmp_path, tested):
    result = sweep.run_trial(short("base-to-new", "dcp"), Settings(tmp_path))
    assert {(e["classes"], e["images"]) for e in result["results"]} == {("base", 5), ("new", 5)}
    assert list(map("".join, dict.fromkeys(tested))) == ["01234", "56789"]
    base = [item for item in few_shot(few_digits("digits"), 1, 1).train if item.label < 5]
    assert result["subset_sha256"] == subset_sha256(base)


def test_a_trial_resumes_with_the_targets_that_are_left(few_digits, tmp_path, monkeypatch, tested):
    """After a stop of the training, and after an error in a target, with the same results as without. Targets have
    class names of their own."""
    there = {"eurosat": True}

    def load(name, root=None):
        if not there.get(name, True):
            raise ZooError(f"{name} is missing")
        split = few_digits(name)
        return replace(split, classnames=[f"no {c}" for c in split.classnames]) if name == "eurosat" else split

    monkeypatch.setattr(plan, "read_split", load)
    monkeypatch.setattr(plan, "list_datasets", lambda: ["digits", "dtd", "eurosat"])
    options = {"datasets": ["digits"], "shots": [1], "seeds": [1], "options": {"epochs": [2]}}
    (trial,) = plan_trials("cross-dataset", methods=["dcp"], **options)
    whole, settings = Settings(tmp_path / "whole"), Settings(tmp_path / "resumed")
    steps = Count(monkeypatch, TrainingState, "step")
    assert sweep.execute(trial, whole).state == "done"
    trained = steps.calls
    assert {names[3] for names in tested} == {"3", "number 3", "no 3"}
    with monkeypatch.context() as patch:
        patch.setattr("dcp_zoo.training.run.TrainingState", partial(StoppedState, 1))
        with pytest.raises(KeyboardInterrupt):
            sweep.execute(trial, settings)
    there["eurosat"] = False
    assert sweep.execute(trial, settings).message == "eurosat is missing"
    assert steps.calls == 2 * trained  # none twice
    there["eurosat"] = True
    monkeypatch.setattr(sweep, "train_head", lambda *args, **options: pytest.fail("trained again"))
    tested.clear()
    event = sweep.execute(trial, settings)
    assert event.state == "done", event.message
    assert {names[3] for names in tested} == {"no 3"}
    before, after = (store.results(each.output)[trial.key] for each in (whole, settings))
    assert after["results"] == before["results"]
    assert (after.keys(), after["info"].keys()) == (before.keys(), before["info"].keys())
    assert not [*(tmp_path / "resumed" / "unfinished").iterdir()]


COMMAND = ("benchmark", "few-shot")
TRIALS = plan_trials("few-shot", methods=["zero-shot", "dcp"], datasets=["dtd"], shots=[1, 2], seeds=[1, 2])


@pytest.fixture
def fake(monkeypatch):
    """Trials that take no time, and the list of those that ran. Seed 2 of 1 shot fails while `broken`."""
    ran = []

    def run_trial(trial, settings, **kwargs):
        ran.append(trial.key)
        if fake_state["broken"] and (trial.shots, trial.seed) == (1, 2):
            raise RuntimeError("out of memory [/]")
        return made_up_result(trial)

    fake_state = {"broken": False, "ran": ran}
    monkeypatch.setattr("dcp_zoo.benchmark.sweep.run_trial", run_trial)
    monkeypatch.setattr(plan, "read_split", no_images)
    return fake_state


def test_a_failing_trial_is_recorded_and_tried_again(tmp_path, fake, run):
    pytest.importorskip("pandas")
    fake["broken"] = True
    command = (*COMMAND, "--methods", "dcp", "--datasets", "dtd", "--shots", "1", "--output", tmp_path)
    err = run.refused(*command, "--data-root", tmp_path)
    assert "Error: 1 of 3 trials failed; the same command tries them again" in err
    assert "out of memory [/]" in err
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 1 + 2
    failed = "few-shot.dcp_mini.dtd-1shot-seed2.dcp"
    assert store.failures(tmp_path) == {failed: "RuntimeError: out of memory [/]"}
    assert "Traceback" in json.loads(next((tmp_path / "failed").iterdir()).read_text())["traceback"]
    assert len(store.done(tmp_path)) == 2
    fake["broken"] = False
    fake["ran"].clear()
    assert "52.0 ± 1.0" in run.ok(*command, "--data-root", tmp_path)
    assert (fake["ran"], store.failures(tmp_path)) == ([failed], {})


def test_results_of_another_sweep_are_rejected(tmp_path, fake, monkeypatch):
    sweep.sweep(TRIALS, Settings(tmp_path))
    with pytest.raises(ZooError, match=r"made with precision float32, not bfloat16: choose another --output"):
        sweep.sweep(TRIALS, Settings(tmp_path, precision="bfloat16"))
    few, more = (plan_trials("cross-dataset", methods=["zero-shot"], targets=t) for t in (["dtd"], ["dtd", "eurosat"]))
    sweep.sweep(few, Settings(tmp_path / "few"))
    with pytest.raises(ZooError, match="has no test on eurosat: choose another --output"):
        sweep.sweep(more, Settings(tmp_path / "few"))
    monkeypatch.setattr(plan, "weights_id", lambda model: "other")
    with pytest.raises(ZooError, match=r"made with weights \w+, not other"):
        sweep.sweep(TRIALS, Settings(tmp_path))
    path = tmp_path / "results" / f"{TRIALS[0].key}.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(ZooError, match=r"zero-shot.json cannot be read .* Delete it"):
        sweep.sweep(TRIALS, Settings(tmp_path))


def test_a_later_sweep_sees_that_the_folder_has_changed(tmp_path, flowers):
    trials = plan_trials("few-shot", methods=["zero-shot"], datasets=["folder"])
    settings = Settings(tmp_path / "out", flowers, device="cpu")
    assert not sweep.sweep(trials, settings)
    Image.new("RGB", (60, 60), "red").save(next((flowers / "rose").iterdir()))
    with pytest.raises(ZooError, match="was made with folder .*: choose another --output"):
        sweep.sweep(trials, settings)


def work(output: Path) -> None:
    """Sweep `TRIALS`, each of which takes a moment."""

    def run_trial(trial, settings, **kwargs):
        with (output / "log").open("a") as log:
            log.write(f"{trial.key}\n")
        time.sleep(0.2)
        return made_up_result(trial)

    sweep.run_trial, plan.read_split = run_trial, no_images
    assert sweep.sweep(TRIALS, Settings(output)) == {}


def test_a_killed_sweep_resumes_and_another_in_its_folder_is_refused(tmp_path):
    """No trial that was finished runs again."""

    def runs() -> list[str]:
        return (tmp_path / "log").read_text().split() if (tmp_path / "log").exists() else []

    first, second = (multiprocessing.get_context("fork").Process(target=work, args=[tmp_path]) for _ in range(2))
    first.start()
    until(lambda: len(runs()) == 3)
    with pytest.raises(ZooError, match="Another process .*: wait, or choose another --output"):
        sweep.sweep(TRIALS, Settings(tmp_path))
    first.kill()
    first.join()
    lost = runs()[-1]
    assert store.done(tmp_path) == set(runs()) - {lost}
    second.start()
    second.join(60)
    assert second.exitcode == 0
    assert sorted(runs()) == sorted([lost, *(trial.key for trial in TRIALS)])
    assert store.done(tmp_path) == set(runs())


def test_missing_targets_are_found_before_anything_is_trained(tmp_path, run):
    """All in one error, also by a dry run."""
    grid = ("--methods", "zero-shot", "--datasets", "digits", "--output", tmp_path / "x")
    command = ("benchmark", "cross-dataset", *grid)
    assert run.refused(*command).count("needs a data root: pass --data-root DIR") == 11
    for options in ((), ("--dry-run",)):
        err = run.refused(*command, "--data-root", tmp_path, *options)
        assert (err.count("Error:"), err.count(" does not exist")) == (1, 11)
        assert "choose others by --datasets and --targets" in err
        assert not (tmp_path / "x" / "results").exists()
    assert "1 trials, 1 to run" in run.ok(*command, "--dry-run"), "without a folder nothing is looked for"
    assert "1 trials, 1 to run" in run.ok(*command, "--targets", "digits", "--data-root", tmp_path, "--dry-run")
    assert "--shots takes" in run.refused(*command, "--shots", "1,two")


def test_ctrl_c_stops_cleanly(tmp_path, fake, monkeypatch, run):
    pytest.importorskip("pandas")
    data = ("--datasets", "dtd", "--data-root", tmp_path)
    command = (*COMMAND, "--methods", "dcp", *data, "--shots", "1", "--output", tmp_path)
    run.ok(*command, "--seeds", "1")
    monkeypatch.setattr("dcp_zoo.benchmark.sweep.run_trial", Mock(side_effect=KeyboardInterrupt))
    code, _, err = run(*command)
    assert (code, "Finished trials are kept" in err) == (130, True)
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
    refuse = Mock(side_effect=OSError(errno.EACCES, "Permission denied"))
    monkeypatch.setattr("dcp_zoo.files.TemporaryFile", refuse)
    monkeypatch.setattr("dcp_zoo.files.Path.touch", refuse)  # of a lock
    err = run.refused(*command.split())
    assert "Cannot write to out" in err
    assert "Permission denied. Choose another --output" in err


@pytest.mark.parametrize("call", ["os.fsync", "Path.touch"])
def test_a_full_folder_stops_the_sweep_with_nothing_half_written(tmp_path, fake, monkeypatch, call):
    assert sweep.sweep(TRIALS[:1], Settings(tmp_path)) == {}
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}

    with monkeypatch.context() as broken:
        broken.setattr(f"dcp_zoo.files.{call}", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(ZooError, match=r"Cannot write .*[Cc]hoose another --output"):
            sweep.sweep(TRIALS, Settings(tmp_path))
    files = {path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"}
    assert {path: path.read_bytes() for path in files} == before
    assert sweep.sweep(TRIALS, Settings(tmp_path)) == {}
    assert len(store.done(tmp_path)) == len(TRIALS)


def test_no_group_of_a_folder_is_in_two_parts(tmp_path, monkeypatch):
    monkeypatch.setenv("DCP_ZOO_CACHE", str(tmp_path / "cache"))
    for i, path in enumerate(sample_images()):
        photo = load_image(path)
        (folder := tmp_path / "photos" / f"class {i % 2}").mkdir(parents=True, exist_ok=True)
        for j, size in enumerate((200, 150, 100)):
            photo.resize((size, size)).save(folder / f"{i} {j}.png")
    split = plan.read_split("folder", tmp_path / "photos")
    parts = [{Path(item.path).name[0] for item in part} for part in (split.train, split.val, split.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 6


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Two training, one validation and four test images of each of three classes. They are noise, so that what fits one
    labelling of them best fits another worse."""
    folder, rng, items = tmp_path_factory.mktemp("noise"), np.random.default_rng(2), []
    for i in range(21):
        path = folder / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((32, 32)).save(path)
        items.append(Item(str(path), path.name, i % 3))
    return Split("digits", ["red", "blue", "green"], items[:6], items[6:9], items[9:])


@pytest.fixture
def fitted(clip, split, monkeypatch, tmp_path):
    """A function (permuted) -> the logits of the test images and `info`, of a whole few-shot trial of GDA."""
    logits: list[torch.Tensor] = []
    top1 = sweep_module.METRICS["top1"]
    monkeypatch.setattr(sweep_module, "plain_clip", lambda model: clip)
    monkeypatch.setitem(sweep_module.METRICS, "top1", lambda x, labels: logits.append(x) or top1(x, labels))

    def run(permuted):
        test = [item._replace(label=(item.label + 1) % 3) for item in split.test] if permuted else split.test
        monkeypatch.setattr(plan, "read_split", lambda *args: replace(split, test=test))
        sweep_module.shared_images.cache_clear()
        logits.clear()
        (trial,) = plan_trials("few-shot", ["dcp_mini"], ["gda"], ["digits"], [2], [1])
        result = sweep_module.run_trial(trial, Settings(tmp_path / str(permuted), device="cpu"))
        assert len(logits) == len(result["results"])
        return torch.stack(logits), result["info"]

    yield run
    sweep_module.shared_images.cache_clear()


def test_labels_of_test_images_change_nothing(fitted):
    """A method gets training and validation images alone; what it gets is the same for all."""
    (logits, info), (permuted, other) = fitted(permuted=False), fitted(permuted=True)
    assert torch.equal(permuted, logits)
    assert other == info


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_method_that_reads_them_is_found(fitted, monkeypatch, part):
    """If it is given the test images as its training or validation images."""
    subset = sweep_module.TrialImages.subset

    def leaking(self, *args):
        return replace(subset(self, *args), **{part: self.split("digits").test})

    monkeypatch.setattr(sweep_module.TrialImages, "subset", leaking)
    assert not torch.equal(fitted(permuted=False)[0], fitted(permuted=True)[0])
