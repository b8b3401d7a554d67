"""`benchmarks/given_features.py`: methods on given image features."""

import re

import given_features
import numpy as np
import pytest
import torch
from helpers import read_csv
from shared import CommandLine
from torch.nn import functional as F

from dcp_zoo.training.methods.gda import gaussian_discriminant

E, C = 16, 3
ABLE = {"zero-shot", "linear-probe", "tip-adapter", "tip-adapter-f", "proker", "ss-text", "gda", "text-probe"}
ABLE |= {"lp-plus-plus", "clap"}


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
def test_other_features_are_not_mixed_in_and_labels_are_checked(folder, run):
    assert sweep(run, folder, "--methods", "zero-shot")[0] == 0
    arrays = dict(np.load(folder / "caltech101.npz"))
    np.savez(folder / "caltech101.npz", **(arrays | {"test_vector": arrays["test_vector"][::-1]}))
    code, _, err = sweep(run, folder, "--methods", "zero-shot")
    assert (code, "was made with other images of caltech101: choose another --output" in err) == (2, True), err
    other, labels = folder / "other", arrays.pop("test_label")
    other.mkdir()
    np.savez(other / "caltech101.npz", **arrays, test_label=labels + 1)
    assert "0 to 2" in sweep(run, other, "--methods", "linear-probe")[2]


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
    weight, bias = gaussian_discriminant(train, torch.from_numpy(arrays["train4_label"]), C)
    hits = (test @ weight.T + bias).argmax(-1).numpy() == arrays["test_label"]
    assert float(row["top1"]) == round(100 * hits.mean(), 2)
