"""The text probe: its equations, its way through checkpoints and states, new classes, and how it is fitted."""

import copy
import io
import json
import math

import pytest
import torch
from helpers import close, in_distribution, loud, write_weights
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from dcp_zoo.data import Item
from dcp_zoo.errors import ZooError
from dcp_zoo.model.dcp import DCP
from dcp_zoo.model.head import load_head
from dcp_zoo.model.text_probe import PENALTIES, Problem, TextProbe, class_means, half_whitening, shared_precision
from dcp_zoo.training import fit_probe as fitting
from dcp_zoo.training.sources import ImageSource, encode_views
from dcp_zoo.zoo.factory import create_model

NAMES = ["bus", "cat", "kite"]


def images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def plain(tiny_clip):
    """A DCP with stored statistics without a text probe."""
    model = loud(DCP(tiny_clip, NAMES, n_ctx=2)).eval()
    model.store_stats(images(4))
    return model


@pytest.fixture
def model(plain):
    """The same with a text probe."""
    with torch.no_grad():
        views, labels = plain.encode_image(images(12))[None], torch.arange(12) % 3
        plain.text_probe, _ = fitting.fit_on_features(NAMES, views, labels, plain.own_linear())
    plain.text_probe.text_scale.fill_(0.5)
    plain.text_probe.unset_threshold()
    return plain


@torch.no_grad()
def test_its_equations(model):
    x, probe = images(5, 1), model.text_probe
    f = model.encode_image(x)
    text = model.clip.logit_scale.exp() * f @ model.encode_text().T
    assert probe.weight.abs().max() > 0.1
    assert close(model(x), 0.5 * text + f @ probe.weight.T, 1e-5)


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
    text = 0.5 * model.clip.logit_scale.exp() * model.encode_image(x) @ model.encode_text()[1]
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
    weight, bias = model.own_linear()
    probe.add("zebra", mean, 4, model.classnames, (weight, bias))
    assert torch.equal(probe.means[-1], mean)
    rows = probe.means
    errors = F.linear(rows, *probe.linear((weight, bias), model.classnames)).softmax(-1)[:, 3]
    errors[3] -= 1
    d = torch.linalg.solve(probe.metric, probe.weight[-1])
    gradient = 4 * errors @ rows @ probe.metric + 0.1 * d
    assert gradient.abs().max() < 1e-2
    assert d.abs().max() > 0.05


@torch.no_grad()
def test_more_images_of_a_class_count_like_its_first_ones(model):
    once, x = copy.deepcopy(model), images(5, 1)
    once.add_class("zebra", images(6, 3))
    model.add_class("zebra", images(6, 3)[:2])
    model.add_class("zebra", images(6, 3)[2:], known=2)
    assert close(model(x), once(x), 1e-4)


@torch.no_grad()
def test_a_renamed_class_answers_as_before(picky, tiny_clip, tmp_path):
    x = images(5, 1)
    before, threshold = picky(x), picky.rejection_threshold()
    picky.info = {"metrics": {"top1_stored": 50.0}, "text_probe": {"thresholds": {"0.2": 9.0}, "val_images": 4}}
    picky.rename_class("cat", "tabby cat")
    picky.save_pretrained(tmp_path, torch.float32)
    names = ["bus", "tabby cat", "kite"]
    loaded = load_head(DCP(tiny_clip, names, n_ctx=2).eval(), tmp_path)
    assert close(loaded(x), before)
    assert (loaded.rejection_threshold(), picky.classnames) == (threshold, names)
    assert "metrics" in json.loads((tmp_path / "config.json").read_text())["dcp"]
    loaded.info = json.loads((tmp_path / "config.json").read_text())["dcp"]
    assert loaded.rejection_threshold(0.2) == 9
    loaded.add_class("zebra", images(3))
    loaded.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dcp"]["text_probe"] == {"val_images": 4}
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
    with pytest.raises(ZooError, match="no text probe.*fit-text-probe.*set_classnames"):
        plain.add_class("zebra", images(2))
    with pytest.raises(
        ZooError, match="cannot reject images: it has no text probe. Add one with dcp-zoo fit-text-probe.$"
    ):
        plain.predict(images(2), reject=True)


# ------------------------------------------------------------------------------------------------------- the threshold


@pytest.fixture
def picky(model):
    """The model with a threshold that rejects two of five images."""
    with torch.no_grad():
        model.text_probe.threshold.copy_(in_distribution(model(images(5, 1))).median())
    return model


def cannot_reject(model: DCP, message: str) -> bool:
    """Whether a model refuses to reject images with this message, and a fused one has no threshold."""
    with pytest.raises(ZooError, match=message):
        model.predict(images(2), reject=True)
    return "threshold" not in model.fuse().info


def test_the_threshold_holds_in_any_order_of_its_classes(picky):
    x, threshold = images(5, 1), picky.rejection_threshold()
    answers = picky.predict(x, reject=True)
    assert answers.count(None) == 2
    picky.set_classnames(NAMES[::-1])
    assert picky.predict(x, reject=True) == answers
    assert picky.fuse().info["threshold"] == threshold
    picky.set_classnames([*NAMES, "zebra"])
    picky.remove_class("zebra")  # of which there were no images
    assert picky.predict(x, reject=True) == answers


@pytest.mark.parametrize("classes", [NAMES[:2], ["kite", "zebra", "bus"], ["dog"], [*NAMES, "zebra"]])
def test_it_holds_for_no_other_classes(picky, tiny_clip, tmp_path, classes):
    answers = picky.predict(images(5, 1), reject=True)
    picky.save_pretrained(tmp_path / "whole", torch.float32)
    picky.set_classnames(classes)
    message = f"exactly the 3 classes it was fitted for, not for these {len(classes)}. Load .*own.*fit-text-probe"
    assert cannot_reject(picky, message)
    assert cannot_reject(copy.deepcopy(picky), message)
    assert cannot_reject(load_head(DCP(tiny_clip, classes, n_ctx=2), tmp_path / "whole").eval(), message)
    picky.save_pretrained(tmp_path / "part", torch.float32)
    loaded = load_head(DCP(tiny_clip, classes, n_ctx=2), tmp_path / "part").eval()
    assert cannot_reject(loaded, "or for other classes or texts than it has now")
    picky.set_classnames(NAMES)
    assert picky.predict(images(5, 1), reject=True) == answers


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.add_class("zebra", images(3, 5)),
        lambda model: model.add_class("kite", images(3, 5)),  # other images of it
        lambda model: model.remove_class("kite"),
    ],
)
def test_a_change_of_the_classes_unsets_it_for_good(picky, tiny_clip, tmp_path, change):
    change(picky)
    assert cannot_reject(
        picky, "no threshold.*too few, or for other classes or texts .* now. dcp-zoo fit-text-probe sets one"
    )
    picky.save_pretrained(tmp_path, torch.float32)
    loaded = load_head(DCP(tiny_clip, picky.classnames, n_ctx=2), tmp_path).eval()
    assert cannot_reject(loaded, "no threshold")
    if "kite" not in picky.classnames:
        picky.add_class("kite", images(12)[2::3])
    picky.set_classnames(NAMES)
    assert cannot_reject(picky, "no threshold")


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
def test_a_file_holds_half_of_the_symmetric_matrix(model, tiny_clip, tmp_path):
    model.save_pretrained(tmp_path, torch.float32)
    path, wanted = tmp_path / "model.safetensors", model.text_probe.metric
    state = load_file(path)
    assert state["classifier.metric"].shape == (len(wanted) * (len(wanted) + 1) // 2,)
    for stored in (state["classifier.metric"], wanted):  # files with the whole matrix are still read
        write_weights(tmp_path, state | {"classifier.metric": stored.contiguous()})
        assert torch.equal(load_head(DCP(tiny_clip, NAMES, n_ctx=2), tmp_path).text_probe.metric, wanted)
    save_file(state | {"classifier.metric": state["classifier.metric"][1:].clone()}, path)
    with pytest.raises(ZooError, match="of another shape: classifier.metric"):
        load_head(DCP(tiny_clip, NAMES, n_ctx=2), tmp_path)
    model.save_pretrained(tmp_path)
    rounded = {name for name, t in load_file(path).items() if name.startswith("classifier.") and t.dtype == torch.half}
    assert rounded == {"classifier.means", "classifier.metric"}  # logits do not depend on them


def test_a_checkpoint_without_some_of_its_tensors_is_refused(model, tiny_clip, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({k: t for k, t in load_file(path).items() if k != "classifier.metric"}, path)
    with pytest.raises(ZooError, match="missing: classifier.metric"):
        load_head(DCP(tiny_clip, NAMES, n_ctx=2), tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("had_its_own", [False, True])
def test_a_state_brings_it_and_a_state_without_it_removes_it(model, tiny_clip, had_its_own):
    x, other = images(5, 1), DCP(tiny_clip, NAMES, n_ctx=2).eval()
    if had_its_own:
        other.text_probe = TextProbe(NAMES, model.num_features)
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
    maps = model.visual.conv1(images(n, seed)).detach()
    return ImageSource(model, items, str, views=torch.stack([maps, maps.flip(-1)]))  # type: ignore[arg-type]


def in_a_cone(counts: list[int], width: int = 24, views: int = 2) -> tuple[torch.Tensor, torch.Tensor, tuple]:
    """Features (V, n, E) of classes with so many images, their labels, and their text logits at CLIP's scale."""
    torch.manual_seed(0)
    labels = torch.cat([torch.full((count,), c) for c, count in enumerate(counts)])
    text = F.normalize(torch.randn(len(counts), width) + 2, dim=-1)
    noise = torch.randn(views, len(labels), width) / 4
    return F.normalize(text[labels] + noise, dim=-1), labels, (100 * text, torch.randn(len(counts)))


@pytest.mark.parametrize("counts", [[4, 4, 4], [1, 20, 3], [5, 0, 5]])
def test_a_penalty_is_a_convex_problem(counts, monkeypatch):
    """The gradient, by hand, is 0: for classes of equal and other sizes, and among those that have images. A class
    without images is not pushed away by the images of the others."""
    views, labels, text = in_a_cone(counts)
    problem = Problem(views, labels, text)
    monkeypatch.setattr("dcp_zoo.model.text_probe.STEPS", 300)
    d = problem.solve(0.1, torch.zeros_like(text[0]))
    rows, y = views.flatten(0, 1), labels.repeat(2)
    has_images = torch.tensor(counts) > 0
    logits = F.linear(rows, *text) + rows @ problem.metric @ d.T
    errors = logits.where(has_images, torch.tensor(-math.inf)).softmax(-1) - F.one_hot(y, 3)
    per_class = len(labels) / sum(count > 0 for count in counts)
    weights = torch.tensor([per_class / (2 * max(count, 1)) for count in counts])[y]
    gradient = (weights[:, None] * errors).T @ rows @ problem.metric + 0.1 * d
    assert gradient.abs().max() < 2e-3
    assert d[has_images].abs().max() > 0.05
    assert not d[~has_images].any()


def test_many_images_take_fewer_steps(monkeypatch):
    """In eight steps the loss comes as near its minimum as stated here; a class without images has a row of 0."""
    problem = Problem(*in_a_cone([120, 0, 60, 20], views=1))
    zero = torch.zeros(4, 24)
    monkeypatch.setattr("dcp_zoo.model.text_probe.STEPS", 1000)
    lowest = [problem.loss(problem.solve(p, zero), p).item() for p in PENALTIES[1:]]
    monkeypatch.setattr("dcp_zoo.model.text_probe.ENOUGH", 100)
    solutions = problem.solutions[1:] @ torch.linalg.inv(problem.metric)
    losses = [problem.loss(d, p).item() for d, p in zip(solutions, PENALTIES[1:], strict=True)]
    assert losses == pytest.approx(lowest, rel=0.05)
    assert losses[0] < 0.9 * problem.loss(zero, 1.0).item()
    assert not solutions[:, 1].any()


@pytest.mark.parametrize("each", [6, 12])
def test_half_whitening(each):
    """P^(1/4) up to scale, for fewer and for more rows than dimensions: features about their mean keep their length;
    without spread within classes, the identity."""
    views, labels, _ = in_a_cone([each] * 3, views=1)
    m, rows = half_whitening(views[0], labels), views[0]
    centred = rows - rows.mean(0)
    assert torch.equal(m, m.T)
    assert (centred @ m).norm() == pytest.approx(centred.norm().item(), rel=1e-4)
    precision = shared_precision(rows, labels, class_means(rows, labels, 3))
    fourth = torch.linalg.matrix_power(m.double(), 4)
    assert close(fourth / fourth.trace(), precision / precision.trace(), 1e-3)
    means = F.normalize(torch.randn(3, 24), dim=-1)
    assert close(half_whitening(means, torch.arange(3)), torch.eye(24), 1e-4)
    assert torch.equal(half_whitening(means[:1], torch.tensor([0])), torch.eye(24))


def test_the_text_scale_follows_the_text():
    """The minimum of the documented loss: near 1 for logits that are right at their scale, smaller for noise."""
    torch.manual_seed(1)
    logits, noise = torch.randn(600, 3), torch.randn(600, 3)
    labels = torch.distributions.Categorical(logits=logits).sample()
    found = fitting.text_scale(logits, labels)
    assert found == pytest.approx(1, abs=0.2)
    assert fitting.text_scale(5 * noise, labels) < 0.1
    log = torch.tensor(found, dtype=torch.float64).log().requires_grad_()
    loss = F.cross_entropy(log.exp() * logits.double(), labels, reduction="sum") + log**2 / 2
    assert torch.autograd.grad(loss, log)[0].abs() < 1e-3


def test_penalties_are_weighed_by_what_was_left_out(monkeypatch):
    views, labels, text = in_a_cone([1, 6, 3])
    left_out = fitting.folds(views, labels, text)
    assert sum(len(y) for _, _, y in left_out) == 9  # all but the only image of its class
    for problem, features, y in left_out:
        kept = {tuple(row) for row in (problem.x @ torch.linalg.inv(problem.metric)).mul(1e4).round().tolist()}
        assert not kept & {tuple(row) for row in features.mul(1e4).round().tolist()}
        assert 0 not in y
    probe, info = fitting.fit_on_features(NAMES, views, labels, text)
    scaled = [probe.text_scale * t for t in text]
    losses = torch.zeros(len(PENALTIES))
    for problem, features, y in fitting.folds(views, labels, scaled):
        for i, rows in enumerate(problem.solutions):
            losses[i] += F.cross_entropy(F.linear(features, *scaled) + features @ rows.T, y, reduction="sum")
    assert probe.evidence.tolist() == pytest.approx((-losses).softmax(0).tolist(), abs=1e-4)
    assert info["selection"] == "cross-validation"
    solutions = Problem(views, labels, scaled).solutions
    assert close(probe.weight, torch.einsum("k,kce->ce", probe.evidence, solutions), 1e-4)
    monkeypatch.setattr(fitting, "ENOUGH", len(labels) - 1)
    (problem, features, y), *others = fitting.folds(views, labels, text)
    assert (len(others), sorted(y.tolist())) == (0, [1, 1, 2])  # of many images the first fold alone


def test_with_one_image_per_class_all_penalties_count_unless_text_explains_little():
    views, labels, (weight, _) = in_a_cone([1, 1, 1])
    assert fitting.folds(views, labels, (weight, torch.zeros(3))) == []  # nothing can be left out
    for text, equal in ((weight, True), (weight.roll(1, 0), False)):
        probe, _ = fitting.fit_on_features(NAMES, views, labels, (text, torch.zeros(3)))
        assert (probe.evidence[0].item() == pytest.approx(1 / len(PENALTIES), abs=1e-6)) is equal
        assert probe.evidence.diff().min() >= 0
        assert not probe.rejects


def test_validation_images_choose_and_set_one_more_scale():
    """t minimises the documented loss, by hand on a grid."""
    views, labels, text = in_a_cone([8, 8, 8])
    features, val, train = views[0, 4::2], labels[4::2].clone(), torch.arange(24) % 8 < 4
    val[::3] = (val[::3] + 1) % 3  # harder than the training images
    probe, info = fitting.fit_on_features(NAMES, views[:, train], labels[train], text, (features, val))
    assert info["selection"] == "few-shot validation images"
    a = fitting.text_scale(F.linear(features, *text), val)
    mixed = a * F.linear(features, *text) + features @ (probe.weight * a / probe.text_scale).T
    losses = [
        F.cross_entropy(t * mixed, val, reduction="sum") + 50 * math.log(t) ** 2 for t in torch.arange(0.5, 2, 0.001)
    ]
    t = 0.5 + 0.001 * int(torch.stack(losses).argmin())
    assert (probe.text_scale / a).item() == pytest.approx(t, abs=2e-3)
    assert 0.01 < abs(t - 1) < 0.45


def test_images_of_other_things_are_counted_by_taking_their_class_away():
    views, labels, text = in_a_cone([10, 10, 10])
    probe, info = fitting.fit_on_features(NAMES, views, labels, text)
    scaled = [probe.text_scale * t for t in text]
    logits, truth = fitting.left_out_logits(fitting.folds(views, labels, scaled))
    mixed = torch.einsum("k,kmc->mc", probe.evidence, logits)
    passed = 0
    for row, y in zip(mixed, truth, strict=True):
        others = torch.cat([row[:y], row[y + 1 :]])
        passed += bool(-others.log_softmax(0).mean() >= probe.threshold)
    assert info["others_accepted"]["0.05"] == round(100 * passed / 30, 1) < 60
    assert [*info["others_accepted"]] == [*info["thresholds"]] == ["0.05", "0.1", "0.2", "0.3"]  # of 30 images
    assert [*info["thresholds"].values()] == sorted(info["thresholds"].values())
    assert [*info["others_accepted"].values()] == sorted(info["others_accepted"].values(), reverse=True)
    assert (in_distribution(mixed) < info["thresholds"]["0.2"]).sum() == 6
    assert fitting.others_accepted(mixed[:, :2], truth.clamp(max=1), probe.threshold) is None


@torch.no_grad()
def test_without_validation_images_zero_shot_clip_stands_for_the_prompts(plain):
    """The prompts have seen the training images: scale and evidence are those of the frozen towers."""
    train = source(plain, 24, 0)
    info = fitting.fit_probe(plain, train)
    views = encode_views(train, plain.encode_prompted, 2)
    assert not close(views, train.features(2))
    zero_shot = plain.scaled(F.normalize(plain.encode_sentences(NAMES, "a photo of a {}."), dim=-1))
    frozen, expected = fitting.fit_on_features(NAMES, views, train.labels, zero_shot)
    assert info["penalty_weights"] == expected["penalty_weights"]
    assert torch.equal(plain.text_probe.threshold, frozen.threshold)
    own = train.features(2)
    text = [plain.text_probe.text_scale * t for t in plain.own_linear()]
    solutions = Problem(own, train.labels, text).solutions
    assert close(plain.text_probe.weight, torch.einsum("k,kce->ce", frozen.evidence, solutions), 1e-3)


def test_classes_with_the_same_images_are_refused(plain):
    views = F.normalize(torch.ones(2, 6, 8), dim=-1)
    with pytest.raises(ZooError, match="same image features: check that each class has its own images"):
        fitting.fit_on_features(NAMES, views, torch.arange(6) % 3, (torch.eye(3, 8), torch.zeros(3)))


@pytest.mark.parametrize("images", [3, 24])
def test_the_validation_images_set_the_threshold(plain, images):
    val = source(plain, 30, 7)
    fitting.fit_probe(plain, source(plain, images, 0), val)
    with torch.no_grad():
        familiar = in_distribution(plain(val.views[0], patches=True))
    assert (familiar >= plain.text_probe.threshold).sum() in (28, 29)  # 95 % of 30
    fitting.fit_probe(plain, source(plain, images, 0), source(plain, 15, 7))  # too few: the training images do
    assert plain.text_probe.rejects == (images == 24)


def test_images_are_mirrored_where_there_are_no_stored_views(plain):
    train = source(plain, 6, 0)
    pixels = images(6)
    read = ImageSource(plain, train.items, str)  # type: ignore[arg-type]
    read.batches = lambda size: [(pixels[:4], train.labels[:4]), (pixels[4:], train.labels[4:])]
    views = read.features(2)
    with torch.no_grad():
        assert close(views, torch.stack([plain.encode_image(pixels), plain.encode_image(pixels.flip(-1))]))


def test_few_images_make_no_threshold(plain):
    assert fitting.fit_probe(plain, source(plain, 12, 0))["val_images"] == 0
    with torch.no_grad():
        assert (in_distribution(plain(images(5, 1))) > plain.text_probe.threshold).all()


@torch.no_grad()
def test_in_half_precision_it_still_rejects_nothing_and_is_saved(model, tmp_path):
    model.half()
    assert model.text_probe.threshold.isfinite()
    assert not model.text_probe.rejects
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
    with pytest.raises(ZooError, match="no threshold.*fit-text-probe"):
        model.predict(x, reject=True)
    familiar = in_distribution(model(x))
    assert close(familiar, -model(x).softmax(-1).log().mean(-1))
    model.text_probe.threshold.copy_(familiar.median())
    found = model.predict(x, reject=True)
    assert [name for name in found if name] == [
        name for name, e in zip(names, familiar, strict=True) if e >= familiar.median()
    ]
    assert model.fuse().info["threshold"] == familiar.median().item()


def test_fitting_needs_a_calibrated_context(tiny_clip):
    uncalibrated = DCP(tiny_clip, NAMES, n_ctx=2).eval()
    with pytest.raises(ZooError, match="store_stats"):
        fitting.fit_probe(uncalibrated, source(uncalibrated, 3, 0))


@torch.no_grad()
def test_the_papers_logits_are_one_argument_away():
    head, plain = (create_model("dcp_mini.digits-16shot", True, classifier=c).eval() for c in (None, "none"))
    x = torch.randn(2, 3, 192, 192)
    assert plain.text_probe is None
    assert close(plain(x), head.clip.logit_scale.exp() * head.encode_image(x) @ head.encode_text().T, 1e-5)
    assert not close(plain(x), head(x), 0.1)
    with pytest.raises(ZooError, match="Unknown classifier 'gaussian': choose from none"):
        create_model("dcp_mini.digits-16shot", True, classifier="gaussian")
