"""The text probe: its equations, its way through checkpoints and states, new classes, and how it is fitted."""

import copy
import doctest
import io
import json
import math
from dataclasses import replace
from statistics import NormalDist
from unittest.mock import Mock

import pytest
import torch
from helpers import close, loud
from safetensors.torch import load_file, save_file
from shared import CFG
from torch.nn import functional as F

from dcp_zoo.answers import in_distribution_score
from dcp_zoo.data import Item
from dcp_zoo.data.packaged import everyday_pictures
from dcp_zoo.errors import ZooError
from dcp_zoo.model.checkpoint import load_head
from dcp_zoo.model.classes import Class
from dcp_zoo.model.clip import FrozenCLIP, join
from dcp_zoo.model.dcp import DCP
from dcp_zoo.model.inputs import Maps, Pixels
from dcp_zoo.model.text_probe import candidates, evidence, folds, threshold
from dcp_zoo.model.text_probe import fit as fitting
from dcp_zoo.model.text_probe.candidates import STRENGTHS, TEXTS, Family, TrainingSet, families_of, mean_of
from dcp_zoo.model.text_probe.estimates import text_scale
from dcp_zoo.model.text_probe.evidence import LeftOut, leave_out_each
from dcp_zoo.model.text_probe.fit import ReadingFeatures
from dcp_zoo.model.text_probe.probe import NEVER, PENALTIES, TextProbe
from dcp_zoo.training.evaluation import measure
from dcp_zoo.training.methods.text_probe import fit_probe
from dcp_zoo.training.sources import ImageSource, features_of
from dcp_zoo.zoo.factory import create_model, create_transform

NAMES = ["bus", "cat", "kite"]
CLASSES = [Class(name) for name in NAMES]


def images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def plain(tiny_clip):
    """A DCP with stored statistics without a text probe."""
    model = loud(DCP(FrozenCLIP(tiny_clip, pretrained_cfg=CFG), NAMES, n_ctx=2)).eval()
    model.store_stats(images(4))
    return model


@pytest.fixture
def model(plain):
    """The same with a text probe."""
    with torch.no_grad():
        x, labels = images(12), torch.arange(12) % 3
        readings = [
            ReadingFeatures(reading.encode(x)[None], reading.start(), reading.widths) for reading in plain.readings
        ]
        plain.text_probe, _ = fitting.fit_on_features(plain.classes, labels, readings)
    plain.text_probe.text_scale.fill_(0.5)
    plain.text_probe.threshold.fill_(torch.finfo(torch.float16).min)
    return plain


def text_logits(model: DCP, x: torch.Tensor) -> torch.Tensor:
    """The mean of the method's own logits and zero-shot CLIP's."""
    scale, (own, plain) = model.encoder.clip.logit_scale.exp(), (reading.encode(x) for reading in model.readings)
    zero_shot = model.encoder.zero_shot_classifier(model.classnames)
    return scale * (own @ model.encode_text().T + plain[:, : own.shape[1]] @ zero_shot.T) / 2


@torch.no_grad()
def test_its_equations(model):
    x, probe = images(5, 1), model.text_probe
    f, text = model.encode_image(x), text_logits(model, x)
    assert close(f.norm(dim=1), torch.ones(5))
    probe.bias.copy_(torch.tensor([0.3, -0.2, 0.1]))
    assert probe.weight.abs().max() > 0.1
    assert close(model(x), 0.5 * text + f @ probe.weight.T + probe.bias, 1e-5)


@torch.no_grad()
def test_every_path_to_the_logits_has_it(model):
    x = images(5, 1)
    features = model.forward_features(x)
    assert close(model.fuse()(x), model(x))
    assert close(model.forward_head(features), model(x))
    assert close(model.get_classifier()(features), model(x))


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


@torch.no_grad()
def test_a_class_can_be_added_and_removed(model):
    x, before = images(5, 1), model(images(5, 1))
    model.remove_class("kite")
    assert model.classnames == ["bus", "cat"]
    assert close(model(x), before[:, :2])
    model.add_class("kite", images(12)[2::3])
    assert model.classnames == NAMES
    added = model(x)
    assert close(added[:, :2], before[:, :2])
    model.add_class("kite", images(3, 5))
    assert model.classnames == NAMES
    assert not close(model(x)[:, 2], added[:, 2], 1e-2)
    with pytest.raises(ZooError, match="class 'dog'"):
        model.remove_class("dog")


@torch.no_grad()
def test_a_new_class_is_fitted_against_the_means_of_the_others(model):
    """The gradient of each penalty's loss is 0, by hand, and the row is their mean by evidence."""
    probe, mean = model.text_probe, F.normalize(torch.randn(model.num_features), dim=0)
    probe.evidence = F.one_hot(torch.tensor(2), len(PENALTIES)).float()  # one penalty, 0.1
    model.set_classnames([*NAMES, "zebra"])
    start = join(model.reads)
    probe.add(model.classes[-1], mean, 4, model.classes, start)
    assert torch.equal(probe.means[-1], mean)
    rows = probe.means
    errors = F.linear(rows, *probe.linear(start, model.classes)).softmax(-1)[:, 3]
    errors[3] -= 1
    d = probe.weight[-1]
    gradient = 4 * errors @ rows + 0.1 * d
    assert gradient.abs().max() < 1e-2
    assert d.abs().max() > 0.05


@torch.no_grad()
def test_more_images_of_a_class_count_like_its_first_ones(model):
    once, x = copy.deepcopy(model), images(5, 1)
    once.add_class("zebra", images(6, 3))
    model.add_class("zebra", images(6, 3)[:2])
    model.add_class("zebra", images(6, 3)[2:], known=2)
    assert close(model(x), once(x), 1e-3)


@torch.no_grad()
def test_a_renamed_class_answers_as_before(picky, tiny_clip, tmp_path):
    x = images(5, 1)
    before, threshold = picky(x), picky.rejection_threshold()
    picky.info = {"metrics": {"top1_stored": 50.0}, "text_probe": {"thresholds": {"0.2": 9.0}, "text_scale": 1.0}}
    picky.rename_class("cat", "tabby cat")
    picky.save_pretrained(tmp_path, torch.float32)
    names = ["bus", "tabby cat", "kite"]
    loaded = load_head(DCP(tiny_clip, names, n_ctx=2).eval(), tmp_path)
    assert close(loaded(x), before)
    assert (loaded.rejection_threshold(), picky.classnames) == (threshold, names)
    assert "metrics" in json.loads((tmp_path / "config.json").read_text())["dcp"]
    loaded.info = json.loads((tmp_path / "config.json").read_text())["dcp"]
    assert loaded.rejection_threshold(0.2) == 9
    with pytest.raises(ZooError, match="no threshold that refuses 1 of the images"):
        loaded.rejection_threshold(1.0)  # which is True's value
    loaded.add_class("zebra", images(3))
    loaded.save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "config.json").read_text())["dcp"]["text_probe"]
    assert kept == {"thresholds": {"0.2": 9.0}, "text_scale": 1.0}
    with pytest.raises(ZooError, match="bus exists already"):
        loaded.rename_class("zebra", "bus")
    with pytest.raises(ZooError, match="Unknown class 'cat'"):
        loaded.rename_class("cat", "dog")


@torch.no_grad()
def test_classes_get_images_one_after_the_other(model, tiny_clip, tmp_path):
    x = images(5, 1)
    model.set_classnames([*NAMES, "emu", "gnu"])
    text = model(x)
    model.save_pretrained(tmp_path, torch.float32)
    assert close(load_head(DCP(tiny_clip, model.classnames, n_ctx=2), tmp_path).eval()(x), text)
    model.add_class("gnu", images(3, 9))
    assert close(model(x)[:, :4], text[:, :4])
    assert not close(model(x)[:, 4], text[:, 4], 1e-2)
    model.set_classnames(["gnu", *NAMES])
    gnu = model(x)[:, 0]
    model.set_classnames(["gnu", "emu"])
    assert close(model(x), torch.stack([gnu, text[:, 3]], 1))


def test_without_a_text_probe_a_class_is_its_name(plain):
    with pytest.raises(ZooError, match="no text probe.*Train a head with one.*set_classnames"):
        plain.add_class("zebra", images(2))
    with pytest.raises(
        ZooError, match="cannot reject images: it has no text probe. Train one that can: dcp-zoo train.$"
    ):
        plain.predict(images(2), reject=True)


# ------------------------------------------------------------------------------------------------------- the threshold


def scores(model: DCP, x: torch.Tensor) -> torch.Tensor:
    """Minus the entropy - four distances, by hand."""
    probe, z, f = model.text_probe, model(x), model.encode_image(x)
    width = model.encoder.num_features  # of the own part, which distances leave out; of three parts two are left
    nearest = torch.cdist(f[:, width:], probe.means[:, width:]).amin(1) * math.sqrt(3 / 2) / probe.spread
    return (z.softmax(-1) * z.log_softmax(-1)).sum(-1) - 4 * nearest


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
    """Its equation, fused and from a file; the same for any order and part of the classes."""
    x = images(5, 1)
    wanted = scores(picky, x)
    fused = picky.fuse()
    for model in (picky, fused):
        features = model.encode_image(x)
        distances = model.distances(features) if model is picky else fused.distances(features)
        assert close(torch.from_numpy(in_distribution_score(model(x).numpy(), distances.numpy())), wanted, 1e-4)
    assert [name is None for name in picky.predict(x, reject=True)] == (wanted < picky.text_probe.threshold).tolist()
    distances = picky.distances(picky.encode_image(x))
    picky.set_classnames(NAMES[::-1])
    assert close(picky.distances(picky.encode_image(x)), distances)


def test_it_outlives_changes_of_the_classes(picky, tiny_clip, tmp_path):
    x, threshold = images(5, 1), picky.rejection_threshold()
    answers = picky.predict(x, reject=True)
    assert answers.count(None) == 2
    picky.set_classnames(NAMES[::-1])
    assert picky.predict(x, reject=True) == answers
    picky.add_class("zebra", x)  # now it has seen these
    assert "zebra" in picky.predict(x, reject=True)
    picky.save_pretrained(tmp_path, torch.float32)
    loaded = load_head(DCP(tiny_clip, picky.classnames, n_ctx=2), tmp_path).eval()
    assert loaded.predict(x, reject=True) == picky.predict(x, reject=True)
    picky.remove_class("zebra")
    assert picky.predict(x, reject=True) == answers
    assert picky.fuse().info["threshold"] == threshold


@pytest.mark.parametrize("classes", [["kite", "zebra", "bus"], ["dog"], [*NAMES, "zebra"]])
def test_it_needs_images_of_each_class(picky, tiny_clip, tmp_path, classes):
    answers = picky.predict(images(5, 1), reject=True)
    picky.save_pretrained(tmp_path / "whole", torch.float32)
    picky.set_classnames(classes)
    message = f"has seen no image of {'dog' if classes == ['dog'] else 'zebra'}, .*omit --classes.*classes --add"
    assert cannot_reject(picky, message)
    assert cannot_reject(copy.deepcopy(picky), message)
    assert cannot_reject(load_head(DCP(tiny_clip, classes, n_ctx=2), tmp_path / "whole").eval(), message)
    picky.info = {"text_probe": {"thresholds": {"0.05": 1.0}, "text_scale": 1.0}}
    picky.save_pretrained(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dcp"]["text_probe"] == {"text_scale": 1.0}
    picky.set_classnames(NAMES)
    assert picky.predict(images(5, 1), reject=True) == answers


@torch.no_grad()
@pytest.mark.parametrize("classes", [NAMES, ["cat", "zebra"]])
def test_checkpoints_carry_it(model, tiny_clip, tmp_path, classes):
    """Its scores are stored exactly, for the classes of the moment."""
    model.set_classnames(classes)
    model.save_pretrained(tmp_path, torch.float32)
    loaded = load_head(DCP(tiny_clip, classes, n_ctx=2), tmp_path).eval()
    assert torch.equal(loaded(images(5, 1)), model(images(5, 1)))
    other = load_head(DCP(tiny_clip, classes[::-1], n_ctx=2), tmp_path).eval()
    assert close(other(images(5, 1)), model(images(5, 1)).flip(1))


@torch.no_grad()
def test_only_what_logits_do_not_depend_on_is_rounded_in_a_file(model, tmp_path):
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    rounded = {name for name, t in state.items() if name.startswith("classifier.") and t.dtype == torch.half}
    assert rounded == {"classifier.means"}


def test_a_checkpoint_without_some_of_its_tensors_is_refused(model, tiny_clip, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({k: t for k, t in load_file(path).items() if k != "classifier.means"}, path)
    with pytest.raises(ZooError, match="missing: classifier.means"):
        load_head(DCP(tiny_clip, NAMES, n_ctx=2), tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("had_its_own", [False, True])
def test_a_state_brings_it_and_a_state_without_it_removes_it(model, tiny_clip, had_its_own):
    x, other = images(5, 1), DCP(tiny_clip, NAMES, n_ctx=2).eval()
    if had_its_own:
        other.text_probe = TextProbe(other.classes, model.text_probe.widths, model.text_probe.changed)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    other.load_state_dict({k: t for k, t in model.state_dict().items() if not k.startswith("text_probe.")})
    assert other.text_probe is None


@torch.no_grad()
def test_copies_have_it(model):
    x, buffer = images(5, 1), io.BytesIO()
    torch.save(model, buffer)
    for other in (copy.deepcopy(model), torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)):
        assert torch.equal(other(x), model(x))


# ------------------------------------------------------------------------------------------------------------- fitting


def source(model: DCP, n: int, seed: int) -> ImageSource:
    """n images of alternating classes, each with its mirror image as the second view."""
    items = [Item(str(i), "", i % 3) for i in range(n)]
    maps = model.encoder.visual.conv1(images(n, seed)).detach()
    return ImageSource(model.encoder, items, str, views=torch.stack([maps, maps.flip(-1)]), form=Maps)  # type: ignore[arg-type]


def in_a_cone(counts: list[int], width: int = 24, views: int = 2) -> tuple[torch.Tensor, torch.Tensor, tuple]:
    """Features (V, n, E) of classes with so many images, their labels, and their text logits at CLIP's scale."""
    torch.manual_seed(0)
    labels = torch.cat([torch.full((count,), c) for c, count in enumerate(counts)])
    text = F.normalize(torch.randn(len(counts), width) + 2, dim=-1)
    noise = torch.randn(views, len(labels), width) / 4
    return F.normalize(text[labels] + noise, dim=-1), labels, (100 * text, torch.randn(len(counts)))


def with_backbone(views: torch.Tensor, labels: torch.Tensor, width: int = 10) -> torch.Tensor:
    """These features, followed by normalised ones of a backbone, which know the classes, too."""
    means = torch.randn(int(labels.max()) + 1, width, generator=torch.Generator().manual_seed(3))
    noise = torch.randn(*views.shape[:2], width, generator=torch.Generator().manual_seed(4))
    return torch.cat([views, F.normalize(means[labels] + noise / 2, dim=-1)], -1)


def left_out_of(images: TrainingSet) -> tuple[list[LeftOut], candidates.Evidence]:
    """What was fitted without each of the folds, and its evidence."""
    return leave_out_each(images, folds.folds(images.labels))


def block_of(candidate, of: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
    """What a candidate reads of features (n, W), of the length 1."""
    return of[:, candidate.columns] / math.sqrt(2 if candidate.columns == slice(0, sum(widths)) else 1)


@pytest.mark.parametrize("part", [folds, candidates, evidence, threshold])
def test_worked_examples(part):
    results = doctest.testmod(part)
    assert results.attempted > 0 == results.failed


def test_no_group_of_images_is_in_two_folds():
    """And each class keeps an image; if each image is a group, folds are as without groups."""
    generator = torch.Generator().manual_seed(0)
    for number in (1, 12, 30):
        labels, groups = (torch.randint(high, (40,), generator=generator) for high in (5, number))
        parts = folds.folds(labels, groups)
        assert bool(parts) == (number > 1)
        of_parts = [set(groups[part].tolist()) for part in parts]
        assert sum(map(len, of_parts)) == len(set().union(*of_parts))
        for part, of_part in zip(parts, of_parts, strict=True):
            assert sum(group in of_part for group in groups.tolist()) == len(part) > 0
            kept = torch.isin(torch.arange(40), part, invert=True)
            assert set(labels[kept].tolist()) == set(labels.tolist())
        alone = folds.folds(labels, torch.randperm(40, generator=generator) - 7)
        assert [part.tolist() for part in alone] == [part.tolist() for part in folds.folds(labels)]


def test_copies_of_an_image_in_one_group_are_no_evidence():
    """Without groups a copy in another fold tells the class: here of labels that mean nothing."""
    views, labels, (weight, bias) = in_a_cone([6, 6, 6])
    once = labels[torch.randperm(18, generator=torch.Generator().manual_seed(0))]
    twice = ReadingFeatures(views.repeat(1, 2, 1), (weight, bias))
    fits = [
        fitting.fit_on_features(CLASSES, once.repeat(2), [twice], groups=groups)[0]
        for groups in (None, torch.arange(18).repeat(2))
    ]
    strongest = [probe.evidence[-1].item() for probe in fits]
    assert strongest[0] > 10 * strongest[1]


@pytest.mark.parametrize("counts", [[4, 4, 4], [1, 20, 3], [5, 0, 5]])
def test_a_penalty_is_a_convex_problem(counts, monkeypatch):
    """The gradient, by hand, is 0: for classes of equal and other sizes, and among those that have images; with more
    features than images and fewer; for all features and the backbone's; for any strength of the text. A class without
    images is not pushed away by the images of the others."""
    views, labels, text = in_a_cone(counts)
    views, widths = with_backbone(views, labels), (24, 10)
    monkeypatch.setattr("dcp_zoo.model.text_probe.candidates.STEPS", 300)
    training = TrainingSet(views, widths, labels, text)
    families = candidates.fit_candidates(training, families_of(training)).values()
    assert (len(families), {len(family) for family in families}) == (2 * len(TEXTS), {len(PENALTIES) + len(STRENGTHS)})
    rows, y = views.flatten(0, 1), labels.repeat(2)
    has_images = torch.tensor(counts) > 0
    per_class = len(labels) / sum(count > 0 for count in counts)
    weights = torch.tensor([per_class / (2 * max(count, 1)) for count in counts])[y]
    for _, _, candidate, *_ in families:  # the penalty 0.1
        x = block_of(candidate, rows, widths)
        scale = x.norm() / rows[:, candidate.columns].norm()
        d = candidate.weight / scale
        logits = candidate.text * F.linear(rows[:, :24], *text) + x @ d.T
        errors = logits.where(has_images, torch.tensor(-math.inf)).softmax(-1) - F.one_hot(y, 3)
        gradient = (weights[:, None] * errors).T @ x + 0.1 * d
        assert gradient.abs().max() < 2e-3
        assert d[has_images].abs().max() > 0.05
        assert not d[~has_images].any()


def test_many_images_take_fewer_steps(monkeypatch):
    """In eight steps the loss comes as near its minimum as stated here; a class without images has a row of 0."""
    views, labels, text = in_a_cone([120, 0, 60, 20], views=1)
    weights = torch.tensor([len(labels) / 3 / max(count, 1) for count in (120, 0, 60, 20)])[labels]
    start = F.linear(views[0], *text)
    start[:, 1] = -math.inf

    def losses(steps: int) -> tuple[list[float], list[torch.Tensor]]:
        monkeypatch.setattr("dcp_zoo.model.text_probe.candidates.STEPS", steps)
        fitted = candidates.fit_candidates(TrainingSet(views, (24,), labels, text), [Family(0, 1.0)])
        rows = [each.weight for each in fitted[Family(0, 1.0)][1 : len(PENALTIES)]]
        entropies = [F.cross_entropy(start + views[0] @ d.T, labels, reduction="none") for d in rows]
        pairs = zip(entropies, rows, PENALTIES[1:], strict=True)
        return [((weights * e).sum() + p / 2 * d.square().sum()).item() for e, d, p in pairs], rows

    lowest, _ = losses(1000)
    monkeypatch.setattr("dcp_zoo.model.text_probe.candidates.ENOUGH", 100)
    fewer, rows = losses(0)
    assert fewer == pytest.approx(lowest, rel=0.05)
    assert fewer[0] < 0.9 * (weights * F.cross_entropy(start, labels, reduction="none")).sum().item()
    assert not any(d[1].any() for d in rows)


def test_the_text_scale_follows_the_text():
    """The minimum of the documented loss: near 1 for logits that are right at their scale, smaller for noise."""
    torch.manual_seed(1)
    logits, noise = torch.randn(600, 3), torch.randn(600, 3)
    labels = torch.distributions.Categorical(logits=logits).sample()
    found = text_scale(logits, labels)
    assert found == pytest.approx(1, abs=0.2)
    assert text_scale(5 * noise, labels) < 0.1
    log = torch.tensor(found, dtype=torch.float64).log().requires_grad_()
    loss = F.cross_entropy(log.exp() * logits.double(), labels, reduction="sum") + log**2 / 2
    assert torch.autograd.grad(loss, log)[0].abs() < 1e-3


def test_candidates_are_weighed_by_what_was_left_out(monkeypatch):
    """All of them, by hand: the logits of the probe are the mean of the candidates' by evidence."""
    views, labels, text = in_a_cone([1, 6, 3])
    views, widths = with_backbone(views, labels), (24, 10)
    left_out, _ = left_out_of(TrainingSet(views, widths, labels, text))
    assert sum(len(each.images.labels) for each in left_out) == 9  # all but the only image of its class
    for each in left_out:
        kept = {tuple(row) for row in each.kept.views.flatten(0, 1).mul(1e4).round().tolist()}
        assert not kept & {tuple(row) for row in each.images.views[0].mul(1e4).round().tolist()}
        assert 0 not in each.images.labels
    probe, info = fitting.fit_on_features(CLASSES, labels, [ReadingFeatures(views, text, widths)])
    scaled = [info["text_scale"] * t for t in text]
    training = TrainingSet(views, widths, labels, scaled)

    def logits(fitted: dict, features: torch.Tensor) -> torch.Tensor:
        return torch.stack(
            [
                c.text * F.linear(features[:, :24], *scaled) + F.linear(features[:, c.columns], c.weight, c.bias)
                for family in fitted.values()
                for c in family
            ]
        )

    monkeypatch.setattr(evidence, "HOPELESS", math.inf)
    losses = sum(
        torch.stack([F.cross_entropy(z, y, reduction="sum") for z in logits(each.candidates, each.images.views[0])])
        for each in left_out_of(training)[0]
        for y in [each.images.labels]
    )
    weights = (-losses).softmax(0)
    of_penalties = weights.unflatten(0, (-1, len(PENALTIES) + len(STRENGTHS)))[:, : len(PENALTIES)].sum(0)
    assert close(probe.evidence, of_penalties / of_penalties.sum(), 5e-3)
    fitted = candidates.fit_candidates(training, families_of(training))
    wanted = torch.einsum("k,kmc->mc", weights, logits(fitted, views[0]))
    f = views[0] / math.sqrt(2)
    assert close(probe(F.linear(views[0, :, :24], *text), f, probe.classes), wanted, 1e-2)
    assert info["text_strength"] == pytest.approx(probe.text_scale.item() / info["text_scale"], abs=1e-3)
    monkeypatch.setattr(fitting, "ENOUGH", len(labels) - 1)
    monkeypatch.setattr(fitting, "leave_out_each", Mock(wraps=leave_out_each))
    fitting.fit_on_features(CLASSES, labels, [ReadingFeatures(views, text, widths)])
    (_, (first,)) = fitting.leave_out_each.call_args.args  # of many images the first fold alone
    assert labels[first].tolist() == [1, 1, 2]


def test_families_of_candidates_are_not_fitted_again(monkeypatch):
    """Those far behind after the first fold; of many images and classes, those without the full text."""
    views, labels, text = in_a_cone([6, 6, 6])
    views, widths = with_backbone(views, labels), (24, 10)
    right = 5 * text[0], torch.zeros(3)  # without it a candidate is lost
    monkeypatch.setattr(evidence, "HOPELESS", 0.5)
    (_, *further), weights = left_out_of(TrainingSet(views, widths, labels, right))
    assert 0 < len(weights) < 2 * len(TEXTS)
    assert all(each.candidates.keys() == weights.keys() for each in further)
    monkeypatch.setattr(candidates, "LARGE", 10)
    probe, info = fitting.fit_on_features(CLASSES, labels, [ReadingFeatures(views, text, widths)])
    assert info["text_strength"] == 1
    assert probe.weight[:, 24:].any()


def test_with_one_image_per_class_all_penalties_count_unless_text_explains_little():
    views, labels, (weight, _) = in_a_cone([1, 1, 1])
    zero = torch.zeros(3)
    assert folds.folds(labels) == []  # nothing can be left out
    for text, equal in ((weight, True), (weight.roll(1, 0), False)):
        probe, info = fitting.fit_on_features(CLASSES, labels, [ReadingFeatures(views, (text, zero))])
        assert (probe.evidence[0].item() == pytest.approx(1 / len(PENALTIES), abs=1e-6)) is equal
        assert probe.evidence.diff().min() >= 0
        assert info["text_strength"] == 0.75  # all of it, and half of it
        assert probe.threshold == NEVER


@pytest.mark.parametrize("counts", [[4, 4, 4], [5, 0, 5], [1, 1, 1]])
def test_gaussian_classes(counts):
    """Differences of their scores are log density ratios, up to one factor; a class without images scores 0."""
    views, labels, text = in_a_cone(counts)
    training = TrainingSet(views, (24,), labels, text)
    *_, (_, _, weight, bias), _ = candidates.fit_candidates(training, [Family(0, 1.0)])[Family(0, 1.0)]  # strength 1
    f = F.normalize(torch.randn(5, 24), dim=-1)
    density = -torch.cdist(f, training.means).square() / 2
    scores, seen = F.linear(f, weight, bias), [c for c, count in enumerate(counts) if count]
    assert not scores[:, [c for c in range(3) if c not in seen]].any()
    ratios = [(z[:, seen[1:]] - z[:, seen[:1]]).flatten() for z in (scores, density)]
    assert torch.corrcoef(torch.stack(ratios))[0, 1] > 0.9999
    rows = views.flatten(0, 1)
    spreads = [
        (z[:, seen] - z[:, seen].mean(1, keepdim=True)).std()
        for z in (F.linear(rows, weight, bias), training.text_logits(rows))
    ]
    assert spreads[0] == pytest.approx(spreads[1].item(), rel=1e-3)


def test_what_passes_of_things_like_the_classes_is_counted_by_fits_without_every_second_class():
    views, labels, text = in_a_cone([10, 10, 10])
    probe, info = fitting.fit_on_features(CLASSES, labels, [ReadingFeatures(views, text)])
    scaled = [info["text_scale"] * t for t in text]
    left_out, weights = left_out_of(TrainingSet(views, (24,), labels, scaled))
    logits = [each.logits(weights) for each in left_out]
    nearest = [torch.cdist(each.images.views[0], each.kept.means).amin(1) for each in left_out]
    distances = torch.cat(nearest)
    assert len(distances) == 30
    assert probe.spread == pytest.approx(distances.mean().item(), rel=1e-3)
    known = in_distribution_score(torch.cat(logits).numpy(), (distances / probe.spread).numpy())
    wanted = known.mean() + known.std(ddof=1) * NormalDist().inv_cdf(0.05)
    assert probe.threshold.item() == pytest.approx(wanted, abs=2e-2)
    middle = labels == 1  # the first half, without classes 0 and 2, would leave a single class
    rest = labels[~middle].div(2, rounding_mode="floor")
    kept = TrainingSet(views[:, ~middle], (24,), rest, [t[[0, 2]] for t in scaled])
    x = views[0, middle]
    z = mean_of(candidates.fit_candidates(kept, weights), weights, 24).logits(kept.text_logits(x), x)
    of_middle = torch.cdist(x, kept.means).amin(1) / probe.spread
    scores = in_distribution_score(z.numpy(), of_middle.numpy())
    passed = scores >= probe.threshold.item()
    assert info["like_accepted"]["0.05"] == pytest.approx(100 * passed.mean(), abs=4)
    assert [*info["like_accepted"]] == [*info["thresholds"]] == ["0.01", "0.02", "0.05", "0.1", "0.2", "0.3"]
    assert [*info["thresholds"].values()] == sorted(info["thresholds"].values())
    assert [*info["like_accepted"].values()] == sorted(info["like_accepted"].values(), reverse=True)
    two = labels < 2
    of_two = ReadingFeatures(views[:, two], (text[0][:2], text[1][:2]))
    assert "like_accepted" not in fitting.fit_on_features(CLASSES[:2], labels[two], [of_two])[1]


@pytest.mark.parametrize("corrections", [0, 40])
def test_about_the_promised_share_of_known_images_is_refused(corrections):
    """Of images of the classes that it has not seen, over several draws; also with corrections, which are hard ones."""
    torch.manual_seed(0)
    text = F.normalize(torch.randn(10, 24) + 2, dim=-1)
    linear, labels, refused = (20 * text, torch.zeros(10)), torch.arange(10).repeat(8), []
    both = torch.cat([labels, labels[:corrections]])
    typical = torch.arange(len(both)) < len(labels) if corrections else None

    def features(of: torch.Tensor, noise: float = 1 / 4) -> torch.Tensor:
        return F.normalize(text[of] + noise * torch.randn(len(of), 24), dim=-1)

    for _ in range(3):
        views = torch.cat([features(labels), features(labels[:corrections], 1 / 2)])[None]
        probe, _ = fitting.fit_on_features(
            [*map(Class, "abcdefghij")], both, [ReadingFeatures(views, linear)], typical=typical
        )
        f = features(labels)
        logits = probe(F.linear(f, *linear), f, probe.classes)
        scores = in_distribution_score(logits.numpy(), probe.distance(f, probe.classes).numpy())
        refused.append(float((scores < probe.threshold.item()).mean()))
    assert sum(refused) / 3 == pytest.approx(0.05, abs=0.03)


@torch.no_grad()
def test_a_head_reads_its_own_features_and_the_frozen_towers(plain, tiny_clip, tmp_path):
    """Its logits are the mean of two probes, on its own and on CLIP's embedding, each beside what the frozen tower has
    before it; evidence, scale and distances are those of the frozen tower, as the prompts have seen the training
    images. Fused and from a file they are the same."""
    train, x, width = source(plain, 24, 0), images(5, 1), plain.encoder.num_features
    own, frozen = plain.readings
    assert (own.widths, frozen.widths) == ((width,), plain.encoder.widths)
    views = [train.read_by(reading, 2) for reading in (own, frozen)]
    text, zero_shot = plain.own_linear(), plain.zero_shot_linear()
    with_frozen = torch.cat([views[0], views[1][..., width:]], -1)
    expected, wanted = fitting.fit_on_features(
        plain.classes, train.labels, [ReadingFeatures(views[1], zero_shot, frozen.widths)]
    )
    assert not close(with_frozen, views[1])
    x_own, x_frozen = own.encode(x), frozen.encode(x)
    info = fit_probe(plain, train)
    assert (info["text_scale"], info["thresholds"]) == (wanted["text_scale"], wanted["thresholds"])
    assert (len(plain.reads), plain.num_features) == (2, width + sum(frozen.widths))
    scaled = [[info["text_scale"] * t for t in linear] for linear in (text, zero_shot)]
    _, weights = left_out_of(TrainingSet(views[1], frozen.widths, train.labels, scaled[1]))
    training = TrainingSet(with_frozen, frozen.widths, train.labels, scaled[0])
    x_both = torch.cat([x_own, x_frozen[:, width:]], 1)
    mean = mean_of(candidates.fit_candidates(training, weights), weights, x_both.shape[1])
    z = [
        mean.logits(training.text_logits(x_both), x_both),
        expected(F.linear(x_frozen[:, :width], *zero_shot), x_frozen / math.sqrt(2), plain.classes),
    ]
    assert close(plain(x), (z[0] + z[1]) / 2, 1e-2)
    everyday = plain.encode_image(torch.stack([create_transform(plain)(each) for each in everyday_pictures()]))
    scores = in_distribution_score(plain.classify(everyday).numpy(), plain.distances(everyday).numpy())
    assert len(scores) == 30
    accepted = {rate: 100 * (scores >= threshold).mean() for rate, threshold in info["thresholds"].items()}
    assert info["others_accepted"] == pytest.approx(accepted, abs=0.1)
    distances = expected.distance(x_frozen / math.sqrt(2), plain.classes)
    assert close(plain.distances(plain.encode_image(x)), distances, 1e-3)
    assert close(plain.fuse()(x), plain(x), 1e-5)
    fused = plain.fuse()
    assert close(fused.distances(fused.encode_image(x)), distances, 1e-3)
    plain.save_pretrained(tmp_path, torch.float32)
    loaded = load_head(DCP(tiny_clip, NAMES, n_ctx=2), tmp_path).eval()
    assert len(loaded.reads) == 2
    assert close(loaded(x), plain(x), 1e-5)
    loaded.stats = "batch"
    assert not close(loaded(x[:1]), plain(x[:1]), 1e-3)
    plain.add_class("zebra", x)
    assert plain(x).argmax(-1).tolist().count(3) > 3
    assert close(plain.fuse()(x), plain(x), 1e-5)


def test_classes_with_the_same_images_are_refused(plain):
    views = F.normalize(torch.ones(2, 6, 8), dim=-1)
    with pytest.raises(ZooError, match="same image features: check that each class has its own images"):
        fitting.fit_on_features(
            CLASSES, torch.arange(6) % 3, [ReadingFeatures(views, (torch.eye(3, 8), torch.zeros(3)))]
        )


def test_images_are_mirrored_where_there_are_no_stored_views(plain):
    train = source(plain, 6, 0)
    pixels = images(6)
    read = ImageSource(plain.encoder, train.items, str)  # type: ignore[arg-type]
    read.batches = lambda size: [(Pixels(pixels[:4]), train.labels[:4]), (Pixels(pixels[4:]), train.labels[4:])]
    views = features_of(plain, read, 2)
    with torch.no_grad():
        assert close(views, torch.stack([plain.encode_image(pixels), plain.encode_image(pixels.flip(-1))]))


def test_few_images_make_no_threshold(plain):
    assert not {"thresholds", "others_accepted"} & {*fit_probe(plain, source(plain, 12, 0))}
    assert cannot_reject(plain, "fitted on too few")


@torch.no_grad()
def test_examples_of_no_class_reject_what_is_nearer_to_them(plain, tiny_clip, tmp_path):
    """By more than of 98 % of the images that are left out, if that is normally distributed. The frozen features alone
    say so: prompts have seen the images of the classes, and not these."""
    train, none = source(plain, 30, 0), source(plain, 4, 7)
    x = torch.cat([images(4, 7) + images(4, 8) / 10, images(8, 1)])
    without = fit_probe(plain, train)
    f = plain.encode_image(x)
    distances, frozen = plain.distances(f), plain.readings[1]
    views, examples = train.read_by(frozen, 2), none.read_by(frozen, 1)[0]
    left_out, _ = left_out_of(TrainingSet(views, frozen.widths, train.labels, plain.zero_shot_linear()))
    unit = math.sqrt(2) * plain.text_probe.spread
    pairs = [(each.kept.means, each.images.views[0]) for each in left_out]
    margins = torch.cat([(to(x, means) - to(x, examples)) / unit for means, x in pairs])
    limit = margins.mean() + 2.0537 * margins.std()
    info = fit_probe(plain, train, none=none)
    assert info.pop("examples") == 4
    assert info == {**without, "others_accepted": info["others_accepted"]}
    alike = distances - to(frozen.encode(x), examples) / unit > limit
    assert 0 < alike.sum() < len(x)
    expected = distances.masked_fill(alike, 1e4)
    plain.save_pretrained(tmp_path, torch.float32)
    for head in (plain, load_head(DCP(tiny_clip, NAMES, n_ctx=2), tmp_path).eval(), plain.fuse(), copy.deepcopy(plain)):
        assert close(head.distances(head.encode_image(x)), expected, 1e-3)
    assert plain.distances(features_of(plain, none, 1)[0]).tolist() == [1e4] * 4
    with pytest.warns(UserWarning, match="The 4 images of none of the classes are not used: .* It needs 20 images"):
        assert "examples" not in fit_probe(plain, source(plain, 12, 0), none=none)


def to(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The distance of each x to the nearest of the rows."""
    return torch.cdist(x, rows).amin(1)


@pytest.mark.parametrize(("first", "differs"), [(30, False), (24, True), (15, False)])
def test_added_images_set_the_threshold_only_where_others_are_few(plain, first, differs):
    train = source(plain, 30, 0)
    added = replace(train, items=[item._replace(added=i >= first) for i, item in enumerate(train.items)])
    thresholds = [fit_probe(plain, each)["thresholds"] for each in (train, added)]
    assert (thresholds[0] != thresholds[1]) == differs


@torch.no_grad()
def test_in_half_precision_it_still_rejects_nothing_and_is_saved(model, tmp_path):
    model.half()
    assert model.text_probe.threshold.isfinite()
    assert model.text_probe.cannot_reject(model.classes)
    model.save_pretrained(tmp_path)


@torch.no_grad()
def test_in_training_mode_predictions_do_not_depend_on_the_batch(model):
    x = images(5, 1)
    expected = model.predict(x)
    model.train()
    model.forward = lambda images: type(model).forward(model, images) * (1 if not model.training else float("nan"))
    assert [name for image in x.split(1) for name in model.predict(image)] == expected
    assert model.training


@torch.no_grad()
def test_raw_pixels_and_images_of_another_size_are_refused(model):
    """Also by the fused model; integers would be answered as if they were normalised."""
    for wrong in (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, 3, 40, 32), torch.zeros(2, 1, 32, 32)):
        for reader in (model, model.fuse(), model.predict):
            with pytest.raises(ZooError, match=r"reads images \(n, 3, 32, 32\) of floats.*create_transform.*not \(2, "):
                reader(wrong)


@torch.no_grad()
def test_prediction_names_a_class_or_none(model, plain):
    x = images(5, 1)
    for wrong, message in ((x[0], r"not a tensor \(3, "), (x[:0], r"not a tensor \(0, 3, "), ("a.jpg", "not str")):
        with pytest.raises(ZooError, match=rf"Expected images \(n, 3, H, W\).*{message}"):
            model.predict(wrong)
        with pytest.raises(ZooError, match=message):
            model.add_class("new", wrong)
    with pytest.raises(ZooError, match="must be strings, not 3"):
        model.set_classnames([3])
    names = model.predict(x)
    assert names == [NAMES[i] for i in model(x).argmax(-1)]
    with pytest.raises(ZooError, match="no threshold.*dcp-zoo train sets one"):
        model.predict(x, reject=True)


def test_fitting_needs_a_calibrated_context(tiny_clip):
    uncalibrated = DCP(tiny_clip, NAMES, n_ctx=2).eval()
    with pytest.raises(ZooError, match="store_stats"):
        fit_probe(uncalibrated, source(uncalibrated, 3, 0))


def test_statistics_that_are_stored_after_a_measurement_are_the_default(tiny_clip):
    model = DCP(FrozenCLIP(tiny_clip, pretrained_cfg=CFG), NAMES, n_ctx=2)
    assert measure(model, source(model, 6, 0))[0].keys() == {"top1_batch"}
    model.store_stats(images(4))
    assert model.stats == "stored"


@torch.no_grad()
def test_the_papers_logits_are_one_argument_away():
    head, plain = (create_model("dcp_mini.eurosat_small-16shot", True, classifier=c).eval() for c in (None, "none"))
    x = torch.randn(2, 3, 192, 192)
    assert plain.text_probe is None
    assert close(
        plain(x), head.encoder.clip.logit_scale.exp() * head.readings[0].encode(x) @ head.encode_text().T, 1e-5
    )
    assert not close(plain(x), head(x), 0.1)
    with pytest.raises(ZooError, match="Unknown classifier 'gaussian': choose from none"):
        create_model("dcp_mini.eurosat_small-16shot", True, classifier="gaussian")
