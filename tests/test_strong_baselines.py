"""ProKeR, SS-Text, GDA, LP++, CLAP, ProLIP, PromptSRC, CLIP-LoRA, CLIP-SVD and 2SFS against a plain implementation of
their equations, on a small CLIP."""

import copy
import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from helpers import Count, close
from test_baselines import NAMES, TEMPLATE, cosine, encode_image, encode_text, fill, logits_of, pixels, task
from torch.func import functional_call
from torch.nn import functional as F

from dcp_zoo import ZooError
from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.inputs import Maps, Pixels
from dcp_zoo.model.prompt_head import PromptHead
from dcp_zoo.model.text_probe import estimates
from dcp_zoo.model.text_probe.folds import within_class
from dcp_zoo.model.towers.open_clip import OpenClipViT
from dcp_zoo.training import loop
from dcp_zoo.training.methods import METHODS, clap, clip_weights, fit_head, lp_plus_plus, prolip, promptsrc
from dcp_zoo.training.methods.base import Task, own_clip
from dcp_zoo.training.methods.clip_lora import add_updates, merge
from dcp_zoo.training.methods.clip_weights import train_weights, zero_shot_of
from dcp_zoo.training.methods.gda import ALPHAS, gaussian_discriminant, out_of_fold
from dcp_zoo.training.methods.proker import BETAS, PENALTIES
from dcp_zoo.training.methods.promptsrc import epoch_weights, new_promptsrc, promptsrc_loss
from dcp_zoo.training.recipes import default_recipe
from dcp_zoo.training.sources import ImageSource, image_source

STRONG = ["proker", "ss-text", "gda", "lp-plus-plus", "clap", "prolip", "promptsrc", "clip-lora", "clip-svd", "2sfs"]
CHOOSING = ["proker", "gda", "lp-plus-plus"]


def with_flips(given: Task) -> Task:
    """Two known views of each training image, as for the miniature: itself and its mirror image."""
    images = pixels(given.train)
    with torch.no_grad():
        maps = torch.stack([given.clip.visual.conv1(x) for x in (images, images.flip(-1))])
    return replace(
        given, train=replace(given.train, views=maps, form=Maps), recipe=given.recipe.updated({"augment": "flip"})
    )


def with_random_features(given: Task) -> Task:
    """Hard to tell apart: noise around the text features, which stands for nine training and 120 validation images."""
    torch.manual_seed(0)
    texts = encode_text(given.clip, fill(TEMPLATE)).detach()
    sources = [replace(given.train), replace(given.train, items=[*given.train.items * 13, *given.train.items[:3]])]
    for source in sources:
        noise = 1.5 * torch.randn(1, len(source.items), texts.shape[1]) / texts.shape[1] ** 0.5
        source._read = F.normalize(texts[source.labels] + noise, dim=-1)
    return replace(given, train=sources[0], val=sources[1])


def relabelled(source: ImageSource, labels: torch.Tensor) -> ImageSource:
    """The first images of a source, with these labels."""
    items = [item._replace(label=int(y)) for item, y in zip(source.items, labels, strict=False)]
    other = replace(source, items=items)
    other._read = source.features()[:, : len(labels)]
    return other


@torch.no_grad()
def plain_features(given: Task) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of training images (9, E), validation images (3, E) and class names (C, E)."""
    sources = given.train, given.val
    train, val = (
        encode_image(given.clip, pixels(s)) if s._read is None else s._read[0][:, : s.clip.num_features]
        for s in sources
    )
    return train, val, encode_text(given.clip, fill(TEMPLATE))


# -------------------------------------------------------------------------------------------------------------- ProKeR


def proker_by_hand(given: Task, beta: float, strength: float) -> torch.Tensor:
    """Logits of the validation images: what ridge regression adds to the cosines is scaled, too."""
    train, val, texts = (t.double() for t in plain_features(given))
    left = F.one_hot(given.train.labels, 3) - train @ texts.T
    similar, queried = (torch.exp(-beta * torch.cdist(x, train).square() / 2) for x in (train, val))
    ridge = torch.linalg.inv(similar + strength * torch.eye(len(train))) @ left
    return (given.clip.clip.logit_scale.exp() * (val @ texts.T + strength * queried @ ridge)).float().detach()


def test_proker(clip, photos):
    given = task("proker", clip, photos, beta=2.0, penalty=0.3)
    found = fit_head("proker", replace(given, val=None))
    torch.testing.assert_close(logits_of(found, given.val), proker_by_hand(given, 2.0, 0.3), rtol=1e-4, atol=1e-3)
    assert found.info == {"beta": 2.0, "lambda": 0.3}


def test_proker_chooses_beta_and_lambda_on_the_validation_images(clip, photos):
    given = with_random_features(task("proker", clip, photos))
    pairs = list(product(BETAS, PENALTIES))
    answers = [proker_by_hand(given, *pair).argmax(-1) for pair in pairs]
    for labels in (given.val.labels, answers[8], answers[-1]):
        hits = [int((answer == labels).sum()) for answer in answers]
        beta, penalty = pairs[hits.index(max(hits))]  # the first, so the smallest
        found = fit_head("proker", replace(given, val=relabelled(given.val, labels)))
        assert found.info == {"beta": beta, "lambda": penalty}
    assert len({tuple(answer.tolist()) for answer in answers}) > 4


# ------------------------------------------------------------------------------------------------------------- SS-Text


@pytest.mark.parametrize("labels", [[0, 0, 0, 0, 0, 0, 1, 1, 2], [0, 0, 0, 2, 2, 2, 2, 2, 2]])  # uneven, one missing
def test_ss_text(labels, clip, photos):
    given = task("ss-text", clip, photos)
    given.train = relabelled(given.train, torch.tensor(labels))
    train, val, texts = plain_features(given)
    weight = texts.clone()
    for f, label in zip(train, labels, strict=True):
        weight[label] += clip.clip.logit_scale.exp().detach() * labels.count(label) / 9 * f
    weight.requires_grad_()
    linear = -cosine(clip, train, weight)[range(9), labels].mean()
    kept = sum((weight[c] - texts[c]).square().sum() / (2 * labels.count(c)) for c in set(labels))
    (gradient,) = torch.autograd.grad(linear + kept, weight)
    assert gradient.abs().max() < 1e-4
    expected = cosine(clip, val, F.normalize(weight, dim=-1)).detach()
    torch.testing.assert_close(logits_of(fit_head("ss-text", given), given.val), expected, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------- GDA


def gaussian_by_hand(x: torch.Tensor, y: torch.Tensor, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The paper's formula as it stands, in float64."""
    x = x.double()
    means = torch.stack([x[y == c].mean(0) for c in range(classes)])
    centred = torch.cat([x[y == c] - means[c] for c in range(classes)])
    n, width = x.shape
    covariance = centred.T.cov()
    precision = width * torch.linalg.pinv((n - 1) * covariance + covariance.trace() * torch.eye(width).double())
    return means @ precision, torch.stack([-m @ precision @ m / 2 for m in means])


@pytest.mark.parametrize(("n", "classes", "width"), [(12, 3, 20), (4, 2, 3), (200, 5, 8), (7, 3, 64)])
def test_gaussian_discriminant(n, classes, width, monkeypatch):
    monkeypatch.setattr(estimates, "ROWS_AT_A_TIME", 5)
    torch.manual_seed(0)
    x = F.normalize(torch.randn(n, width, dtype=torch.float64) + 3, dim=-1)  # in a cone, as CLIP's features
    y = torch.arange(n) % classes
    expected = gaussian_by_hand(x, y, classes)
    for found, wanted in zip(gaussian_discriminant(x, y, classes), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    for found, wanted in zip(gaussian_discriminant(x.float(), y, classes), expected, strict=True):
        assert found.dtype == torch.float32
        assert close(found.double(), wanted)


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_gaussian_discriminant_without_spread_finds_the_nearest_mean(copies):
    """One image per class, also with views that differ by rounding alone."""
    torch.manual_seed(0)
    means, queries = F.normalize(torch.randn(5, 16), dim=-1), F.normalize(torch.randn(40, 16), dim=-1)
    rows = means.repeat(copies, 1)
    rows += 1e-8 * torch.randn_like(rows) * (copies > 1)
    weight, bias = gaussian_discriminant(rows, torch.arange(5).repeat(copies), 5)
    assert torch.equal((queries @ weight.T + bias).argmax(-1), torch.cdist(queries, means).argmin(-1))
    assert 1 < weight.norm(dim=-1).mean() < 100


def test_gaussian_discriminant_of_a_single_class_says_nothing():
    weight, bias = gaussian_discriminant(torch.ones(1, 4), torch.zeros(1, dtype=torch.long), 1)
    assert torch.equal(weight, torch.zeros(1, 4))
    assert torch.equal(bias, torch.zeros(1))


def test_gaussian_discriminant_needs_every_class():
    with pytest.raises(ZooError, match=r"No training image has label 0, 2: every class needs at least one"):
        gaussian_discriminant(torch.ones(2, 4), torch.tensor([1, 1]), 3)


@pytest.mark.parametrize("text", [True, False])
def test_gda(text, clip, photos):
    given = task("gda", clip, photos, alpha=0.5, text=text)
    train, val, texts = plain_features(given)
    weight, bias = gaussian_by_hand(train, given.train.labels, 3)
    expected = 0.5 * (val.double() @ weight.T + bias) + text * cosine(clip, val, texts)
    found = logits_of(fit_head("gda", given), given.val)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)


def test_gda_takes_every_view_as_a_row(clip, photos):
    given = with_flips(task("gda", clip, photos, text=False))
    with torch.no_grad():
        x = pixels(replace(given.train, views=None, form=Pixels))
        rows = torch.cat([encode_image(clip, images) for images in (x, x.flip(-1))])
    weight, bias = gaussian_by_hand(rows, given.train.labels.repeat(2), 3)
    model = fit_head("gda", given)
    assert close(model.weight.double(), weight, 1e-4)
    assert close(model.bias.double(), bias, 1e-4)


def test_gda_takes_random_crops(clip, photos):
    given = task("gda", clip, photos, augment="crop-flip", augment_epochs=2)
    given.train = image_source(clip, photos[:9], "crop-flip")
    views = given.augmented_features(2)
    assert views.shape[:2] == (2, 9)
    assert not torch.allclose(views[0], views[1], atol=1e-3)
    assert given.train._read is None


def test_gda_chooses_alpha_on_the_validation_images(clip, photos):
    given = with_random_features(task("gda", clip, photos))
    train, val, texts = plain_features(given)
    weight, bias = gaussian_by_hand(train, given.train.labels, 3)
    answers = [(cosine(clip, val, texts) + alpha * (val.double() @ weight.T + bias)).argmax(-1) for alpha in ALPHAS]
    for labels in (given.val.labels, *answers):
        hits = [int((answer == labels).sum()) for answer in answers]
        found = fit_head("gda", replace(given, val=relabelled(given.val, labels)))
        assert found.info == {"alpha": ALPHAS[hits.index(max(hits))]}  # the first, so the smallest
    assert len({tuple(answer.tolist()) for answer in answers}) > 4  # alpha makes a difference


def test_gda_without_validation_images_leaves_training_images_out(clip, photos):
    """Fold 1 of 3 by hand: the second image of each class is scored by the Gaussians of the others."""
    given = with_random_features(task("gda", clip, photos))
    train, _, texts = plain_features(given)
    given = replace(given, val=None)
    labels = given.train.labels
    scores = out_of_fold(train[None], labels, 3)
    out = within_class(labels) == 1
    weight, bias = gaussian_by_hand(train[~out], labels[~out], 3)
    assert close(scores[out].double(), train[out].double() @ weight.T + bias, 1e-4)
    found = fit_head("gda", given)
    hits = [int(((cosine(clip, train, texts) + alpha * scores).argmax(-1) == labels).sum()) for alpha in ALPHAS]
    assert found.info == {"alpha": ALPHAS[hits.index(max(hits))], "selection": "cross-validation"}
    few = replace(given, train=relabelled(given.train, torch.arange(3)))  # one image per class
    found = fit_head("gda", few)
    weight, bias = gaussian_discriminant(train[:3], torch.arange(3), 3)
    gaussian = train[:3] @ weight.T + bias
    assert 2 * found.info["alpha"] * gaussian.std() == pytest.approx(
        cosine(clip, train[:3], texts).std().item(), rel=1e-3
    )
    for changes, alpha in (({"text": False}, 1.0), ({"alpha": 0.0}, 0.0)):
        assert fit_head("gda", replace(given, recipe=given.recipe.updated(changes))).info == {"alpha": alpha}


# ---------------------------------------------------------------------------------------------------------------- LP++


def lp_by_hand(given: Task, epochs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """v, b and alpha after some epochs, by autograd and torch's SGD."""
    x, _, texts = plain_features(given)
    y, cosines = given.train.labels, x @ texts.T
    v = torch.stack([x[y == c].sum(0) for c in range(3)]).requires_grad_()
    b = torch.zeros(3, requires_grad=True)
    start = 250 * torch.stack([cosines[y == c, c].mean() for c in range(3)]).mean()
    alpha = start.repeat(3).requires_grad_()
    optimizer = torch.optim.SGD([v, b], 4 * len(x) / torch.linalg.matrix_norm(x, 2).item() ** 2, momentum=0.9)
    for epoch in range(epochs):
        loss = F.cross_entropy(x @ v.T + b + alpha * cosines, y)
        optimizer.zero_grad()
        (gradient,) = torch.autograd.grad(loss, alpha, retain_graph=True)
        loss.backward()
        optimizer.step()
        if (epoch + 1) % 10 == 0:
            alpha.data -= len(x) / (4 * (cosines**2).sum(0).max()) * gradient
    return v.detach(), b.detach(), alpha.detach()


@pytest.mark.parametrize("epochs", [1, 21])
def test_lp_plus_plus(epochs, clip, photos):
    given = task("lp-plus-plus", clip, photos, epochs=epochs)
    v, b, alpha = lp_by_hand(given, epochs)
    _, val, texts = plain_features(given)
    expected = val @ v.T + b + alpha * (val @ texts.T)
    head = fit_head("lp-plus-plus", replace(given, val=None))
    assert close(head.weight - alpha[:, None] * texts, v, 1e-3)
    assert close(head.bias, b, 1e-4)
    torch.testing.assert_close(logits_of(head, given.val), expected, rtol=1e-4, atol=1e-4)
    assert head.info == {}


def test_lp_plus_plus_takes_the_best_epoch(clip, photos):
    given = with_random_features(task("lp-plus-plus", clip, photos, epochs=12))
    answers = []
    for epochs in range(1, 13):
        shorter = replace(given, recipe=given.recipe.updated({"epochs": epochs}), val=None)
        answers.append(logits_of(fit_head("lp-plus-plus", shorter), given.val).argmax(-1))
    found = set()
    for labels in (given.val.labels, answers[0], answers[4]):
        for n in (5, 120):  # few images: many ties
            hits = [int((answer == labels)[:n].sum()) for answer in answers]
            best = max(epoch for epoch in range(1, 13) if hits[epoch - 1] == max(hits))
            head = fit_head("lp-plus-plus", replace(given, val=relabelled(given.val, labels[:n])))
            assert head.info == {"epoch": best}
            assert close(head.bias, lp_by_hand(given, best)[1], 1e-4)
            found.add(best)
    assert len(found) > 2


# ---------------------------------------------------------------------------------------------------------------- CLAP


@pytest.mark.parametrize("unit", [False, True])
def test_clap(unit, clip, photos):
    """Three epochs of one batch, the first at the warm-up's learning rate."""
    given = task("clap", clip, photos, epochs=3, batch_size=256, unit=unit)
    x, _, texts = plain_features(given)
    y = given.train.labels
    ids = clip.tokenizer(fill(TEMPLATE), context_length=len(clip.text.positional_embedding))
    with torch.no_grad():
        start = clip.clip.encode_text(ids, normalize=unit)
        probabilities = cosine(clip, x, texts).softmax(-1)
    strength = torch.stack([probabilities[y == c, c].mean() for c in range(3)])
    w, velocity = start.clone().requires_grad_(), torch.zeros_like(start)
    for lr in (1e-5, 0.1, 0.075):
        logits = cosine(clip, x, F.normalize(w, dim=-1))
        penalty = torch.stack([strength[c] * (w[c] - start[c]).square().sum() for c in range(3)]).mean()
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y) + penalty, w)
        velocity = 0.9 * velocity + gradient
        w = (w - lr * velocity).detach().requires_grad_()
    assert not close(start, w.detach(), 1e-3)
    head, (_, val, _) = fit_head("clap", given), plain_features(given)
    before, after = (clip.scaled(F.normalize(t.detach(), dim=-1))[0] for t in (start, w))
    assert close(head.weight - before, after - before, 1e-2)
    expected = cosine(clip, val, F.normalize(w, dim=-1)).detach()
    torch.testing.assert_close(logits_of(head, given.val), expected, rtol=1e-3, atol=1e-3)


def test_clap_draws_every_row_at_most_once_in_an_epoch():
    rows, labels = torch.randn(18, 5), torch.arange(18) % 3
    stream = clap.random_rows(rows, labels, 4, 2, seed=1)
    epochs = [[next(stream) for _ in range(2)] for _ in range(3)]
    for epoch in epochs:
        drawn, of = (torch.cat(parts) for parts in zip(*epoch, strict=True))
        places = [int((rows == row).all(-1).nonzero()) for row in drawn]
        assert len(set(places)) == 8
        assert torch.equal(labels[places], of)
    assert not torch.equal(epochs[0][0][0], epochs[1][0][0])


def test_clap_trains_on_all_views(clip, photos, monkeypatch):
    drawn, original = [], clap.random_rows
    monkeypatch.setattr(clap, "random_rows", lambda rows, *args: drawn.append(len(rows)) or original(rows, *args))
    fit_head("clap", with_flips(task("clap", clip, photos)))
    assert drawn == [18]


# -------------------------------------------------------------------------------------------------------------- ProLIP


def test_prolip(clip, photos):
    given = task("prolip", clip, photos, epochs=3, lr=0.01)
    assert given.recipe.penalty == 0.25
    model = fit_head("prolip", given)
    start, y = clip.visual.proj.detach(), given.train.labels
    with torch.no_grad():
        text = encode_text(clip, fill(TEMPLATE))
        x = clip.visual.ln_post(hidden(clip, pixels(given.train)))
    p = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([p], 0.01, eps=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    for _ in range(3):
        logits = cosine(clip, F.normalize(x @ p, dim=-1), text)
        loss = F.cross_entropy(logits, y) + 0.25 * F.mse_loss(p, start, reduction="sum")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert close(model.encoder.visual.proj - start, p.detach() - start, 1e-3)
    assert not model.encoder.visual.proj.requires_grad


def hidden(clip: FrozenCLIP, images: torch.Tensor) -> torch.Tensor:
    """The class token (B, Dv) after the last block of the vision tower."""
    visual = clip.visual
    x = visual.conv1(images).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + visual.positional_embedding
    return visual.transformer(visual.ln_pre(x))[:, 0]


def test_prolip_alternates_between_views(clip, photos):
    given = with_flips(task("prolip", clip, photos))
    x = pixels(replace(given.train, views=None, form=Pixels))
    stream = prolip.inputs(given)
    for images in (x, x.flip(-1), x):
        found, labels = next(stream)
        with torch.no_grad():
            expected = clip.visual.ln_post(hidden(clip, images))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(labels, given.train.labels)


def test_prolip_takes_new_crops_in_every_step(clip, photos):
    given = task("prolip", clip, photos, augment="crop-flip")
    given.train = image_source(clip, photos[:9], "crop-flip")
    stream = prolip.inputs(given)
    assert not torch.allclose(next(stream)[0], next(stream)[0], atol=1e-3)


def test_prolip_needs_a_projection(clip, photos):
    clip.visual.proj = None
    with pytest.raises(ZooError, match=r"this CLIP has none: use clip-lora"):
        fit_head("prolip", task("prolip", clip, photos))


# ----------------------------------------------------------------------------------------------------------- CLIP-LoRA


def lora(given: Task, loud: bool = True) -> tuple[FrozenCLIP, torch.nn.ModuleList]:
    """A copy of CLIP with fresh updates, or with B away from 0."""
    torch.manual_seed(2)
    updates = add_updates(model := own_clip(given.clip), given.recipe)
    for update in updates:
        update.b.data += loud * 0.1 * torch.randn_like(update.b)
    return model, updates


def sentences(clip: FrozenCLIP) -> torch.Tensor:
    return clip.tokenizer(fill(TEMPLATE), context_length=len(clip.text.positional_embedding))


def text_features(model: FrozenCLIP, ids: torch.Tensor) -> torch.Tensor:
    return F.normalize(clip_weights.sentence_features(model, ids), dim=-1)


def with_updates(clip: FrozenCLIP, updates: torch.nn.ModuleList) -> dict[str, torch.Tensor]:
    """The attention weights of open_clip's modules with the updates added by hand, differentiable."""
    weights = {}
    for i, update in enumerate(updates):
        key = f"{'visual.' * (i > 3)}transformer.resblocks.{i % 4}.attn.in_proj_weight"
        parts = clip.clip.get_parameter(key).chunk(3)  # of queries, keys and values
        scale = 1 / math.sqrt(update.a.shape[1])
        added = [w + scale * b @ a for w, a, b in zip(parts, update.a, update.b, strict=True)]
        weights[key] = torch.cat(added)
    return weights


@torch.no_grad()
def test_clip_lora_starts_as_open_clip(clip, photos):
    given = task("clip-lora", clip, photos)
    (model, updates), x = lora(given, loud=False), pixels(given.val)
    images, texts, _ = clip.clip(x, sentences(clip))
    torch.testing.assert_close(model.encode_image(x), images, rtol=1e-5, atol=1e-6)
    ids, _ = clip_weights.sentence_ids(clip, NAMES, TEMPLATE)
    assert ids.shape[1] < sentences(clip).shape[1]
    torch.testing.assert_close(text_features(model, ids), texts, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.encode_image(Maps(clip.visual.conv1(x))), images, rtol=1e-5, atol=1e-6)
    for update in updates:  # like a linear layer's weight
        bound = update.a.shape[-1] ** -0.5
        assert 0.8 * bound < update.a.abs().max() <= bound


@pytest.mark.parametrize("rank", [1, 2])
def test_clip_lora_equals_merged_weights(rank, clip, photos):
    given = task("clip-lora", clip, photos, rank=rank)
    (model, updates), x = lora(given), pixels(given.val)
    logits = clip.logits(model.encode_image(x), text_features(model, sentences(clip)))
    images, texts, _ = functional_call(clip.clip, with_updates(clip, updates), (x, sentences(clip)))
    expected = cosine(clip, images, texts)
    assert not close(logits, cosine(clip, *clip.clip(x, sentences(clip))[:2]), 0.01)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    trained = list(updates.parameters())
    slow = torch.autograd.grad(F.cross_entropy(expected, given.val.labels), trained)
    fast = torch.autograd.grad(F.cross_entropy(logits, given.val.labels), trained)
    assert len(trained) == 2 * 8
    for a, b in zip(fast, slow, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    merged = zero_shot_of(merge(model, updates), given)
    torch.testing.assert_close(logits_of(merged, given.val), logits.detach(), rtol=1e-4, atol=1e-4)


def test_clip_lora_trajectory(clip, photos):
    """Steps of AdamW under a cosine, without dropout and with all images in each batch."""
    given = task("clip-lora", clip, photos, dropout=0.0, steps=4, batch_size=9, lr=0.01)
    trained, updates = lora(given, loud=False)
    losses = train_weights(trained, given, updates.parameters(), 4)
    (_, plain), expected = lora(given, loud=False), []
    optimizer = torch.optim.AdamW(plain.parameters(), 0.01, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4, eta_min=1e-6)
    for _ in range(4):
        images, texts, _ = functional_call(clip.clip, with_updates(clip, plain), (pixels(given.train), sentences(clip)))
        loss = F.cross_entropy(cosine(clip, images, texts), given.train.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-3)
    assert expected[3] < expected[0] - 0.01


def test_clip_lora_drops_inputs_in_training_only(clip, photos):
    given = task("clip-lora", clip, photos, dropout=0.5)
    (model, updates), x = lora(given), pixels(given.val)
    assert torch.equal(model.encode_image(x), model.encode_image(x))
    updates.train()
    assert not torch.equal(model.encode_image(x), model.encode_image(x))
    assert not clip.clip.training
    torch.manual_seed(0)
    means = torch.stack([updates[-1](torch.ones(2, 128)) for _ in range(2000)]).mean(0)
    torch.testing.assert_close(means, updates.eval()[-1](torch.ones(2, 128)), rtol=0, atol=0.02)


# ------------------------------------------------------------------------------------------------------------ CLIP-SVD


def decomposed(weight: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The decompositions of queries, keys and values, or of the whole weight; the singular values are trained."""
    parts = weight.chunk(3) if weight.shape[0] == 3 * weight.shape[1] else [weight]
    return [(u, s.requires_grad_(), v) for u, s, v in (torch.linalg.svd(p, full_matrices=False) for p in parts)]


def test_clip_svd(clip, photos):
    """Two steps of AdamW on the singular values, by hand with open_clip's own forward pass."""
    given = task("clip-svd", clip, photos, steps=2, batch_size=9, lr=0.01)
    trained = fit_head("clip-svd", given)

    ends = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    plain = {n: p.detach() for n, p in clip.clip.named_parameters()}
    parts = {n: decomposed(p) for n, p in plain.items() if n.endswith(ends)}
    x, y, ids = pixels(given.train), given.train.labels, sentences(clip)

    def weights() -> dict[str, torch.Tensor]:
        return {n: torch.cat([u @ torch.diag(s) @ v for u, s, v in found]) for n, found in parts.items()}

    def loss() -> torch.Tensor:
        images, texts, _ = functional_call(clip.clip, weights(), (x, ids))
        return F.cross_entropy(cosine(clip, images, texts), y)

    values = [s for found in parts.values() for _, s, _ in found]
    assert len(values) == 8 * 6
    losses, after = adamw(values, loss), weights()
    assert losses[1] < losses[0] - 0.01
    for name, p in trained.encoder.clip.named_parameters():
        assert torch.equal(p, plain[name]) == (name not in after)
    for name, weight in after.items():
        assert close(trained.encoder.clip.get_parameter(name) - plain[name], weight.detach() - plain[name], 1e-2)
    assert [type(m) for m in trained.encoder.clip.modules()] == [type(m) for m in clip.clip.modules()]  # merged


@pytest.mark.parametrize("method", ["clip-lora", "clip-svd"])
def test_updates_of_blocks_need_open_clips_own_towers(method, clip, photos):
    clip.clip.attn_mask = None
    with pytest.raises(ZooError, match=r"open_clip's own ViT and causal text tower.*use 2sfs"):
        fit_head(method, task(method, clip, photos))


# ----------------------------------------------------------------------------------------------------------- PromptSRC


def plain_loss(clip: FrozenCLIP, model: PromptHead, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    f = encode_image(clip, images, list(model.vision_prompts))
    t = encode_text(clip, fill("a photo of a {}."), list(model.text_prompts))
    with torch.no_grad():
        frozen_f = encode_image(clip, images)
        raw = []
        for template in promptsrc.TEMPLATES:
            ids = clip.tokenizer(fill(template), context_length=len(clip.text.positional_embedding))
            raw.append(clip.clip.encode_text(ids))
        frozen_t = F.normalize(sum(raw), dim=-1)
        p = cosine(clip, frozen_f, frozen_t).softmax(-1)
    logits = cosine(clip, f, t)
    kl = (p * (p.log() - logits.log_softmax(-1))).sum() / (len(images) * 3)
    loss = F.cross_entropy(logits, labels) + kl
    return loss + 25 * (t - frozen_t).abs().mean() + 10 * (f - frozen_f).abs().mean()


@pytest.mark.parametrize("depth", [1, 9])
def test_promptsrc(depth, clip, photos):
    given = task("promptsrc", clip, photos, depth=depth)
    torch.manual_seed(0)
    model = new_promptsrc(given)
    assert len(model.text_prompts) == len(model.vision_prompts) == min(depth, 4)
    words = clip.text.token_embedding(clip.tokenizer(["a photo of a"])[0, 1:5])
    assert torch.equal(model.text_prompts[0], words)
    x, y = pixels(given.val), given.val.labels
    loss, own = promptsrc_loss(model, promptsrc.ensemble(clip, NAMES), given.recipe)(x, y)
    expected = plain_loss(clip, model, x, y)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own, F.cross_entropy(model(x), y))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * min(depth, 4)
    slow, fast = torch.autograd.grad(expected, trained), torch.autograd.grad(loss, trained)
    for a, b in zip(fast, slow, strict=True):
        assert b.abs().max() > 0
        assert close(a, b, 1e-3)
    with torch.no_grad():
        texts = encode_text(clip, fill("a photo of a {}."), list(model.text_prompts))
        logits = cosine(clip, encode_image(clip, x, list(model.vision_prompts)), texts)
    torch.testing.assert_close(logits_of(model, given.val), logits, rtol=1e-4, atol=1e-4)


def test_promptsrc_averages_the_prompts_over_epochs(clip, photos):
    """Three epochs of two batches, by hand: SGD with momentum and weight decay, then the Gaussian average."""
    given = task("promptsrc", clip, photos, depth=2, epochs=3, batch_size=4, lr=0.05)
    torch.manual_seed(0)
    plain = new_promptsrc(given)
    trained = [p for p in plain.parameters() if p.requires_grad]
    velocities, averages = ([torch.zeros_like(p) for p in trained] for _ in range(2))
    gauss = [math.exp(-(((e - 1.8) / 1.8) ** 2) / 2) for e in (1, 2, 3)]
    batches = loop._remaining(given.train, given.recipe, given.seed, 2, 0)
    for epoch, lr in enumerate((1e-5, 0.05, 0.0375)):
        for _ in range(2):
            inputs, labels = next(batches)
            gradients = torch.autograd.grad(plain_loss(clip, plain, inputs.x, labels), trained)
            for p, g, velocity in zip(trained, gradients, velocities, strict=True):
                velocity.mul_(0.9).add_(g + 5e-4 * p.detach())
                p.data -= lr * velocity
        for p, average in zip(trained, averages, strict=True):
            average += gauss[epoch] / sum(gauss) * p.detach()
    torch.manual_seed(0)
    found = promptsrc.fit(given)._trained_state().values()
    for p, average, last in zip(found, averages, trained, strict=True):
        torch.testing.assert_close(p, average, rtol=1e-3, atol=1e-5)
        assert not torch.allclose(p, last, atol=1e-4)


def test_epoch_weights():
    weights = epoch_weights(50, 0.6, 0.6)
    assert sum(weights) == pytest.approx(1)
    assert max(range(50), key=weights.__getitem__) == 29  # epoch 30
    assert weights[0] / weights[29] == pytest.approx(math.exp(-((29 / 30) ** 2) / 2))
    assert epoch_weights(20, 0.75, 0.001, run=2) == pytest.approx([0, 1])  # far from the centre, and no underflow


def test_promptsrc_templates():
    assert len(promptsrc.TEMPLATES) == 60
    assert {"a photo of a {}.", "itap of the {}."} < set(promptsrc.TEMPLATES)


# ---------------------------------------------------------------------------------------------------------------- 2SFS


def test_two_stage(clip, photos):
    """Two steps on the norms and two on the classifier, by hand with open_clip's own forward pass."""
    given = task("2sfs", clip, photos, steps=4, first_stage=0.5, batch_size=9, lr=0.01)
    head = fit_head("2sfs", given)

    plain, x, y, ids = copy.deepcopy(clip.clip), pixels(given.train), given.train.labels, sentences(clip)
    names = [n for n, _ in plain.named_parameters() if any(part.startswith("ln_") for part in n.split("."))]
    norms = [plain.get_parameter(n).requires_grad_() for n in names]
    assert len(norms) == 2 * (2 * 8 + 3)

    def logits(weight: torch.Tensor | None = None) -> torch.Tensor:
        images, texts, _ = plain(x, ids)
        return cosine(clip, images, texts if weight is None else F.normalize(weight, dim=-1))

    losses = adamw(norms, lambda: F.cross_entropy(logits(), y))
    weight = plain.encode_text(ids, normalize=True).detach().requires_grad_()
    losses += adamw([weight], lambda: F.cross_entropy(logits(weight), y))
    assert losses[3] < losses[0] - 0.01
    torch.testing.assert_close(logits_of(head, given.train), logits(weight).detach(), rtol=5e-3, atol=5e-3)

    for name, p in clip.clip.named_parameters():
        assert torch.equal(p, head.encoder.clip.get_parameter(name)) == (name not in names)
    moves = [
        torch.cat([(m.get_parameter(n) - clip.clip.get_parameter(n)).flatten() for n in names])
        for m in (head.encoder.clip, plain)
    ]
    assert F.cosine_similarity(*moves, dim=0) > 0.99  # where a gradient is almost 0, AdamW's steps may differ in sign


def adamw(trained: list[torch.Tensor], loss_of) -> list[float]:
    """Two steps."""
    optimizer, losses = torch.optim.AdamW(trained, 0.01, weight_decay=0.01), []
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2, eta_min=1e-6)
    for _ in range(2):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def test_two_stage_shares_out_its_steps(clip, photos):
    recipe = METHODS["2sfs"].recipe("dcp_vitb16", "caltech101", 4, "few-shot")
    assert (recipe.steps, recipe.first_stage) == (1200, 0.6)
    with pytest.raises(ZooError, match=r"first_stage must be from 0 to 1, not 1\.5"):
        recipe.updated({"first_stage": 1.5})
    given = task("2sfs", clip, photos, steps=2, first_stage=1.0)
    model = fit_head("2sfs", given)
    texts = F.normalize(model.encoder.clip.encode_text(sentences(clip)), dim=-1)
    assert close(model.weight, model.encoder.scaled(texts)[0].detach())


def test_two_stage_trains_its_classifier_on_known_views(clip, photos, monkeypatch):
    given = with_flips(task("2sfs", clip, photos, steps=6, first_stage=0.0))
    embedded = Count(monkeypatch, OpenClipViT, "embed")
    fit_head("2sfs", given)
    assert embedded.calls == 2  # once for each view
    assert given.train._read is None


# -------------------------------------------------------------------------------------------- properties of all of them


@pytest.mark.parametrize("method", [m for m in STRONG if m not in CHOOSING])
def test_methods_without_selection_ignore_the_validation_images(method, clip, photos):
    given = task(method, clip, photos)
    with_val, without = (fit_head(method, replace(given, val=val)) for val in (given.val, None))
    assert torch.equal(logits_of(with_val, given.val), logits_of(without, given.val))
    assert with_val.info == {}


@pytest.mark.parametrize("method", STRONG)
def test_one_shot_and_two_classes(method, clip, photos):
    """And validation images for one of the classes only."""
    given = task(method, clip, photos)
    given = replace(
        given,
        classnames=NAMES[:2],
        train=image_source(clip, photos[:2]),
        val=image_source(clip, photos[3:4]) if method in CHOOSING else None,
    )
    logits = logits_of(fit_head(method, given), image_source(clip, photos))
    assert logits.shape == (12, 2)
    assert logits.isfinite().all()


@pytest.mark.parametrize("method", ["gda", "clap", "lp-plus-plus"])
def test_missing_training_images(method, clip, photos):
    given = task(method, clip, photos)
    given.train = image_source(clip, [item for item in photos if item.label != 1])
    with pytest.raises(ZooError, match="No training image has label 1"):
        fit_head(method, given)


@pytest.mark.parametrize("method", ["clap", "prolip", "promptsrc", "clip-lora", "clip-svd", "2sfs"])
def test_training_in_half_precision(method, clip, photos):
    given = task(method, clip, photos)
    heads = [fit_head(method, replace(given, precision=p)) for p in ("float32", "bfloat16")]
    fitted = [logits_of(head, given.val) for head in heads]
    assert close(fitted[1], fitted[0], 0.2)  # bfloat16 keeps 8 bits: the runs drift apart
    assert fitted[1].dtype == torch.float32


@pytest.mark.parametrize("method", ["coop", "clap", "promptsrc", "clip-lora", "2sfs"])
def test_training_on_random_crops(method, clip, photos):
    given = task(method, clip, photos, augment="crop-flip", **({"augment_epochs": 2} if method == "clap" else {}))
    given.train = image_source(clip, photos[:9], "crop-flip")
    assert logits_of(fit_head(method, given), given.val).shape == (3, 3)
    assert given.train._read is None


@pytest.mark.parametrize("method", ["clap", "promptsrc", "clip-lora", "2sfs"])
def test_divergence_is_reported(method, clip, photos):
    changes = {"lr": 1e30} | ({"warmup_lr": 1e30} if method in ("clap", "promptsrc") else {})
    with pytest.raises(ZooError, match=r"Training diverged: the loss of step \d+ is (nan|inf).*--set lr="):
        fit_head(method, task(method, clip, photos, **changes))


def test_no_augmentation_means_the_first_view_alone(clip, photos):
    flipped = with_flips(task("gda", clip, photos))
    plain = replace(flipped, recipe=flipped.recipe.updated({"augment": "none"}))
    assert (len(flipped.augmented_features(1)), len(plain.augmented_features(1))) == (2, 1)
    assert (len(flipped.train_images.views), len(plain.train_images.views)) == (2, 1)


# ------------------------------------------------------------------------------------------------------------- recipes


def recipe(method: str, shots: int = 16, protocol: str = "few-shot", model: str = "dcp_vitb16"):
    return METHODS[method].recipe(model, "caltech101", shots, protocol)


def test_published_recipes():
    clap = recipe("clap")
    assert (clap.optimizer, clap.lr, clap.momentum, clap.weight_decay) == ("sgd", 0.1, 0.9, 0)
    assert (clap.batch_size, clap.epochs, clap.augment_epochs, clap.augment) == (256, 300, 20, "crop-flip")
    assert [recipe("prolip", k).penalty for k in (1, 2, 16)] == [1, 0.5, 1 / 16]
    assert (recipe("prolip").lr, recipe("prolip").eps, recipe("prolip").epochs) == (1e-5, 1e-4, 300)
    assert (recipe("lp-plus-plus").epochs, recipe("lp-plus-plus").augment) == (300, "none")
    lora = recipe("clip-lora", 4)
    assert (lora.rank, lora.alpha, lora.dropout, lora.lr, lora.weight_decay) == (2, 1, 0.25, 2e-4, 1e-2)
    assert (lora.batch_size, lora.steps) == (32, 2000)
    proker = [recipe("proker", k) for k in (1, 2, 3, 4, 8, 16, 40)]
    assert [r.beta for r in proker] == [3, 2.6, 2.6, 1.5, 1.66, 1.7, 1.7]
    assert [r.penalty for r in proker] == [0.05, 0.05, 0.05, 0.05, 0.07, 0.1, 0.1]
    svd = recipe("clip-svd", 4)
    assert (svd.lr, svd.weight_decay, svd.batch_size, svd.steps, svd.augment) == (5e-4, 1e-2, 32, 800, "crop-flip")
    assert recipe("2sfs", 1).steps == 300
    few, base, cross = (recipe("promptsrc", 16, p) for p in ("few-shot", "base-to-new", "cross-dataset"))
    assert (few.lr, few.batch_size, few.n_ctx, few.depth, few.epochs) == (0.0025, 4, 4, 9, 50)
    assert [(r.epochs, r.depth, r.average_mean * r.epochs, r.average_std * r.epochs) for r in (few, base, cross)] == [
        (50, 9, 30, 30),
        (20, 9, 15, 1),
        (20, 3, 6, 10),
    ]


def test_the_miniature_changes_augmentation_and_rates():
    """Except for PromptSRC, which has the budget of all prompt methods."""
    rates = {"prolip": {"lr": 1e-3}, "clip-lora": {"lr": 4e-3, "steps": 1600}}
    for method in STRONG:
        mini, big = (recipe(method, model=model) for model in ("dcp_mini", "dcp_vitb16"))
        if method != "promptsrc":
            assert mini == replace(big, augment=mini.augment, **rates.get(method, {}))
            assert mini.augment == ("none" if method in ("ss-text", "lp-plus-plus") else "flip")
    budget = recipe("promptsrc", model="dcp_mini")
    assert (budget.epochs, budget.batch_size, budget.lr) == (default_recipe("dcp_mini").epochs, 32, 4e-3)


@pytest.mark.parametrize(
    "field",
    "gda.augment_epochs clap.augment_epochs prolip.epochs lp-plus-plus.epochs clip-lora.rank clip-lora.steps "
    "2sfs.batch_size promptsrc.epochs promptsrc.depth tip-adapter-f.batch_size coop.n_ctx maple.n_ctx vpt-deep.n_ctx "
    "dcp.stop_epoch".split(),
)
def test_recipes_refuse_zeros(field):
    method, _, name = field.partition(".")
    with pytest.raises(ZooError, match=f"{name} must be at least 1, not 0"):
        recipe(method).updated({name: 0})


def test_cosine():
    found = [loop.cosine(2.0, 4, 0.5)(step) for step in range(5)]
    half = 0.75 * math.cos(math.pi / 4)
    assert found == pytest.approx([2, 1.25 + half, 1.25, 1.25 - half, 0.5])


def test_step_sizes_of_lp_plus_plus():
    x, text = torch.eye(2), torch.tensor([[0.6, 0.8]])
    assert lp_plus_plus.step_sizes(x, text) == pytest.approx((8.0, 0.5))
