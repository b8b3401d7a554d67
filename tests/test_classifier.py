"""The classifier stage: its equations, its way through checkpoints and states, new classes, and how it is fitted."""

import copy
import io
import json
import math

import pytest
import torch
from helpers import close, loud
from scipy.optimize import minimize
from torch.nn import functional as F

from dcp_zoo.data import Item
from dcp_zoo.errors import ZooError
from dcp_zoo.model.classifier import GaussianClassifier, in_distribution_score
from dcp_zoo.model.dcp import DCP, load_head
from dcp_zoo.training import stage as fitting
from dcp_zoo.training.sources import ImageSource

NAMES = ["bus", "cat", "kite"]


def images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def plain(tiny_clip):
    """A DCP with stored statistics without the stage."""
    model = loud(DCP(tiny_clip, NAMES, n_ctx=2)).eval()
    model.store_stats(images(4))
    return model


@pytest.fixture
def model(plain):
    """The same with a stage."""
    with torch.no_grad():
        stage = GaussianClassifier(NAMES, plain.num_features).fit(plain.encode_image(images(12)), torch.arange(12) % 3)
    stage.alpha.fill_(0.3)
    stage.temperature.fill_(2.0)
    plain.classifier = stage
    return plain


@torch.no_grad()
def test_its_equations(model):
    x, f = images(5, 1), model.encode_image(images(12)).double()
    per_class = [f[c::3] for c in range(3)]
    means = torch.stack([rows.mean(0) for rows in per_class])
    scatter = sum((row - m)[:, None] * (row - m) for rows, m in zip(per_class, means, strict=True) for row in rows)
    p = f.shape[1] * torch.linalg.pinv(scatter + scatter.trace() / 11 * torch.eye(f.shape[1], dtype=torch.float64))
    q = model.encode_image(x).double()
    g = torch.stack([q @ p @ m - m @ p @ m / 2 for m in means], 1)
    text = model.clip.logit_scale.exp() * model.encode_image(x) @ model.encode_text().T
    assert close(model(x), (text + 0.3 * (g - g.mean(1, keepdim=True))) / 2, 1e-5)


@torch.no_grad()
def test_every_path_to_the_logits_has_it(model):
    x = images(5, 1)
    features = model.forward_features(x)
    assert close(model.fuse()(x), model(x))
    assert close(model.forward_head(features), model(x))
    assert close(model.get_classifier()(features), model(x))


@torch.no_grad()
def test_among_classes_of_which_one_was_never_seen_text_decides_alone(model):
    x, before = images(5, 1), model(images(5, 1))
    model.set_classnames(["kite", "zebra", "bus"])
    text = model.clip.logit_scale.exp() * model.encode_image(x) @ model.encode_text().T
    assert close(model(x), text)
    assert close(model.fuse()(x), text)
    model.set_classnames(["kite", "bus"])
    assert close(model(x), before[:, [2, 0]])


@torch.no_grad()
def test_a_class_can_be_added_and_removed(model):
    """Adding a class with the images of a fitted one gives the fitted one's scores."""
    x, before = images(5, 1), model(images(5, 1))
    model.remove_class("kite")
    assert model.classnames == ["bus", "cat"]
    assert close(model(x), before[:, :2])
    model.add_class("kite", images(12)[2::3])
    assert model.classnames == NAMES
    assert close(model(x), before, 1e-4)
    model.add_class("kite", images(3, 5))
    assert model.classnames == NAMES
    assert not close(model(x)[:, 2], before[:, 2], 1e-2)
    with pytest.raises(ZooError, match="class 'dog'"):
        model.remove_class("dog")


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
    before, threshold, picky.info = picky(x), picky.rejection_threshold(), {"metrics": {"top1_stored": 50.0}}
    picky.rename_class("cat", "tabby cat")
    picky.save_pretrained(tmp_path, torch.float32)
    names = ["bus", "tabby cat", "kite"]
    loaded = load_head(DCP(tiny_clip, names, n_ctx=2).eval(), tmp_path)
    assert close(loaded(x), before)
    assert (loaded.rejection_threshold(), picky.classnames) == (threshold, names)
    assert "metrics" in json.loads((tmp_path / "config.json").read_text())["dcp"]
    loaded.add_class("zebra", images(3))
    with pytest.raises(ZooError, match="bus exists already"):
        loaded.rename_class("zebra", "bus")
    with pytest.raises(ZooError, match="Unknown class 'cat'"):
        loaded.rename_class("cat", "dog")


@torch.no_grad()
def test_images_of_a_class_count_if_all_other_classes_have_some(model):
    x = images(5, 1)
    model.set_classnames(["dog", "emu", "bus"])
    text = model(x)
    with pytest.raises(ZooError, match="Images of zebra would have no effect: the head has none of dog, emu, so"):
        model.add_class("zebra", images(3, 5))
    assert model.classnames == ["dog", "emu", "bus"]
    assert torch.equal(model(x), text)
    model.set_classnames(NAMES)  # as the message says
    for seed, name in enumerate(["dog", "emu", "zebra"]):
        model.add_class(name, images(3, 5 + seed))
    every = model(x)
    model.set_classnames(["dog", "emu", "zebra"])
    assert close(model(x), every[:, 3:])
    model.set_classnames([*NAMES, "gnu"])  # a class by its name, which gets images now
    model.add_class("gnu", images(3, 9))
    assert close(model(x)[:, :3], every[:, :3])


def test_without_a_stage_a_class_is_its_name(plain):
    with pytest.raises(ZooError, match="no classifier stage.*fit-classifier.*set_classnames"):
        plain.add_class("zebra", images(2))
    with pytest.raises(
        ZooError, match="cannot reject images: it has no classifier stage. Add one with dcp-zoo fit-classifier.$"
    ):
        plain.predict(images(2), reject=True)


# ------------------------------------------------------------------------------------------------------- the threshold


@pytest.fixture
def picky(model):
    """The model with a threshold that rejects two of five images."""
    with torch.no_grad():
        model.classifier.threshold.copy_(in_distribution_score(model(images(5, 1))).median())
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
    message = f"exactly the 3 classes it was fitted for, not for these {len(classes)}. Load .*own.*fit-classifier"
    assert cannot_reject(picky, message)
    assert cannot_reject(copy.deepcopy(picky), message)
    assert cannot_reject(load_head(DCP(tiny_clip, classes, n_ctx=2), tmp_path / "whole").eval(), message)
    picky.save_pretrained(tmp_path / "part", torch.float32)
    loaded = load_head(DCP(tiny_clip, classes, n_ctx=2), tmp_path / "part").eval()
    seen = set(classes) <= set(NAMES)  # else the stage is not saved
    assert cannot_reject(loaded, "or for other classes or texts than it has now" if seen else "no classifier stage")
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
        picky, "no threshold.*too few, or for other classes or texts .* now. dcp-zoo fit-classifier sets one"
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
    from safetensors.torch import load_file, save_file

    model.save_pretrained(tmp_path, torch.float32)
    path, wanted = tmp_path / "model.safetensors", model.classifier.precision
    state = load_file(path)
    assert state["classifier.precision"].shape == (len(wanted) * (len(wanted) + 1) // 2,)
    for stored in (state["classifier.precision"], wanted):  # files with the whole matrix are still read
        save_file(state | {"classifier.precision": stored.contiguous()}, path)
        assert torch.equal(load_head(DCP(tiny_clip, NAMES, n_ctx=2), tmp_path).classifier.precision, wanted)
    save_file(state | {"classifier.precision": state["classifier.precision"][1:].clone()}, path)
    with pytest.raises(ZooError, match="of another shape: classifier.precision"):
        load_head(DCP(tiny_clip, NAMES, n_ctx=2), tmp_path)


def test_a_checkpoint_without_some_of_its_tensors_is_refused(model, tiny_clip, tmp_path):
    from safetensors.torch import load_file, save_file

    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({k: t for k, t in load_file(path).items() if k != "classifier.precision"}, path)
    with pytest.raises(ZooError, match="missing: classifier.precision"):
        load_head(DCP(tiny_clip, NAMES, n_ctx=2), tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("had_its_own", [False, True])
def test_a_state_brings_it_and_a_state_without_it_removes_it(model, tiny_clip, had_its_own):
    x, other = images(5, 1), DCP(tiny_clip, NAMES, n_ctx=2).eval()
    if had_its_own:
        other.classifier = GaussianClassifier(NAMES, model.num_features)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    other.load_state_dict({k: t for k, t in model.state_dict().items() if not k.startswith("classifier.")})
    assert other.classifier is None


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


def test_the_weights_are_the_posterior_mode():
    torch.manual_seed(0)
    labels = torch.arange(30) % 3
    text, gaussian = torch.randn(30, 3) + F.one_hot(labels, 3), torch.randn(30, 3) + 2 * F.one_hot(labels, 3)
    centre = fitting.prior(4)
    assert centre == (0.25, 2.5)

    def loss(logs):
        z = math.exp(logs[0]) * text + math.exp(logs[1]) * gaussian
        away = sum((a - math.log(b)) ** 2 for a, b in zip(logs, centre, strict=True)) / 2
        return F.cross_entropy(z.double(), labels, reduction="sum").item() + away

    found = minimize(loss, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-9})
    assert fitting.fit_weights(text, gaussian, labels, centre) == pytest.approx(
        [math.exp(x) for x in found.x], rel=1e-3
    )


@torch.no_grad()
def test_fitted_on_views_of_the_training_images(plain):
    train, val = source(plain, 24, 0), source(plain, 30, 7)
    assert fitting.fit_stage(train, val) == {"selection": "few-shot validation images", "val_images": 30}
    rows = torch.cat([plain.encode_image(view, patches=True) for view in train.views])
    expected = GaussianClassifier(NAMES, plain.num_features).fit(rows, train.labels.repeat(2))
    assert close(plain.classifier.weight, expected.weight)


@torch.no_grad()
def test_without_validation_images_zero_shot_clip_and_images_that_were_left_out_decide(plain):
    """Fold 2 of 4 by hand: every fourth image of a class is scored by the Gaussians of the others."""
    train = source(plain, 24, 0)
    fitting.fit_stage(train)
    views, labels = fitting.image_features(train, encoder=plain.encode_prompted), train.labels
    assert not close(views, fitting.image_features(train))  # the prompts have seen these images
    scores = fitting.out_of_fold(views, labels, 3)
    out = torch.zeros(24, dtype=torch.bool)
    out[[3, 4, 5, 15, 16, 17]] = True
    fold = GaussianClassifier(NAMES, plain.num_features)
    fold.fit(views[:, ~out].flatten(0, 1), labels[~out].repeat(2))
    g = views[0] @ fold.weight.T + fold.bias
    assert close(scores[out], g[out] / g[~out].std())

    zero_shot = plain.scaled(F.normalize(plain.encode_sentences(NAMES, "a photo of a {}."), dim=-1))
    untrained = views[0] @ zero_shot[0].T + zero_shot[1]
    u, v = fitting.fit_weights(untrained, scores, labels, fitting.prior(8))
    assert plain.classifier.temperature.item() == pytest.approx(1 / u, rel=1e-3)
    own = fitting.image_features(train)
    combined = u * (own[0] @ zero_shot[0].T + zero_shot[1]) + v * fitting.out_of_fold(own, labels, 3)
    familiar = combined.logsumexp(-1) - combined.mean(-1)
    assert (familiar >= plain.classifier.threshold).sum() in (22, 23)  # 95 % of 24


@pytest.mark.parametrize("images", [3, 24])
def test_the_validation_images_set_the_threshold(plain, images):
    val = source(plain, 30, 7)
    fitting.fit_stage(source(plain, images, 0), val)
    with torch.no_grad():
        familiar = in_distribution_score(plain(val.views[0], patches=True))
    assert (familiar >= plain.classifier.threshold).sum() in (28, 29)  # 95 % of 30
    fitting.fit_stage(source(plain, images, 0), source(plain, 15, 7))  # too few: the training images do
    assert plain.classifier.rejects == (images == 24)


def test_images_are_mirrored_where_there_are_no_stored_views(plain):
    train = source(plain, 6, 0)
    pixels = images(6)
    read = ImageSource(plain, train.items, str)  # type: ignore[arg-type]
    read.batches = lambda size: [(pixels[:4], train.labels[:4]), (pixels[4:], train.labels[4:])]
    views = fitting.image_features(read)
    with torch.no_grad():
        assert close(views, torch.stack([plain.encode_image(pixels), plain.encode_image(pixels.flip(-1))]))


def test_few_images_make_no_threshold(plain):
    assert fitting.fit_stage(source(plain, 12, 0)) == {"selection": "cross-validation", "val_images": 0}
    with torch.no_grad():
        assert (in_distribution_score(plain(images(5, 1))) > plain.classifier.threshold).all()


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
    with pytest.raises(ZooError, match="no threshold.*fit-classifier"):
        model.predict(x, reject=True)
    familiar = in_distribution_score(model(x))
    assert close(familiar, -model(x).softmax(-1).log().mean(-1))
    model.classifier.threshold.copy_(familiar.median())
    found = model.predict(x, reject=True)
    assert [name for name in found if name] == [
        name for name, e in zip(names, familiar, strict=True) if e >= familiar.median()
    ]
    assert model.fuse().info["threshold"] == familiar.median().item()


def test_fitting_needs_a_calibrated_context(tiny_clip):
    with pytest.raises(ZooError, match="store_stats"):
        fitting.fit_stage(source(DCP(tiny_clip, NAMES, n_ctx=2).eval(), 3, 0))
