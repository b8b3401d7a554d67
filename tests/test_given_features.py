"""`benchmark --features`: methods on given image features."""

import csv
import json
import re
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dcp_zoo.methods.base import Task
from dcp_zoo.model.classifier import gaussian_discriminant

E, C = 16, 3


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


def sweep(run, folder, *options):
    base = ("benchmark", "few-shot", "--features", folder, "--models", "dcp_vitb32", "--datasets", "caltech101")
    return run(*base, "--output", folder / "sweep", *options)


def test_every_method_that_needs_features_only(folder, run):
    code, _, err = sweep(run, folder, "--shots", "4", "--seeds", "1")
    assert code == 0, err
    with (folder / "sweep" / "results.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"zero-shot", "linear-probe", "tip-adapter", "tip-adapter-f", "gda", "lp-plus-plus", "clap"}
    assert {row["weights"] for row in rows.values()} == {"features of dcp_vitb32"}

    arrays = np.load(folder / "caltech101.npz")
    test = F.normalize(torch.from_numpy(arrays["test_vector"]).float(), dim=-1)
    text = F.normalize(torch.from_numpy(arrays["text_vector"]).float(), dim=-1)
    expected = (test @ text.T).argmax(-1).numpy() == arrays["test_label"]
    assert float(rows["zero-shot"]["top1"]) == round(100 * expected.mean(), 2)


def test_image_features_alone_are_enough_for_gda(folder, run):
    arrays = dict(np.load(folder / "caltech101.npz"))
    del arrays["text_vector"]
    np.savez(folder / "caltech101.npz", **arrays)
    options = ("--shots", "4", "--seeds", "1", "--methods", "gda")
    assert sweep(run, folder, *options, "--set", "text=false")[0] == 0
    with (folder / "sweep" / "results.csv").open() as file:
        (row,) = csv.DictReader(file)
    train, test = (F.normalize(torch.from_numpy(arrays[f"{p}_vector"]).float(), dim=-1) for p in ("train4", "test"))
    weight, bias = gaussian_discriminant(train, torch.from_numpy(arrays["train4_label"]), C)
    hits = (test @ weight.T + bias).argmax(-1).numpy() == arrays["test_label"]
    assert float(row["top1"]) == round(100 * hits.mean(), 2)
    code, _, err = sweep(run, folder, *options)
    assert (code, "no text_vector for cat" in err) == (2, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--methods", "dcp"), "dcp needs images.*choose from zero-shot"),
        (("--shots", "2", "--seeds", "1"), "has no train2_vector"),
        (("--shots", "4", "--seeds", "1,2"), "pass --seeds 1"),
        (("--datasets", "dtd", "--shots", "4", "--seeds", "1"), "no file .*dtd.npz.*has caltech101"),
    ],
)
def test_errors(folder, run, options, message):
    code, out, err = sweep(run, folder, *options)
    assert code == 2
    assert re.search(message, out + err), err


def test_the_model_must_be_named(folder, run):
    code, _, err = run("benchmark", "few-shot", "--features", folder, "--output", folder / "sweep")
    assert (code, "such as --models dcp_vitb32" in err) == (2, True)


def test_test_labels_decide_nothing(folder, run):
    """With permuted test labels, every method reports the same choices; a task holds no test images at all."""
    sweep(run, folder, "--shots", "4", "--seeds", "1")
    before = {path.name: json.loads(path.read_text())["info"] for path in (folder / "sweep" / "results").iterdir()}
    arrays = dict(np.load(folder / "caltech101.npz"))
    arrays["test_label"] = arrays["test_label"][::-1]
    other = folder / "other"
    other.mkdir()
    np.savez(other / "caltech101.npz", **arrays)
    sweep(run, other, "--shots", "4", "--seeds", "1")
    after = {path.name: json.loads(path.read_text())["info"] for path in (other / "sweep" / "results").iterdir()}
    assert before == after
    assert {part.name for part in fields(Task)}.isdisjoint({"test", "split"})
