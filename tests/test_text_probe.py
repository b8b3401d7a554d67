"""The text probe: its equations, its way through checkpoints and states, new classes, and how it is
fitted."""

import doctest
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib import import_module
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import behind_the_gate, close, copied, loud
from safetensors.torch import load_file
from scipy.optimize import minimize, minimize_scalar
from shared import CFG, build_tiny_clip
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.answers import in_distribution_score
from dcp_zoo.backbone.clip import FrozenCLIP, linear_of
from dcp_zoo.backbone.inputs import Pixels
from dcp_zoo.backbone.towers.open_clip import EMBEDDING, HIDDEN
from dcp_zoo.data import Item
from dcp_zoo.data.packaged import everyday_pictures
from dcp_zoo.errors import ZooError
from dcp_zoo.features.extract import FeatureExtractor
from dcp_zoo.features.loader import ImageLoader
from dcp_zoo.features.photos import Photos
from dcp_zoo.features.table import FeatureTable
from dcp_zoo.features.views import MIRRORED, PLAIN
from dcp_zoo.heads.dcp import DCP
from dcp_zoo.heads.head import load_head
from dcp_zoo.heads.kinds import PromptHead
from dcp_zoo.probe import ReadingFeatures, fit_on_features, folds
from dcp_zoo.probe.candidates import Configuration, TrainingSet, fit_candidates
from dcp_zoo.probe.stacking import class_bias, cross_validate, prior_weights
from dcp_zoo.training.methods.text_probe import fit_probe
from dcp_zoo.training.task import ProbeInputs
from dcp_zoo.zoo.factory import create_model, create_transform

NAMES = ["bus", "cat", "kite"]
NEVER = torch.finfo(torch.float16).min  # a threshold that rejects nothing


def images(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def built(golden):
    """A DCP with stored statistics, without a text probe and with one."""
    plain = loud(DCP(FrozenCLIP(build_tiny_clip(golden), pretrained_cfg=CFG), NAMES, n_ctx=2)).eval()
    plain.store_stats(images(4))
    model = copied(plain)
    with torch.no_grad():
        read = [
            ReadingFeatures(each.encode(images(12))[None], each.linear(), each.parts)
            for each in model.available_readings
        ]
        model.text_probe, _ = fit_on_features(model.classes, torch.arange(12) % 3, read)
    model.text_probe.text_scale.fill_(0.5)
    model.text_probe.threshold.fill_(NEVER)
    return plain, model


@pytest.fixture
def plain(built):
    return copied(built[0])


@pytest.fixture
def model(built):
    return copied(built[1])


def text_logits(model: DCP, x: Tensor) -> Tensor:
    """The mean of the method's own logits and zero-shot CLIP's."""
    scale, (own, plain) = (
        model.encoder.clip.logit_scale.exp(),
        (reading.encode(x) for reading in model.available_readings),
    )
    zero_shot = model.encoder.zero_shot_classifier(model.classnames)
    return scale * (own @ model.encode_text().T + plain[:, : own.shape[1]] @ zero_shot.T) / 2


@torch.no_grad()
def test_its_equations(model):
    """By every path to the logits."""
    x, probe = images(5, 1), model.text_probe
    f, text = model.encode_image(x), text_logits(model, x)
    assert close(f.norm(dim=1), torch.ones(5))
    probe.bias.copy_(torch.tensor([0.3, -0.2, 0.1]))
    assert probe.weight.abs().max() > 0.1
    expected = 0.5 * text + f @ probe.weight.T + probe.bias
    features = model.forward_features(x)
    for logits in (model(x), model.fuse()(x), model.forward_head(features), model.get_classifier()(features)):
        assert close(logits, expected, 1e-5)


@torch.no_grad()
def test_a_gate_goes_with_the_head(plain, model, tiny_clip, tmp_path):
    """By every path to the logits, in a checkpoint and a state; of classes without images it says
    nothing."""
    x, before = images(5, 1), model(images(5, 1))
    features, probe = model.encode_image(x), model.text_probe
    probe.spread.mul_(model.distances(features).mean() / 1.2)
    probe.gate = torch.tensor([1.1, 1.3, 0.25])
    expected = behind_the_gate(before, 0.5 * text_logits(model, x), model.distances(features), 1.1, 0.2).exp()
    assert not close(expected, before.softmax(-1), 1e-3)
    model.save_pretrained(tmp_path)
    loaded = load_head(DCP(tiny_clip, NAMES, n_ctx=2).eval(), tmp_path)
    plain.load_state_dict(model.state_dict())
    model.stats = "stored"
    by_layer = model.get_classifier()(features)
    for found in (model(x), model.fuse()(x), model.forward_head(features), by_layer, loaded(x), plain(x)):
        assert close(found.softmax(-1), expected, 1e-3)
    model.set_classnames(["zebra", "lion"])
    assert close(model(x), 0.5 * text_logits(model, x), 1e-4)
    assert close(model.fuse()(x), model(x), 1e-4)
    model.stats = "batch"
    model.set_classnames(NAMES)
    batch = model(x)
    probe.gate = probe.gate[:0]
    assert not close(batch.softmax(-1), model(x).softmax(-1), 1e-3)


@torch.no_grad()
def test_a_class_without_images_is_its_text(model):
    x, before = images(5, 1), model(images(5, 1))
    model.set_classnames(["kite", "zebra", "bus"])
    text = 0.5 * text_logits(model, x)[:, 1]
    wanted = torch.stack([before[:, 2], text, before[:, 0]], 1)
    assert close(model(x), wanted)
    assert close(model.fuse()(x), wanted)
    model.set_classnames(["kite", "bus"])
    assert close(model(x), before[:, [2, 0]])


def test_a_state_without_a_text_probe_takes_it_away(plain, model):
    model.load_state_dict(plain.state_dict())
    assert model.text_probe is None
    with pytest.raises(ZooError, match="cannot reject .* it has no text probe. Train one that can: dcp-zoo train.$"):
        model.predict(images(2), reject=True)


# ------------------------------------------------------------------------------------------------------- the threshold


def scores(model: DCP, x: Tensor) -> Tensor:
    """Minus the entropy - four distances, by hand."""
    probe, f = model.text_probe, model.encode_image(x)
    width = model.encoder.num_features  # of the own part, which distances leave out
    parts = sum(map(len, probe.widths))
    return score(model(x), to(f[:, width:], probe.means[:, width:]) * math.sqrt(parts / (parts - 1)) / probe.spread)


@pytest.fixture
def picky(model):
    """The model with a threshold that rejects two of five images."""
    with torch.no_grad():
        model.text_probe.spread.fill_(0.7)
        model.text_probe.threshold.copy_(scores(model, images(5, 1)).median() - 1e-4)
    return model


def cannot_reject(model: DCP, message: str) -> bool:
    """Whether a model refuses to reject images with this message, and a fused one has no threshold."""
    with pytest.raises(ZooError, match=message):
        model.predict(images(2), reject=True)
    return "threshold" not in model.fuse().info


@torch.no_grad()
def test_the_score_of_the_threshold(picky, tmp_path):
    """Its equation, also fused."""
    x = images(5, 1)
    wanted = scores(picky, x)
    fused = picky.fuse()
    for model in (picky, fused):
        distances = model.distances(model.encode_image(x))
        assert close(torch.from_numpy(in_distribution_score(model(x).numpy(), distances.numpy())), wanted, 1e-4)
    assert [name is None for name in picky.predict(x, reject=True)] == (wanted < picky.text_probe.threshold).tolist()


def test_it_outlives_changes_of_the_classes_and_a_checkpoint(picky, tiny_clip, tmp_path):
    x, threshold = images(5, 1), picky.rejection_threshold()
    answers = picky.predict(x, reject=True)
    assert answers.count(None) == 2
    picky.set_classnames(NAMES[::-1])
    assert picky.predict(x, reject=True) == answers
    picky.info = {"text_probe": {"thresholds": {"0.2": 9.0}, "text_scale": 1.0}}
    picky.save_pretrained(tmp_path)
    loaded = load_head(DCP(tiny_clip, picky.classnames, n_ctx=2), tmp_path).eval()
    assert loaded.predict(x, reject=True) == answers
    assert (loaded.rejection_threshold(), loaded.rejection_threshold(0.2)) == (threshold, 9)
    with pytest.raises(ZooError, match="no threshold for reject=1.0"):
        loaded.rejection_threshold(1.0)  # which is True's value
    assert loaded.fuse().info["threshold"] == threshold


def test_it_needs_images_of_each_class(picky, tiny_clip, tmp_path):
    """A checkpoint of other classes has exact logits, and no threshold."""
    answers, classes = picky.predict(images(5, 1), reject=True), ["kite", "zebra", "bus"]
    picky.save_pretrained(tmp_path / "whole")
    picky.info = {"text_probe": {"thresholds": {"0.05": 1.0}, "text_scale": 1.0}}
    picky.set_classnames(classes)
    message = "has seen no image of zebra, .*omit --classes.*train it again"
    assert cannot_reject(picky, message)
    assert cannot_reject(copied(picky), message)
    assert cannot_reject(load_head(DCP(tiny_clip, classes, n_ctx=2), tmp_path / "whole").eval(), message)
    picky.save_pretrained(tmp_path / "new")
    state = load_file(tmp_path / "new" / "model.safetensors")
    assert [name for name, t in state.items() if "classifier" in name and t.dtype == torch.half] == ["classifier.means"]
    loaded = load_head(DCP(tiny_clip, classes, n_ctx=2), tmp_path / "new").eval()
    with torch.no_grad():
        assert torch.equal(loaded(images(5, 1)), picky(images(5, 1)))
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dcp"]["text_probe"] == {"text_scale": 1.0}
    picky.set_classnames(NAMES)
    assert picky.predict(images(5, 1), reject=True) == answers


# ------------------------------------------------------------------------------------------- fitting, written plainly

TEXTS, STRENGTHS = (1.0, 0.5, 0.0), (0.25, 0.5, 1.0, 2.0)
REGRESSIONS = (math.inf, 1.0, 0.1, 0.03, 0.01, 0.003, 0.001)
EACH = len(REGRESSIONS) + len(STRENGTHS)


class Plain(NamedTuple):
    """K candidates: their logits are `texts` (K,) times the scaled text logits, and a linear function of the
    features by `weight` (K, C, W) and `bias` (K, C); the class means (C, W) that they are fitted with."""

    texts: Tensor
    weight: Tensor
    bias: Tensor
    means: Tensor

    def logits(self, z: Tensor, features: Tensor) -> Tensor:
        """Of each candidate (K, m, C)."""
        added = torch.einsum("mw,kcw->kmc", features, self.weight) + self.bias[:, None]
        return self.texts[:, None, None] * z + added


def plain_candidates(views: Tensor, widths: tuple[int, ...], labels: Tensor, text: tuple, inside: int = 0) -> Plain:
    """Fitted on features (V, n, W), to convergence: text (C, E) and (C,) is scaled. The last parts are from
    inside."""
    x, y, classes = views.flatten(0, 1).double(), labels.repeat(len(views)), len(text[0])
    z = F.linear(x[:, : widths[0]], *(t.double() for t in text))
    seen, n = torch.bincount(y, minlength=classes) > 0, len(labels)
    means = torch.stack([x[y == c].mean(0) if seen[c] else 0 * x[0] for c in range(classes)])
    each = (n / (seen.sum() * torch.bincount(y, minlength=classes).clamp(min=1)))[y]  # the same for each class
    parts, found = torch.arange(sum(widths)).split(widths), []
    outer = parts[: len(parts) - inside]
    families = [(seen_by, TEXTS) for seen_by in (outer, *((part,) for part in outer[1:]))]
    families += [((outer[-1], part), (1.0, 0.0)) for part in parts[len(outer) :]]
    for seen_by, strengths in families:
        columns, scale = torch.cat(seen_by), len(seen_by) ** -0.5
        rows, own = scale * x[:, columns], scale * means[:, columns]
        middle = own[seen].mean(0)
        m = (own - middle) * seen[:, None]
        gauss = m, -(m * (own + middle)).sum(1) / 2
        scores, start = (t[:, seen] - t[:, seen].mean(1, keepdim=True) for t in (F.linear(rows, *gauss), z))
        r = start.std() / scores.std()
        for s in strengths:
            of_seen = (s * z).masked_fill(~seen, -math.inf)
            d = torch.zeros_like(own)
            pairs = [(d := regression(rows, y, of_seen, each, p, d), 0 * gauss[1]) for p in REGRESSIONS]
            pairs += [(t * r * gauss[0], t * r * gauss[1]) for t in STRENGTHS]
            found += [(s, (0 * means).index_copy(1, columns, scale * w), b) for w, b in pairs]
    texts, weight, bias = zip(*found, strict=True)
    return Plain(torch.tensor(texts), torch.stack(weight).float(), torch.stack(bias).float(), means.float())


def regression(x: Tensor, y: Tensor, start: Tensor, each: Tensor, penalty: float, d: Tensor) -> Tensor:
    """D (C, W), with the least sum of weighted cross-entropies of start + x D^T, and penalty / 2 |D|^2."""

    def slope(flat):
        d = torch.from_numpy(flat).view_as(start.T @ x)
        log_p = (start + x @ d.T).log_softmax(-1)
        errors = log_p.exp() - F.one_hot(y, len(d))
        value = -(each * log_p[range(len(y)), y]).sum() + penalty / 2 * d.square().sum()
        return value.item(), ((each[:, None] * errors).T @ x + penalty * d).flatten().numpy()

    if math.isinf(penalty):
        return torch.zeros_like(d)
    return torch.from_numpy(minimize(slope, d.flatten().numpy(), jac=True, method="L-BFGS-B").x).view_as(d)


def plain_scale(z: Tensor, labels: Tensor) -> float:
    """a, with the least sum of cross-entropies of a z, and (log a)^2 / 2."""
    loss = lambda log: F.cross_entropy(math.exp(log) * z, labels, reduction="sum").item() + log**2 / 2  # noqa: E731
    return math.exp(minimize_scalar(loss, (-1, 0)).x)


def plain_folds(labels: Tensor) -> list[Tensor]:
    """Every fourth image of each class; the only one of a class is never left out, and of many the first
    alone."""
    place = torch.tensor([int((labels[:i] == y).sum()) for i, y in enumerate(labels)])
    counts = torch.bincount(labels)
    number = min(4, int(counts.max()))
    folds = [(place % number == fold) & (counts[labels] > 1) for fold in range(number)]
    return folds[:1] if len(labels) > 2000 else folds


class Evidence(NamedTuple):
    """Of the candidates (K,), by images that were left out; of these the logits, the text's, and distances
    to the nearest mean."""

    weights: Tensor
    logits: Tensor
    text: Tensor
    distances: Tensor


def plain_evidence(views: Tensor, widths: tuple[int, ...], labels: Tensor, text: tuple, inside: int = 0) -> Evidence:
    """As if of at most 16 images, of 64 between families; what reads the inside must be better by 1.5, and
    families below 1 % do not count. What is said of a fold is weighed by images of the others, of up to 100
    images by what was fitted without both."""
    outs, z = plain_folds(labels), F.linear(views[0, :, : widths[0]], *text)

    @cache
    def fitted(*left_out: int) -> tuple[Plain, float]:
        kept = ~sum(outs[i] for i in left_out).bool()
        scale = plain_scale(z[kept], labels[kept])
        return plain_candidates(views[:, kept], widths, labels[kept], times(scale, text), inside), scale

    def said(fold: int, *left_out: int) -> Tensor:
        candidates, scale = fitted(*left_out)
        return candidates.logits(scale * z[outs[fold]], views[0, outs[fold]])

    def weighed(folds: Mapping[int, tuple[int, ...]]) -> Tensor:
        losses = 0
        for fold, left_out in folds.items():
            of_each = [F.cross_entropy(each, labels[outs[fold]], reduction="sum") for each in said(fold, *left_out)]
            losses = losses + torch.stack(of_each)
        n, losses = sum(int(outs[fold].sum()) for fold in folds), losses.unflatten(0, (-1, EACH))
        shares = (-min(1, 16 / n) * losses).softmax(1)
        level = min(1, 64 / n) * (shares * losses).sum(1)
        level[len(level) - 2 * inside :] += 1.5
        families = (-level).softmax(0)
        families *= families > 0.01
        weights = (families / families.sum())[:, None].mul(shares).flatten()
        return sharper(views, widths[0], labels, times(plain_scale(z, labels), text)) * weights

    logits, texts, distances = [], [], []
    for fold, out in enumerate(outs):
        others = [other for other in range(len(outs)) if other != fold or (len(outs) == 1 and len(labels) > 100)]
        weights = weighed({o: tuple(sorted((fold, o))) if len(labels) <= 100 else (o,) for o in others})
        candidates, scale = fitted(fold)
        logits.append(torch.einsum("k,kmc->mc", weights, said(fold, fold)))
        texts.append((weights * candidates.texts).sum() * scale * z[out])
        distances.append(to(views[0, out], candidates.means) / math.sqrt(len(widths)))
    whole = weighed({fold: (fold,) for fold in range(len(outs))})
    return Evidence(whole, torch.cat(logits), torch.cat(texts), torch.cat(distances))


def sharper(views: Tensor, width: int, labels: Tensor, text: tuple) -> float:
    """What the logits are multiplied by: more for few images per class, and for text that explains them
    badly."""
    loss = F.cross_entropy(F.linear(views[0, :, :width], *text), labels).item() / math.log(len(text[0]))
    return 1 + 0.15 * (1 + len(labels.unique()) / len(labels)) * min(1, 20 * max(0, loss - 0.25))


def times(scale: float, text: tuple) -> tuple:
    return tuple(scale * t for t in text)


def to(x: Tensor, rows: Tensor) -> Tensor:
    """The distance of each x to the nearest of the rows that are not 0."""
    return torch.cdist(x, rows[rows.any(1)]).amin(1)


def score(z: Tensor, distances: Tensor) -> Tensor:
    return (z.softmax(-1) * z.log_softmax(-1)).nan_to_num().sum(-1) - 4 * distances


def source(model: DCP, n: int, seed: int) -> ImageLoader:
    """n images of alternating classes, and their mirror images."""
    items = [Item(str(i), "", i % 3) for i in range(n)]
    x = images(n, seed)
    pixels = FeatureTable(items, {PLAIN: x, MIRRORED: x.flip(-1)}, [])
    return ImageLoader(Photos(items), FeatureExtractor(model.frozen), "flip", precomputed=pixels, form=Pixels)


def in_a_cone(counts: list[int], width: int = 12, views: int = 2) -> tuple[Tensor, Tensor, tuple]:
    """Features (V, n, E) of classes with so many images, their labels, and their text logits at CLIP's
    scale."""
    torch.manual_seed(0)
    labels = torch.cat([torch.full((count,), c) for c, count in enumerate(counts)])
    text = F.normalize(torch.randn(len(counts), width) + 2, dim=-1)
    noise = torch.randn(views, len(labels), width) / 4
    return F.normalize(text[labels] + noise, dim=-1), labels, (100 * text, torch.randn(len(counts)))


def with_backbone(views: Tensor, labels: Tensor, width: int = 6) -> Tensor:
    """These features, followed by normalised ones of a backbone, which know the classes, too."""
    means = torch.randn(int(labels.max()) + 1, width, generator=torch.Generator().manual_seed(3))
    noise = torch.randn(*views.shape[:2], width, generator=torch.Generator().manual_seed(4))
    return torch.cat([views, F.normalize(means[labels] + noise / 2, dim=-1)], -1)


@torch.no_grad()
def test_what_folds_measure_is_fitted_by_the_rule_of_the_whole(plain, monkeypatch):
    """Of many images times classes all candidates start at the full text, and take fewer steps; so do those
    that are fitted without a fold, which is not as many: in one fit of all folds, and in a head of its own."""
    n = 16
    monkeypatch.setattr("dcp_zoo.probe.candidates.LARGE", 2 * n * 3 - 1)  # with their mirror images
    images, kept = source(plain, n, 0), range(4, n)
    alone = replace(images.of(kept), part_of=None)
    strengths = [fit_probe(plain, part)["text_strength"] for part in (images.of(kept), images, alone)]
    assert strengths[0] == strengths[1] == 1 != strengths[2]
    views, labels, text = in_a_cone([6, 5, 5])
    whole = TrainingSet(views, [torch.arange(12)], labels, text, torch.ones(n))
    one = {Configuration(0, 1.0): torch.eye(EACH)[6]}
    without = torch.arange(n) % 4 > 0
    of_fold = fit_candidates(whole, without[None], torch.ones(1), one)
    for size, same in ((n, True), (None, False)):
        part = replace(whole.select(without), total=size)
        found = fit_candidates(part, part.all, torch.ones(1), one)
        assert close(of_fold.mean(0, one).weight, found.mean(0, one).weight, 1e-3) == same


@pytest.mark.parametrize("part", ["folds", "candidates", "stacking", "threshold", "model"])
def test_worked_examples(part):
    results = doctest.testmod(import_module(f"dcp_zoo.probe.{part}"))
    assert results.attempted > 0 == results.failed


def test_no_group_of_images_is_in_two_folds():
    """And each class keeps an image; if each image is a group, folds are as without groups."""
    generator = torch.Generator().manual_seed(0)
    labels, groups = (torch.randint(high, (40,), generator=generator) for high in (5, 12))
    parts = folds.folds(labels, groups)
    for i, part in enumerate(parts):
        kept = torch.isin(torch.arange(40), part, invert=True)
        assert len(part) > 0 == sum(torch.isin(groups[kept], groups[part]))
        assert set(labels[kept].tolist()) == set(labels.tolist())
        assert not any(torch.isin(part, other).any() for other in parts[:i])
    assert not folds.folds(labels, torch.zeros(40, dtype=torch.long))
    alone = folds.folds(labels, torch.randperm(40, generator=generator) - 7)
    assert [part.tolist() for part in alone] == [part.tolist() for part in folds.folds(labels)]


def test_a_group_counts_as_one_image(few_candidates):
    """A probe that is fitted to images and copies of some, in groups, is that of the images alone."""
    views, labels, text = in_a_cone([8, 8, 8])
    copies = torch.cat([torch.arange(24), torch.tensor([0] * 60 + [9] * 3)])
    both = [
        fit_on_features(NAMES, labels[of], [ReadingFeatures(views[:, of], text)], groups=of)
        for of in (torch.arange(24), copies)
    ]
    found, wanted = (probe(F.linear(views[0], *text), views[0], probe.classes) for probe, _ in both)
    assert close(found, wanted, 0.05)
    assert close(both[0][0].means, both[1][0].means, 1e-3)
    assert both[0][0].spread == pytest.approx(both[1][0].spread.item(), rel=1e-5)
    assert both[0][1]["thresholds"] == pytest.approx(both[1][1]["thresholds"], abs=0.1)
    without = fit_on_features(NAMES, labels[copies], [ReadingFeatures(views[:, copies], text)])[0]
    assert not close(without(F.linear(views[0], *text), views[0], without.classes), wanted, 0.05)


def test_classes_of_fewer_images_have_a_bias_and_of_equal_size_none():
    """The minimum of its equation, by SciPy; a class of which no image was left out has none."""
    rng = torch.Generator().manual_seed(0)
    sizes, held_out = torch.tensor([20.0, 5.0, 2.0, 1.0]), [20, 5, 2, 0]
    labels = torch.arange(4).repeat_interleave(torch.tensor(held_out))
    logits = 2 * torch.randn(len(labels), 4, generator=rng) + 3 * torch.eye(4)[labels] - torch.arange(4)
    widths = np.log(20 / sizes[1:3].numpy())

    def loss(b: np.ndarray) -> float:
        losses = F.cross_entropy(logits.double() + torch.tensor([0, *b, 0]), labels, reduction="none").numpy()
        return sum(2 * losses[labels == c].mean() for c in range(3)) + ((b / widths) ** 2).sum() / 2

    each = torch.ones(len(labels), dtype=torch.double)
    found = class_bias(logits, labels, each, sizes.double())
    assert found[1:3].tolist() == pytest.approx(minimize(loss, np.zeros(2)).x, abs=1e-3)
    assert (found[0], found[3], found[2] > 0.5) == (0, 0, True)
    assert not class_bias(logits, labels, each, torch.full((4,), 7.0).double()).any()
    thirds = torch.bincount(torch.arange(4).repeat_interleave(3), torch.full((12,), 1 / 3)).double()
    thirds[0] = 1  # an image, beside groups of three
    assert not class_bias(logits, labels, each, thirds).any()


def test_a_class_of_two_images_is_found_beside_larger_ones(few_candidates):
    """Its bias is in the probe, and in what is said of images that were left out: of each without itself."""
    views, labels, text = in_a_cone([82, 120, 120], 12)
    used = torch.cat([torch.arange(2), torch.arange(82, 112), torch.arange(202, 232)])
    other = torch.ones(len(labels), dtype=torch.bool)
    other[used] = False
    given = ReadingFeatures(views[:, used], text)
    probe = fit_on_features(NAMES, labels[used], [given], describes=False)[0]
    images = TrainingSet(views[:, used], [torch.arange(12)], labels[used], text, torch.ones(len(used)))
    validation = cross_validate(images, folds.folds(labels[used]))
    said, _, bias = validation.logits()
    assert (bias[0] > 0.3, bias[1:].tolist()) == (True, [0, 0])

    def recalls() -> list[float]:
        right = (probe(F.linear(views[0], *text), views[0], NAMES).argmax(1) == labels)[other]
        return [right[labels[other] == c].float().mean().item() for c in range(3)]

    found = recalls()
    probe.bias[0] -= bias[0]
    before = recalls()
    assert found[0] > before[0] + 0.05
    assert sum(found) > sum(before)
    parts = [torch.isin(validation.positions, part) for part in validation.folds]
    raw = torch.cat(
        [validation.fits.logits(i, validation.weights_without[i], part)[0] for i, part in enumerate(validation.folds)]
    )
    for part in parts:
        weights, sizes = (~part).double(), torch.tensor([2.0, 30, 30]).double()
        expected = class_bias(raw, labels[used][validation.positions], weights, sizes)
        assert close((said - raw)[part], expected.expand(int(part.sum()), 3), 1e-5)


@pytest.mark.parametrize("counts", [[1, 0, 6], [8, 8, 8], [700, 0, 1400]])
def test_the_probe_is_the_mean_of_all_candidates_by_evidence(counts):
    """For classes of equal and other sizes, one without images, which is its text, more features than images
    and fewer, and so many images that one fold is left out."""
    views, labels, text = in_a_cone(counts, views=2 if sum(counts) < 100 else 1)
    views, widths = with_backbone(views, labels), (12, 6)
    probe, info = fit_on_features(NAMES, labels, [ReadingFeatures(views, text, {EMBEDDING: 12, HIDDEN: 6})])
    scale = plain_scale(F.linear(views[0, :, :12], *text), labels)
    assert info["text_scale"] == pytest.approx(scale, rel=1e-3)
    scaled = times(scale, text)
    evidence, fitted = plain_evidence(views, widths, labels, text), plain_candidates(views, widths, labels, scaled)
    expected = torch.einsum("k,kmc->mc", evidence.weights, fitted.logits(F.linear(views[0, :, :12], *scaled), views[0]))
    z, f = F.linear(views[0, :, :12], *text), views[0] / math.sqrt(2)
    whole, probe.gate = probe(z, f, probe.classes), torch.empty(0)
    found = probe(z, f, probe.classes)
    assert close(found, expected, 0.02 if sum(counts) < 100 else 0.1)
    strength = (evidence.weights * fitted.texts).sum().item() / sharper(views, 12, labels, scaled)
    assert info["text_strength"] == pytest.approx(strength, abs=0.02)
    if 0 in counts:
        assert close(found[:, 1], sharper(views, 12, labels, scaled) * scale * info["text_strength"] * z[:, 1], 1e-3)
    assert close(probe.means, fitted.means / math.sqrt(2), 5e-4)  # in float16
    if len(evidence.distances) < 20:
        assert probe.threshold == NEVER
        assert close(whole, found)  # without a gate
        return
    assert probe.spread == pytest.approx(evidence.distances.mean().item(), rel=1e-3)
    near = 1 + (evidence.distances / probe.spread).std() * NormalDist().inv_cdf(0.9)
    wanted = behind_the_gate(found, probe.text_scale * z, probe.measure(probe.classes)(f), near, 0.1)
    assert close(whole.softmax(-1), wanted.exp(), 1e-5)
    assert not close(whole.softmax(-1), found.softmax(-1), 1e-3)
    distances = evidence.distances / probe.spread
    known = score(behind_the_gate(evidence.logits, evidence.text, distances, near, 0.1), distances)
    for share, threshold in info["thresholds"].items():
        wanted = known.mean() + known.std() * NormalDist().inv_cdf(float(share))
        assert threshold == pytest.approx(wanted.item(), abs=0.05)


def test_with_one_image_per_class_all_penalties_count_unless_text_explains_little():
    views, labels, (weight, _) = in_a_cone([1, 1, 1], 24)
    zero = torch.zeros(3)
    for text, equal in ((weight, True), (weight.roll(1, 0), False)):
        probe, info = fit_on_features(NAMES, labels, [ReadingFeatures(views, (text, zero))])
        images = TrainingSet(views, [torch.arange(24)], labels, (text, zero), torch.ones(3))
        evidence = prior_weights(images, torch.tensor(info["text_scale"]))
        weights = 2 * evidence[Configuration(0, 1.0)][: len(REGRESSIONS)]
        assert (weights[0].item() == pytest.approx(1 / len(REGRESSIONS), abs=1e-6)) is equal
        assert weights.diff().min() >= 0
        assert info["text_strength"] == 0.75  # all of it, and half of it
        assert probe.threshold == NEVER


def test_what_passes_of_things_like_the_classes_is_counted_by_fits_without_every_second_class():
    views, labels, text = in_a_cone([10, 10, 10], 24)
    probe, info = fit_on_features(NAMES, labels, [ReadingFeatures(views, text)])
    scaled = times(info["text_scale"], text)
    evidence = plain_evidence(views, (24,), labels, text).weights
    middle = labels == 1  # the first half, without classes 0 and 2, would leave a single class
    fitted = plain_candidates(views[:, ~middle], (24,), labels[~middle], scaled)
    z = F.linear(views[0, middle], *scaled)
    logits = torch.einsum("k,kmc->mc", evidence, fitted.logits(z, views[0, middle]))
    distances = to(views[0, middle], fitted.means) / probe.spread
    text_logits = (evidence * fitted.texts).sum() * z
    answers = behind_the_gate(logits[:, [0, 2]], text_logits[:, [0, 2]], distances, probe.gate[0].item(), 0.1)
    passed = score(answers, distances) >= probe.threshold
    assert info["like_accepted"]["0.05"] == pytest.approx(100 * passed.float().mean().item(), abs=4)
    assert [*info["like_accepted"]] == [*info["thresholds"]] == ["0.01", "0.02", "0.05", "0.1", "0.2", "0.3"]
    assert [*info["thresholds"].values()] == sorted(info["thresholds"].values())
    assert [*info["like_accepted"].values()] == sorted(info["like_accepted"].values(), reverse=True)


@pytest.mark.parametrize("corrections", [0, 40])
def test_about_the_promised_share_of_known_images_is_refused(corrections):
    """Of images of the classes that it has not seen, over several draws; also with corrections, which are
    hard ones."""
    torch.manual_seed(0)
    text = F.normalize(torch.randn(10, 24) + 2, dim=-1)
    linear, labels, refused = (20 * text, torch.zeros(10)), torch.arange(10).repeat(8), []
    both = torch.cat([labels, labels[:corrections]])
    typical = torch.arange(len(both)) < len(labels) if corrections else None

    def features(of: Tensor, noise: float = 1 / 4) -> Tensor:
        return F.normalize(text[of] + noise * torch.randn(len(of), 24), dim=-1)

    for _ in range(2):
        views = torch.cat([features(labels), features(labels[:corrections], 1 / 2)])[None]
        probe, _ = fit_on_features([*"abcdefghij"], both, [ReadingFeatures(views, linear)], typical=typical)
        f = features(labels.repeat(2))
        scores = score(probe(F.linear(f, *linear), f, probe.classes), probe.measure(probe.classes)(f))
        refused.append(float((scores < probe.threshold).float().mean()))
    assert sum(refused) / 2 == pytest.approx(0.05, abs=0.03)


@pytest.mark.parametrize("counts", [[10, 10, 10], [700, 0, 1400]])
def test_what_is_refused_is_told_by_other_images(counts):
    """Whether there are four folds or, of many images, one; here an example of no class is a copy of an image."""
    views, labels, text = in_a_cone(counts, 24, views=1)
    read = [ReadingFeatures(views, text)]
    held_out = fit_on_features(NAMES, labels, read, describes=False)[0].held_out
    assert 0 < held_out.rejected.float().mean() < 0.12
    first = plain_folds(labels)[0]
    probe, _ = fit_on_features(NAMES, labels, read, describes=False, examples=views[0, first])
    if sum(counts) < 100:
        of_first = first[probe.held_out.positions]
        assert probe.held_out.rejected[of_first].all()
        assert (probe.held_out.scores[of_first] < probe.threshold).all()


@torch.no_grad()
def test_a_head_reads_its_own_features_and_the_frozen_towers(plain):
    """Its logits are the mean of two probes, on its own and on CLIP's embedding, each beside what the frozen
    tower has before it; evidence, scale and distances are those of the frozen tower, as the prompts have
    seen the training images. Fused they are the same."""
    train, x, width = source(plain, 24, 0), images(5, 1), plain.encoder.num_features
    own, frozen = plain.available_readings
    assert (own.widths, frozen.widths) == ((width,), (*plain.encoder.parts.values(),))
    table = train.table([own, frozen], train.with_flips)
    views = [table.reading(i).rows(PLAIN, MIRRORED) for i in (0, 1)]
    text, zero_shot = plain.method_linear(), plain.zero_shot_linear()
    with_frozen = torch.cat([views[0], views[1][..., width:]], -1)
    alone, parts = [ReadingFeatures(views[1], zero_shot, frozen.parts)], len(frozen.widths)
    expected, wanted = fit_on_features(plain.classes, train.labels, alone)
    assert not close(with_frozen, views[1])
    x_own, x_frozen = own.encode(x), frozen.encode(x)
    info = fit_probe(plain, train)
    assert (info["text_scale"], info["thresholds"]) == (wanted["text_scale"], wanted["thresholds"])
    assert (len(plain.readings), plain.num_features) == (2, width + sum(frozen.widths))
    scaled = [times(info["text_scale"], linear) for linear in (text, zero_shot)]
    evidence = plain_evidence(views[1], frozen.widths, train.labels, zero_shot, frozen.inside)
    fitted = plain_candidates(with_frozen, frozen.widths, train.labels, scaled[0], frozen.inside)
    mixed = torch.cat([x_own, x_frozen[:, width:]], 1)
    z = [
        torch.einsum("k,kmc->mc", evidence.weights, fitted.logits(F.linear(x_own, *scaled[0]), mixed)),
        F.linear(x_frozen / math.sqrt(parts), *expected.linear(linear_of([frozen]), plain.classes)),
    ]
    assert close(F.linear(plain.encode_image(x), *plain.linear()), (z[0] + z[1]) / 2, 2e-2)
    everyday = plain.encode_image(torch.stack([create_transform(plain)(each) for each in everyday_pictures()]))
    scores = in_distribution_score(plain.classify(everyday).numpy(), plain.distances(everyday).numpy())
    accepted = {rate: 100 * (scores >= threshold).mean() for rate, threshold in info["thresholds"].items()}
    assert info["others_accepted"] == pytest.approx(accepted, abs=0.1)
    distances = expected.measure(plain.classes)(x_frozen / math.sqrt(parts))
    assert close(plain.distances(plain.encode_image(x)), distances, 1e-3)
    fused = plain.fuse()
    assert close(fused.distances(fused.encode_image(x)), distances, 1e-3)


@pytest.fixture
def few_candidates(monkeypatch) -> None:
    """Of all of them a fit takes seconds."""
    monkeypatch.setattr("dcp_zoo.probe.candidates.TEXT_SHARES", (1.0,))


@torch.no_grad()
def test_examples_of_no_class_reject_what_is_nearer_to_them(plain, tiny_clip, tmp_path, few_candidates):
    """By more than of 98 % of the images that are left out, if that is normally distributed. The frozen
    features alone say so: prompts have seen the images of the classes, and not these."""
    train, none = source(plain, 30, 0), source(plain, 4, 7)
    x = torch.cat([images(4, 7) + images(4, 8) / 10, images(8, 1)])
    without = fit_probe(plain, train)
    f = plain.encode_image(x)
    distances, frozen = plain.distances(f), plain.available_readings[1]
    views = train.table([frozen], train.with_flips).rows(PLAIN, MIRRORED)
    examples = none.table([frozen]).rows()[0]
    unit = math.sqrt(2) * plain.text_probe.spread
    margins = []
    for out in plain_folds(train.labels):
        means = [views[:, ~out & (train.labels == c)].mean((0, 1)) for c in range(3)]
        margins.append((to(views[0, out], torch.stack(means)) - to(views[0, out], examples)) / unit)
    margins = torch.cat(margins)
    limit = margins.mean() + 2.0537 * margins.std()
    info = fit_probe(plain, train, ProbeInputs(none=none))
    assert info.pop("examples") == 4
    assert info == {**without, "others_accepted": info["others_accepted"]}
    alike = distances - to(frozen.encode(x), examples) / unit > limit
    assert 0 < alike.sum() < len(x)
    expected = distances.masked_fill(alike, 1e4)
    plain.save_pretrained(tmp_path)
    for head in (plain, load_head(DCP(tiny_clip, NAMES, n_ctx=2), tmp_path).eval(), plain.fuse(), copied(plain)):
        assert close(head.distances(head.encode_image(x)), expected, 1e-3)
    assert plain.distances(none.table(plain.readings).joined).tolist() == [1e4] * 4
    with pytest.warns(UserWarning, match="The 4 images of none of the classes are not used: .* It needs 20 images"):
        found = fit_probe(plain, source(plain, 12, 0), ProbeInputs(none=none))
    assert not {"examples", "thresholds", "others_accepted"} & found.keys()
    assert cannot_reject(plain, "fitted on too few")


def test_added_images_set_the_threshold_only_where_others_are_few(tiny_clip, few_candidates):
    head = PromptHead(FrozenCLIP(tiny_clip, pretrained_cfg=CFG), NAMES, texts="a photo of a {}.").eval()
    train, thresholds = source(head, 30, 0), []
    for first in (30, 24, 15):
        added = train.with_items([item._replace(added=i >= first) for i, item in enumerate(train.items)])
        thresholds.append(fit_probe(head, added)["thresholds"])
    assert thresholds[0] == thresholds[2] != thresholds[1]


@torch.no_grad()
def test_prediction_names_a_class(model):
    x = images(5, 1)
    for reader in (model, model.fuse(), model.predict):  # integers would be answered as if they were normalised
        with pytest.raises(ZooError, match=r"reads images \(n, 3, 32, 32\) of floats.*create_transform.*not \(2, "):
            reader(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    for wrong in (x[:0], "a.jpg"):
        with pytest.raises(ZooError, match=r"Expected images \(n, 3, H, W\)"):
            model.predict(wrong)
    names = [NAMES[i] for i in model(x).argmax(-1)]
    assert model.predict(x) == names
    assert [name for image in x.split(1) for name in model.train().predict(image)] == names  # not of the batch
    assert model.training


@torch.no_grad()
def test_the_papers_logits_are_one_argument_away():
    head, plain = (create_model("dcp_mini.eurosat_small-16shot", True, classifier=c).eval() for c in (None, "none"))
    x = torch.randn(2, 3, 192, 192)
    assert plain.text_probe is None
    assert close(
        plain(x),
        head.encoder.clip.logit_scale.exp() * head.available_readings[0].encode(x) @ head.encode_text().T,
        1e-5,
    )
    with pytest.raises(ZooError, match="Unknown classifier 'gaussian': choose from none"):
        create_model("dcp_mini.eurosat_small-16shot", True, classifier="gaussian")
