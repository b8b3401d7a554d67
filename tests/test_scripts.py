"""Scripts: the speed benchmark, which compares logits, and whose grid has what the page states; the backend
for Label Studio, with a stand-in for it (hub/label_studio/check.py tries the real one); methods on given
image features."""

import importlib
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import doc_tables
import given_features
import numpy as np
import pandas as pd
import paper
import pytest
import speed
import torch
import which_head
from helpers import FEW_STEPS, read_csv
from shared import CommandLine
from starlette.testclient import TestClient
from torch.nn import functional as F

from dcp_zoo.data import Item
from dcp_zoo.data.packaged import sample_images
from dcp_zoo.training.methods.linear import gaussian_discriminant

BENCHMARKS = Path(speed.__file__).parent


@pytest.mark.scripts
@pytest.mark.parametrize(("task", "variants"), [("training", ("plain", "ours")), ("inference", speed.INFERENCE)])
def test_processes_run_every_variant_and_batch_size(task, variants):
    """The script ends by itself if logits differ."""
    case = speed.Case(task, "dcp_mini", 2, (1, 2), variants)
    rows = list(speed.compare(case, threads=1, repeats=1))
    assert [(row["batch"], row["variant"]) for row in rows] == [(n, variant) for n in (1, 2) for variant in variants]
    assert all(row["seconds"] > 0 and row["peak_mb"] > 50 for row in rows)


def test_every_benchmark_imports():
    """Most of them run for hours, and rarely: a name that has changed in the package would go unnoticed."""
    for path in BENCHMARKS.glob("*.py"):
        importlib.import_module(path.stem)


def test_the_grid_covers_every_statement():
    cells = [(*case[:3], batch, variant) for case in speed.GRID for batch in case.batches for variant in case.variants]
    rows = pd.DataFrame(cells, columns=speed.COLUMNS[:5]).assign(seconds=1.0, peak_mb=100.0)
    rows.seconds += rows.index
    for text, (_, figure) in doc_tables.SPEED.items():
        assert figure(*doc_tables.speed_runs(rows, "dcp_vitb16")) > 0, text


backend = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "hub/label_studio/backend.py")))
CONFIG = (
    '<View><Image name="photo" value="$picture"/><Choices name="class" toName="photo">'
    '<Choice value="cat" alias="Minka"/><Choice value="bird of prey"/><Choice value="lake"/></Choices></View>'
)


class FakeStudio:
    """Annotations by the address of an image, which is its path; those that are no files cannot be read."""

    answers: dict[str, str] = {}
    asked = 0

    def annotations(self, project: str, question: object) -> dict[str, str]:
        self.asked += 1
        return dict(self.answers)

    def images(self, addresses: list) -> dict[str, str]:
        return {address: address for address in addresses if address and Path(address).is_file()}


@pytest.mark.scripts
def test_it_learns_from_annotations():
    studio, project = FakeStudio(), "7.1700000000"
    client = TestClient(backend.app_of(backend.Backend(studio, "dcp_mini"), ["localhost"]), "http://localhost")

    def setup(config: str = CONFIG) -> str:
        response = client.post("/setup", json={"project": project, "schema": config})
        return response.json().get("model_version") or response.json()["detail"]

    def predict(*images: str | None) -> list[tuple]:
        """The version, answer and score of each image; () without a prediction."""
        tasks = [{"id": i, "data": {"picture": image}} for i, image in enumerate(images)]
        response = client.post("/predict", json={"project": project, "label_config": CONFIG, "tasks": tasks})
        rows = [row and (row["model_version"], row["result"][0], row["score"]) for row in response.json()["results"]]
        return [row and (row[0], row[1]["value"]["choices"][0], row[2]) for row in rows]

    cat, _, _, osprey, lake, flowers = sample_images()
    version = setup()
    (before, answer, score), (_, bird, _), *unreadable = predict(cat, osprey, "/missing.jpg", None)
    assert (before, answer, bird) == (version, "Minka", "bird of prey")
    assert not any(unreadable)
    assert version.startswith("annotations: 0, ")
    assert 1 / 3 < score <= 1

    studio.answers = {cat: "bird of prey", osprey: "Minka", flowers: "Minka", "/missing.jpg": "lake"}
    assert setup() == version, "nobody said that annotations have changed"
    client.post("/webhook", json={"action": "ANNOTATION_CREATED", "project": {"id": 7}})
    assert (after := setup()).startswith("annotations: 4, ")
    assert [row[:2] for row in predict(cat, osprey, lake)] == [
        (after, "bird of prey"),
        (after, "Minka"),
        (after, "lake"),  # without an image that can be read, by its name
    ]
    assert studio.asked == 2
    assert setup("<View>").startswith("The labeling configuration")


def test_the_latest_annotation_counts():
    def annotation(answer: str, day: int, cancelled: bool = False) -> dict:
        part = {"from_name": "class", "value": {"choices": [answer]}}
        return {"updated_at": f"2026-01-0{day}", "was_cancelled": cancelled, "result": [{"type": "relation"}, part]}

    question = backend.Question.of(CONFIG)
    assert (question.field, question.names["Minka"]) == ("picture", "cat")
    given = [annotation("Minka", 3), annotation("lake", 2), annotation("lake", 4, cancelled=True)]
    assert question.answer({"annotations": given}) == "Minka"
    assert question.answer({"annotations": [annotation("removed class", 1)]}) is None


def test_the_papers_experiments_on_image_features(tmp_path, monkeypatch):
    """Of four classes: at home, in another style, and two of them known by their names alone. It resumes."""
    styles, rng = ("PACS, photos", "PACS, sketches"), np.random.default_rng(0)
    monkeypatch.setattr(paper, "RESULTS", tmp_path)
    monkeypatch.setattr(paper, "STYLES", styles)
    monkeypatch.setattr(paper, "IMAGES", 8)
    monkeypatch.setattr(paper, "TRAINED", [("domain-shift", styles[0]), ("base-to-new", styles[0])])
    labels, classes = np.repeat(np.arange(4), 10), np.eye(4, 8, dtype=np.float32)
    for shift, name in enumerate(styles):
        arrays = {"names": [*"abcd"], "text_weight": 10 * classes, "text_lengths": np.ones(4, np.float32)}
        arrays["train_seconds"] = 0.0
        for part, views in (("train", 2), ("test", 1)):
            x = classes[labels] + 0.1 * rng.normal(size=(views, 40, 8)) + shift * np.eye(8)[7]
            x = (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)
            more = {f"{part}_{name}": x[..., ::-1].copy() for name in ("stem", "stage")}
            arrays |= {f"{part}_x": x, f"{part}_labels": labels} | more
        np.savez(tmp_path / f"{name}.npz", **arrays)
    for _ in range(2):
        paper.features(tmp_path, draws=1)
        rows = pd.read_csv(tmp_path / "transfer.csv", keep_default_na=False)
        found = rows[rows.images_per_class == 8].set_index(["protocol", "method", "reading", "target"]).top1
        assert found["domain-shift", "text-probe", "text probes", styles[0]] > 95
        assert found["domain-shift", "text-probe", "text probes", styles[1]] > 90
        assert (
            found["base-to-new", "text-probe", "text probes", "new"]
            == found["base-to-new", "zero-shot", "", "new"]
            > 90
        )
        assert len(found) == 5 * 2 + 2 * 2 + 2 + 2 * 2


@FEW_STEPS
def test_what_cmpa_is_worth_is_measured_once(tmp_path, monkeypatch):
    """With the number of trained parameters."""
    items = [Item(path, path, label) for path, label in zip(sample_images(), (0, 1, 0, 0, 1, 1), strict=True)]
    pool = ["animal", "thing"], items, items
    monkeypatch.setattr(paper, "RESULTS", tmp_path)
    monkeypatch.setattr(paper, "IMAGES", 2)
    monkeypatch.setattr(paper, "REPORTING", {"photos": None})
    monkeypatch.setattr(paper, "SETS", {"photos": lambda data, folder: pool})
    once = {"epochs": 1}
    prompted = (("zero-shot", {}), ("ivlp", once), ("dcp", once | {"coupling": "none"}))
    monkeypatch.setattr(paper, "PROMPTED", prompted)
    for _ in range(2):
        paper.coupling(tmp_path, draws=1)
        rows = pd.read_csv(tmp_path / "coupling.csv", keep_default_na=False)
        assert [*rows.changes[:3]] == ["", "epochs=1", "epochs=1, coupling=none"]
        assert [*rows.trained_parameters[:3]] == [0, 6 * 4 * (256 + 192), 16 * (256 + 192)]
        assert {*rows.test_images} == {6}
        assert len(rows) == 2 * 3
    monkeypatch.setattr(paper, "STYLES", ("photos",))
    monkeypatch.setattr(paper, "TRAINED", [(paper.SHIFT, "photos")])
    for _ in range(2):
        paper.coupling_elsewhere(tmp_path, draws=1)
        rows = pd.read_csv(tmp_path / "coupling_elsewhere.csv", keep_default_na=False)
        assert [*rows.method] == ["zero-shot", "ivlp", "dcp"]
        assert ([*rows.target], [*rows.test_images]) == (["photos"] * 3, [6] * 3)


def test_which_head_is_named(monkeypatch):
    """Of two heads of which one is always right, and a burst of which is one image."""
    monkeypatch.setattr(which_head, "CHOICES", 20)
    right = np.arange(40) % 2 > 0
    always = np.ones(40, bool)
    difference, better, worse, alarms, *_ = which_head.measured(always, right, 40, 1)
    assert (difference, better, worse) == (50, 100, 0)
    assert alarms < 25
    assert which_head.measured(right, always, 40, 1)[:2] == (-50, 100)
    assert len(which_head.compared(always, right, 4).gains) == 40


E, C = 16, 3
ABLE = {"zero-shot", "linear-probe", "tip-adapter", "tip-adapter-f", "proker", "ss-text", "gda", "text-probe"}
ABLE |= {"lp-plus-plus", "clap", "taskres", "clip-adapter"}


@pytest.fixture
def folder(tmp_path):
    """Noisy features of three classes; the text features are their centres."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(C, E))
    arrays = {"classnames": np.array(["cat", "dog", "bus"]), "text_vector": centres.astype(np.float16)}
    for part, n in (("train4", 12), ("test", 60)):
        labels = np.arange(n) % C
        arrays |= {f"{part}_label": labels, f"{part}_vector": centres[labels] + rng.normal(size=(n, E))}
    np.savez(tmp_path / "caltech101.npz", **arrays)
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys):
    return CommandLine(monkeypatch, capsys, given_features.app)


def sweep(run, folder, *options):
    return run(folder, "--model", "dcp_vitb32", "--output", folder / "sweep", *options)


def test_every_method_that_needs_features_only(folder, run):
    """Without further options: the files have one dataset, 4 shots and one draw."""
    code, _, err = sweep(run, folder)
    rows = {row["method"]: row for row in read_csv(folder / "sweep" / "results.csv")}
    assert (code, set(rows)) == (0, ABLE), err
    arrays = np.load(folder / "caltech101.npz")
    test = F.normalize(torch.from_numpy(arrays["test_vector"]).float(), dim=-1)
    text = F.normalize(torch.from_numpy(arrays["text_vector"]).float(), dim=-1)
    expected = (test @ text.T).argmax(-1).numpy() == arrays["test_label"]
    assert float(rows["zero-shot"]["top1"]) == round(100 * expected.mean(), 2)


@pytest.mark.scripts
def test_image_features_alone_are_enough_for_gda(folder, run):
    arrays = dict(np.load(folder / "caltech101.npz"))
    del arrays["text_vector"]
    np.savez(folder / "caltech101.npz", **arrays)
    for options, message in (("--methods=dcp", "dcp needs images.*choose from zero-shot"), ("--shots=2", "lack what")):
        code, out, err = sweep(run, folder, options)
        assert (code, (folder / "sweep").exists()) == (2, False)
        assert re.search(message, out + err), err
    assert sweep(run, folder, "--methods", "gda", "--set", "text=false")[0] == 0
    (row,) = read_csv(folder / "sweep" / "results.csv")
    train, test = (F.normalize(torch.from_numpy(arrays[f"{p}_vector"]).float(), dim=-1) for p in ("train4", "test"))
    weight, bias = gaussian_discriminant(train[None], torch.from_numpy(arrays["train4_label"]), C)
    hits = (test @ weight.T + bias).argmax(-1).numpy() == arrays["test_label"]
    assert float(row["top1"]) == round(100 * hits.mean(), 2)
