"""Every baseline of DCP against a plain implementation of its equations, on a small CLIP."""

import pickle
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from torch.nn import functional as F

from dcp_zoo import ZooError
from dcp_zoo.data import Item
from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.head import Head
from dcp_zoo.model.inputs import Features, Maps
from dcp_zoo.model.text_probe.estimates import text_scale
from dcp_zoo.model.text_probe.folds import within_class
from dcp_zoo.training.evaluation import predict, top1
from dcp_zoo.training.methods import METHODS, fit_head
from dcp_zoo.training.methods.base import Task
from dcp_zoo.training.methods.maple import new_maple
from dcp_zoo.training.methods.tip_adapter import cache_head, train_keys
from dcp_zoo.training.methods.zero_shot import ENSEMBLE
from dcp_zoo.training.recipes import default_recipe
from dcp_zoo.training.sources import ImageSource, image_source

NAMES = ["red", "blue_sky", "dark green"]
TEMPLATE = "a picture of a {}."
QUICK = {"epochs": 3, "batch_size": 4}
OPTIONS = {
    "dcp": QUICK | {"depth": 3},
    "coop": QUICK | {"n_ctx": 3},
    "vpt-deep": QUICK | {"n_ctx": 3},
    "maple": QUICK | {"depth": 3},
}
OPTIONS |= {"promptsrc": QUICK | {"depth": 3}, "clap": QUICK, "prolip": {"epochs": 3}, "lp-plus-plus": {"epochs": 20}}
OPTIONS |= {name: {"steps": 3, "batch_size": 4} for name in ("clip-lora", "clip-svd")}
OPTIONS |= {"2sfs": {"steps": 5, "batch_size": 4}}


def task(method: str, clip: FrozenCLIP, photos: list[Item], **options) -> Task:
    """Trained on the first nine photos, without augmentation, validated on the last three."""
    recipe = METHODS[method].recipe("dcp_vitb16", "caltech101", 4, "few-shot")
    recipe = recipe.updated({"augment": "none"} | OPTIONS.get(method, {}) | options)
    train, val = (image_source(clip, items) for items in (photos[:9], photos[9:]))
    return Task(clip, "dcp_vitb16", NAMES, TEMPLATE, train, val, recipe, seed=1)


def pixels(source: ImageSource) -> torch.Tensor:
    return torch.cat([inputs.x for inputs, _ in source.batches(5)])


def logits_of(head: Head, source: ImageSource) -> torch.Tensor:
    return predict(head, source, 64)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "linear-probe"])
def test_class_names_that_the_text_tower_would_cut_are_refused(method, clip, photos):
    """By every method with one message: two of them could become the same."""
    names = ["ant", "bee", f"{'cat ' * 80}cub"]
    with pytest.raises(ZooError, match=r"takes \d+ tokens, but only \d+ are left.*: shorten it"):
        fit_head(method, replace(task(method, clip, photos), classnames=names))


def test_dcp_without_augmentation_trains_on_plain_images(clip, photos, monkeypatch):
    """Although a trial before it may have left both views in the cache."""
    seen = []

    def watched(head, source, *args, **options):
        seen.append(source)
        raise InterruptedError

    monkeypatch.setattr("dcp_zoo.training.methods.base.train", watched)
    given = task("dcp", clip, photos)
    given.train.views, given.train.form = torch.randn(2, 9, 128, 4, 4), Maps
    with pytest.raises(InterruptedError):
        fit_head("dcp", given)
    assert torch.equal(seen[0].views, given.train.views[:1])


# ----------------------------------------------------------------------------------- the towers, implemented plainly


def encode_image(clip: FrozenCLIP, images: torch.Tensor, prompts: list[torch.Tensor] = []) -> torch.Tensor:  # noqa: B006
    """The vision tower with all tokens in every block; prompts (M, Dv) replace the last M tokens before each block."""
    visual = clip.visual
    x = visual.conv1(images).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + visual.positional_embedding
    for i, block in enumerate(visual.transformer.resblocks):
        if i == 0:
            x = visual.ln_pre(torch.cat([x, *[p.expand(len(x), -1, -1) for p in prompts[:1]]], 1))
        elif i < len(prompts):
            x = torch.cat([x[:, : -len(prompts[i])], prompts[i].expand(len(x), -1, -1)], 1)
        x = block(x)
    return F.normalize(visual.ln_post(x)[:, 0] @ visual.proj, dim=-1)


def encode_text(clip: FrozenCLIP, sentences: list[str], prompts: list[torch.Tensor] = []) -> torch.Tensor:  # noqa: B006
    """The text tower with the full context in every block; prompts (M, Dt) replace the tokens after the start."""
    text = clip.text
    ids = clip.tokenizer(sentences, context_length=len(text.positional_embedding))
    x = text.token_embedding(ids)
    for i, block in enumerate(text.transformer.resblocks):
        if i < len(prompts):
            m = len(prompts[i])
            x = torch.cat([x[:, :1], prompts[i].expand(len(x), -1, -1), x[:, 1 + m :]], 1)
        x = block(x + text.positional_embedding if i == 0 else x, attn_mask=text.attn_mask)
    x = text.ln_final(x)[torch.arange(len(x)), ids.argmax(-1)]
    return F.normalize(x @ text.text_projection, dim=-1)


def cosine(clip: FrozenCLIP, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    return clip.clip.logit_scale.exp() * images @ texts.T


def fill(template: str) -> list[str]:
    return [template.format(name.replace("_", " ")) for name in NAMES]


# ---------------------------------------------------------------------------------------------- each method's equations


@torch.no_grad()
@pytest.mark.parametrize(("method", "templates"), [("zero-shot", ()), ("zero-shot-ensemble", ENSEMBLE)])
def test_zero_shot(method, templates, clip, photos):
    given = task(method, clip, photos)
    texts = sum(encode_text(clip, fill(t)) for t in (TEMPLATE, *templates))
    expected = cosine(clip, encode_image(clip, pixels(given.val)), F.normalize(texts, dim=-1))
    torch.testing.assert_close(logits_of(fit_head(method, given), given.val), expected, rtol=1e-4, atol=1e-4)


def test_linear_probe_minimises_the_penalised_loss(clip, photos):
    """Of images and their mirror images, which weigh as much as one, up to the scale of its logits."""
    given = task("linear-probe", clip, photos, C=2.0)
    probe = fit_head("linear-probe", given)
    with torch.no_grad():
        images = pixels(given.train)
        x = torch.cat([encode_image(clip, images), encode_image(clip, images.flip(-1))])
    labels, scale = given.train.labels.repeat(2), probe.info["scale"]
    weight, bias = ((t / scale).requires_grad_() for t in probe.linear())
    objective = F.cross_entropy(x @ weight.T + bias, labels, reduction="sum") + (weight**2).sum() / 2
    for gradient in torch.autograd.grad(objective, (weight, bias)):
        assert gradient.abs().max() < 1e-2
    expected = scale * (x[: len(images)] @ weight.T + bias)
    torch.testing.assert_close(logits_of(probe, given.train), expected.detach(), rtol=1e-3, atol=1e-3)


def test_linear_probe_of_two_classes(clip, photos):
    """For which scikit-learn fits a single row of weights."""
    given = task("linear-probe", clip, photos, C=2.0)
    given = replace(given, classnames=NAMES[:2], train=image_source(clip, [p for p in photos if p.label < 2]), val=None)
    probe, (x, mirrored) = fit_head("linear-probe", given), given.plain_train.features(2).numpy()
    labels = given.train.labels.repeat(2).numpy()
    fitted = LogisticRegression(C=1.0, max_iter=1000).fit(np.concatenate([x, mirrored]), labels)
    second = probe.info["scale"] * torch.from_numpy(fitted.decision_function(x)).float()
    expected = torch.stack([torch.zeros_like(second), second], 1).softmax(1)
    torch.testing.assert_close(logits_of(probe, given.train).softmax(-1), expected, rtol=1e-3, atol=1e-4)


def test_linear_probe_is_scaled_by_the_loss_on_images_left_out(clip, photos):
    """As scikit-learn leaves them out; validation images change nothing."""
    given = task("linear-probe", clip, photos)
    given = replace(given, train=replace(given.train, views=given.train.features(1), form=Features))
    probe, x, y = fit_head("linear-probe", given), given.train.views[0].numpy(), given.train.labels
    folds = PredefinedSplit((within_class(y) % min(4, int(torch.bincount(y).max()))).numpy())
    z = cross_val_predict(LogisticRegression(C=10, max_iter=1000), x, y, cv=folds, method="decision_function")
    assert probe.info["scale"] == pytest.approx(text_scale(torch.tensor(z), y), rel=0.01)
    assert fit_head("linear-probe", replace(given, val=None)).info == probe.info
    alone = given.train.of([0, 1, 2])  # one image per class: nothing is left out
    assert fit_head("linear-probe", replace(given, train=alone)).info == {"scale": 4.0}


@torch.no_grad()
def test_tip_adapter(clip, photos):
    given = task("tip-adapter", clip, photos)
    adapter = fit_head("tip-adapter", replace(given, val=None))
    train, test = (encode_image(clip, pixels(source)) for source in (given.train, given.val))
    expected = cosine(clip, test, encode_text(clip, fill(TEMPLATE)))
    for i in range(len(test)):
        for key, label in zip(train, given.train.labels, strict=True):
            expected[i, label] += 1.0 * torch.exp(-1.0 * (1 - test[i] @ key))
    torch.testing.assert_close(logits_of(adapter, given.val), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["tip-adapter", "tip-adapter-f"])
def test_tip_adapter_chooses_alpha_and_beta_on_the_validation_images(method, clip, photos):
    given = task(method, clip, photos)
    adapter, start = fit_head(method, given), fit_head(method, replace(given, val=None))
    labels = given.val.labels
    assert top1(logits_of(adapter, given.val), labels) >= top1(logits_of(start, given.val), labels)
    assert adapter.info == {"alpha": round(adapter.alpha.item(), 4), "beta": round(adapter.beta.item(), 4)}
    assert 0.1 <= adapter.alpha <= 50
    assert 0.1 <= adapter.beta <= 50
    assert (start.alpha, start.beta) == (1.0, 1.0)


def test_tip_adapter_averages_the_views_of_an_image(clip, photos):
    given = task("tip-adapter", clip, photos, augment="flip")
    views = torch.stack([pixels(given.train), pixels(given.train).flip(-1)])
    with torch.no_grad():
        maps = torch.stack([clip.visual.conv1(view) for view in views])
        expected = F.normalize(encode_image(clip, views[0]) + encode_image(clip, views[1]), dim=-1)
    adapter = cache_head(replace(given, train=replace(given.train, views=maps, form=Maps)), 1.0)
    torch.testing.assert_close(adapter.keys, expected, rtol=1e-4, atol=1e-4)


def test_tip_adapter_takes_new_crops_for_its_keys(clip, photos):
    given = task("tip-adapter", clip, photos, augment="crop-flip", augment_epochs=2)
    given.train = image_source(clip, photos[:9], "crop-flip")
    plain = image_source(clip, photos[:9]).features()[0]
    keys = fit_head("tip-adapter", given).keys
    assert keys.shape == plain.shape
    assert not torch.allclose(keys, plain, atol=1e-3)
    torch.testing.assert_close(keys.norm(dim=-1), torch.ones(9))


def test_tip_adapter_f_takes_the_first_step_of_adamw(clip, photos):
    """One step of AdamW moves every value by the learning rate times g / (|g| + eps), and decays it."""
    given = task("tip-adapter-f", clip, photos, epochs=1)
    adapter = cache_head(given, given.recipe.alpha)
    before, values = adapter.keys.clone(), F.one_hot(given.train.labels, 3).float()
    train_keys(adapter, given)
    keys = before.clone().requires_grad_()
    with torch.no_grad():
        x, texts = encode_image(clip, pixels(given.train)), encode_text(clip, fill(TEMPLATE))
    logits = cosine(clip, x, texts) + torch.exp(-(1 - x @ keys.T)) @ values
    (g,) = torch.autograd.grad(F.cross_entropy(logits, given.train.labels), keys)
    expected = before * (1 - 1e-3 * 0.01) - 1e-3 * g / (g.abs() + 1e-4)
    torch.testing.assert_close(adapter.keys, expected, rtol=1e-4, atol=1e-5)


def test_coop(clip, photos):
    given = task("coop", clip, photos)
    model = fit_head("coop", given)
    model.text_prompts.requires_grad_()
    texts = encode_text(clip, fill("X X X {}."), list(model.text_prompts))
    expected = cosine(clip, encode_image(clip, pixels(given.val)), texts)
    check(model, given, expected)


@pytest.mark.parametrize("depth", [1, 2, 12])
def test_vpt(depth, clip, photos):
    given = task("vpt-deep", clip, photos, depth=depth)
    model = fit_head("vpt-deep", given)
    model.vision_prompts.requires_grad_()
    assert len(model.vision_prompts) == min(depth, 4)
    images = encode_image(clip, pixels(given.val), list(model.vision_prompts))
    check(model, given, cosine(clip, images, encode_text(clip, fill(TEMPLATE))))


@pytest.mark.parametrize("depth", [1, 2, 9])
def test_maple(depth, clip, photos):
    given = task("maple", clip, photos, depth=depth)
    model = new_maple(given)
    assert len(model.text_prompts) == min(depth, 4)
    start = clip.text.token_embedding(clip.tokenizer(["a photo"])[0, 1:3])
    assert torch.equal(model.text_prompts[0], start)
    vision = [p @ f.weight.T + f.bias for p, f in zip(model.text_prompts, model.couplings, strict=True)]
    texts = encode_text(clip, fill("a photo of a {}."), list(model.text_prompts))
    check(model, given, cosine(clip, encode_image(clip, pixels(given.val), vision), texts))


def check(model, given: Task, expected: torch.Tensor) -> None:
    """Logits and the gradients of all trained parameters equal those of the plain computation."""
    torch.testing.assert_close(logits_of(model, given.val), expected.detach(), rtol=1e-4, atol=1e-4)
    trained = [p for p in model.parameters() if p.requires_grad]
    slow = torch.autograd.grad(F.cross_entropy(expected, given.val.labels), trained)
    fast = torch.autograd.grad(F.cross_entropy(model(pixels(given.val)), given.val.labels), trained)
    for a, b in zip(fast, slow, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


# -------------------------------------------------------------------------------------------- properties of all methods


@pytest.mark.parametrize("method", METHODS)
def test_properties_of_every_method(method, clip, photos):
    before = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    first, second = (fit_head(method, task(method, clip, photos)) for _ in range(2))
    test = image_source(clip, photos)
    logits = logits_of(first, test)
    assert logits.shape == (12, 3)
    assert torch.equal(logits, logits_of(second, test))
    assert all(torch.equal(tensor, before[name]) for name, tensor in clip.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in clip.parameters())
    assert not clip.clip.training
    alone = logits_of(first, image_source(clip, photos[2:3]))
    torch.testing.assert_close(logits[2:3], alone, rtol=1e-4, atol=1e-4)
    (check_new_classes if METHODS[method].abilities.transfers else check_closed)(method, first, test)


def check_new_classes(method, head, test: ImageSource) -> None:
    before = logits_of(head, test)
    probed = method in ("text-probe", "dcp")  # a text probe counts among the classes it was fitted on
    head.set_classnames([*reversed(NAMES), *(() if probed else ("cat",))])
    after = logits_of(head, test)
    torch.testing.assert_close(after[:, :3].flip(-1), before, rtol=1e-4, atol=1e-4)
    head.set_classnames(NAMES, "art of a {}")
    changed = not torch.allclose(logits_of(head, test), before, atol=1e-3)
    assert changed == (method not in ("coop", "maple", "promptsrc", "dcp"))  # their prompts are the template
    with pytest.warns(UserWarning, match="Repeated"):
        head.set_classnames(["cat", "cat"])


def check_closed(method, head, test: ImageSource) -> None:
    before = logits_of(head, test)
    with pytest.raises(ZooError, match=f"A head of {method} is limited to its classes.*zero-shot"):
        head.set_classnames(["cat"])
    head.set_classnames(NAMES[:0:-1])
    torch.testing.assert_close(logits_of(head, test), before[:, [2, 1]])


@pytest.mark.parametrize("method", ["tip-adapter-f", "coop", "vpt-deep", "maple"])
def test_training_lowers_the_loss(method, clip, photos):
    more = {"lr": 0.05, "epochs": 8} if method != "tip-adapter-f" else {"lr": 0.01, "alpha": 3.0}
    given = replace(task(method, clip, photos, **more), val=None)
    losses = [
        F.cross_entropy(logits_of(fit_head(method, replace(given, recipe=recipe)), given.train), given.train.labels)
        for recipe in (given.recipe.updated({"lr": 0.0}), given.recipe)
    ]
    assert losses[1] < losses[0] - 0.01


def test_image_features_are_computed_once_for_a_source(clip, photos, monkeypatch):
    test = image_source(clip, photos)
    fitted = [fit_head(m, task(m, clip, photos)) for m in ("zero-shot", "linear-probe", "tip-adapter", "coop")]
    first = logits_of(fitted[0], test)
    monkeypatch.setattr(FrozenCLIP, "encode_image", None)
    assert all(logits_of(head, test).shape == first.shape for head in fitted)


# ------------------------------------------------------------------------------------------------------------- recipes


def test_published_recipes():
    def recipe(method, shots=16, protocol="few-shot", dataset="caltech101"):
        return METHODS[method].recipe("dcp_vitb16", dataset, shots, protocol)

    assert [recipe("coop", k).epochs for k in (1, 2, 4, 8, 16)] == [50, 100, 100, 200, 200]
    assert recipe("coop", dataset="imagenet").epochs == 50
    coop = recipe("coop")
    assert (coop.n_ctx, coop.optimizer, coop.lr, coop.batch_size, coop.warmup_lr) == (16, "sgd", 0.002, 32, 1e-5)
    maple = recipe("maple", protocol="base-to-new")
    assert (maple.n_ctx, maple.depth, maple.lr, maple.batch_size, maple.epochs) == (2, 9, 0.0035, 4, 5)
    away = recipe("maple", protocol="cross-dataset")
    assert (away.lr, away.epochs, away.depth) == (0.0026, 2, 3)
    vpt = recipe("vpt-deep", protocol="base-to-new")
    assert (vpt.lr, vpt.batch_size, vpt.epochs, vpt.optimizer) == (0.0025, 4, 5, "sgd")
    tip = recipe("tip-adapter-f")
    assert (tip.lr, tip.eps, tip.batch_size, tip.epochs, tip.augment) == (1e-3, 1e-4, 256, 20, "crop-flip")


@pytest.mark.parametrize("method", ["coop", "vpt-deep", "maple"])
def test_the_miniature_trains_all_prompts_with_the_budget_of_its_dcp_recipe(method):
    recipe, dcp = METHODS[method].recipe("dcp_mini", "caltech101", 16, "few-shot"), default_recipe("dcp_mini")
    assert (recipe.lr, dcp.lr) == (4e-3, 2e-3)
    for name in ("optimizer", "warmup_lr", "weight_decay", "batch_size", "epochs", "augment"):
        assert getattr(recipe, name) == getattr(dcp, name)


def test_options_change_a_recipe():
    recipe = METHODS["tip-adapter"].recipe("dcp_mini", "caltech101", 16, "few-shot")
    assert recipe.updated({"alpha": 2.0}).alpha == 2.0
    with pytest.raises(ZooError, match=r"lr is none of augment, classifier, augment_epochs"):
        recipe.updated({"lr": 1.0})


def test_the_table_names_every_method():
    assert all(name == method.name and method.title and method.reference for name, method in METHODS.items())
    assert not any(m.trains for m in METHODS.values() if m.name.startswith("zero-shot"))


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_explains_its_fields_and_reaches_workers(method):
    kind = METHODS[method].config
    assert all(part.metadata["help"] for part in fields(kind))
    recipe = METHODS[method].recipe("dcp_mini", "caltech101", 2, "few-shot")
    assert type(recipe) is kind
    assert pickle.loads(pickle.dumps(recipe)) == recipe
