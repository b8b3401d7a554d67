"""Every method of the table against a plain implementation of its equations, on a small CLIP."""

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from itertools import product

import pytest
import torch
from helpers import close
from scipy.optimize import minimize_scalar
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from dcp_zoo import ZooError
from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.backbone.inputs import Features, Pixels
from dcp_zoo.data import Item
from dcp_zoo.heads.head import Head
from dcp_zoo.training.evaluation import read, top1
from dcp_zoo.training.methods import METHODS, fit_head, promptsrc
from dcp_zoo.training.methods.base import Task
from dcp_zoo.training.methods.caches import BETAS, PENALTIES
from dcp_zoo.training.methods.gda import ALPHAS, gaussian_discriminant
from dcp_zoo.training.methods.zero_shot import ENSEMBLE
from dcp_zoo.training.recipes import default_recipe
from dcp_zoo.training.sources import ImageSource, image_source

pytestmark = pytest.mark.filterwarnings("ignore:Training has not converged")

NAMES = ["red", "blue_sky", "dark green"]
TEMPLATE = "a picture of a {}."
QUICK = {"epochs": 2, "batch_size": 4}
OPTIONS = {
    "dcp": QUICK | {"depth": 2},
    "coop": QUICK | {"n_ctx": 3},
    "vpt-deep": QUICK | {"n_ctx": 3, "depth": 2},
    "maple": QUICK | {"depth": 2},
    "promptsrc": QUICK | {"depth": 2},
    "clap": QUICK,
    "prolip": {"epochs": 3},
    "lp-plus-plus": {"epochs": 20},
}
OPTIONS |= {name: {"steps": 3, "batch_size": 4} for name in ("clip-lora", "clip-svd", "2sfs")}


def task(method: str, clip: FrozenCLIP, photos: list[Item], **options) -> Task:
    """Trained on the first nine photos, without augmentation, validated on the last three."""
    recipe = METHODS[method].recipe("dcp_vitb16", "caltech101", 4, "few-shot")
    recipe = recipe.updated({"augment": "none"} | OPTIONS.get(method, {}) | options)
    train, val = (image_source(clip, items) for items in (photos[:9], photos[9:]))
    return Task(clip, "dcp_vitb16", NAMES, TEMPLATE, train, val, recipe, seed=1)


def with_flips(given: Task) -> Task:
    """Two known views of each training image, as for the miniature: itself and its mirror image."""
    images = pixels(given.train)
    train = replace(given.train, views=torch.stack([images, images.flip(-1)]))
    return replace(given, train=train, recipe=given.recipe.updated({"augment": "flip"}))


def with_crops(given: Task, **options) -> Task:
    """With new random crops of the training images in every step."""
    recipe = given.recipe.updated({"augment": "crop-flip"} | options)
    return replace(given, train=image_source(given.clip, given.train.items, "crop-flip"), recipe=recipe)


@torch.no_grad()
def with_random_features(given: Task) -> Task:
    """Hard to tell apart: noise around the text features, which stands for nine training and 120 validation images."""
    torch.manual_seed(0)
    texts, found = encode_text(given.clip, fill(TEMPLATE)), []
    for items in (given.train.items, [*given.train.items * 13, *given.train.items[:3]]):
        source = replace(given.train, items=items)
        noise = 1.5 * torch.randn(len(items), texts.shape[1]) / texts.shape[1] ** 0.5
        views = F.normalize(texts[source.labels] + noise, dim=-1)[None]
        found.append(replace(source, views=views, form=Features))
    return replace(given, train=found[0], val=found[1])


def relabelled(source: ImageSource, labels: Tensor) -> ImageSource:
    """The first images of a source, with these labels."""
    items = [item._replace(label=int(y)) for item, y in zip(source.items, labels, strict=False)]
    return replace(source, items=items, views=None if source.views is None else source.views[:, : len(labels)])


def pixels(source: ImageSource) -> Tensor:
    return torch.cat([inputs.x for inputs, _ in replace(source, views=None, form=Pixels).batches(5)])


def logits_of(head: Head, source: ImageSource) -> Tensor:
    return read(head, source, 64)[0]


# ----------------------------------------------------------------------------------- the towers, implemented plainly


def encode_image(clip: FrozenCLIP, images: Tensor, prompts: list[Tensor] = []) -> Tensor:  # noqa: B006
    """The vision tower with all tokens in every block; prompts (M, Dv) replace the last M tokens before each block."""
    return F.normalize(clip.visual.ln_post(hidden(clip, images, prompts)) @ clip.visual.proj, dim=-1)


def hidden(clip: FrozenCLIP, images: Tensor, prompts: list[Tensor] = []) -> Tensor:  # noqa: B006
    """The class token (B, Dv) after the last block of the vision tower."""
    visual = clip.visual
    x = visual.conv1(images).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + visual.positional_embedding
    for i, block in enumerate(visual.transformer.resblocks):
        if i == 0:
            x = visual.ln_pre(torch.cat([x, *[p.expand(len(x), -1, -1) for p in prompts[:1]]], 1))
        elif i < len(prompts):
            x = torch.cat([x[:, : -len(prompts[i])], prompts[i].expand(len(x), -1, -1)], 1)
        x = block(x)
    return x[:, 0]


def tokens(clip: FrozenCLIP, sentences: list[str]) -> Tensor:
    return clip.tokenizer(sentences, context_length=len(clip.text.positional_embedding))


def encode_text(clip: FrozenCLIP, sentences: list[str], prompts: list[Tensor] = []) -> Tensor:  # noqa: B006
    """The text tower with the full context in every block; prompts (M, Dt) replace the tokens after the start."""
    text, ids = clip.text, tokens(clip, sentences)
    x = text.token_embedding(ids)
    for i, block in enumerate(text.transformer.resblocks):
        if i < len(prompts):
            m = len(prompts[i])
            x = torch.cat([x[:, :1], prompts[i].expand(len(x), -1, -1), x[:, 1 + m :]], 1)
        x = block(x + text.positional_embedding if i == 0 else x, attn_mask=text.attn_mask)
    x = text.ln_final(x)[torch.arange(len(x)), ids.argmax(-1)]
    return F.normalize(x @ text.text_projection, dim=-1)


def cosine(clip: FrozenCLIP, images: Tensor, texts: Tensor) -> Tensor:
    return clip.clip.logit_scale.exp() * images @ texts.T


def fill(template: str) -> list[str]:
    return [template.format(name.replace("_", " ")) for name in NAMES]


@torch.no_grad()
def plain_features(given: Task) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features of the views of the training images in rows (V n, E), of the validation images, and of the class names
    (C, E); and the labels (V n,) of the rows."""
    if given.train.form is Features:
        train, val = given.train.views[0], given.val.views[0]
    else:
        train = torch.cat([encode_image(given.clip, x) for x in views_of(given)])
        val = encode_image(given.clip, pixels(given.val))
    labels = given.train.labels.repeat(len(train) // len(given.train.items))
    return train, val, encode_text(given.clip, fill(TEMPLATE)), labels


def views_of(given: Task) -> list[Tensor]:
    """The views of the training images, in pixels."""
    x = pixels(given.train)
    return [x, x.flip(-1)] if given.train.views is not None else [x]


# ---------------------------------------------------------------------------------------------- each method's equations
# Each takes a task, and gives the logits of the validation images.


def zero_shot(given: Task, templates: tuple[str, ...] = ()) -> Tensor:
    _, val, texts, _ = plain_features(given)
    others = [encode_text(given.clip, fill(template)) for template in templates]
    return cosine(given.clip, val, F.normalize(sum(others, texts), dim=-1))


def linear_probe(given: Task, C: float) -> Tensor:
    """Of images and their mirror images, which weigh as much as one; its scale is that of the images left out."""
    x, val, _, y = plain_features(given)
    with torch.no_grad():
        mirrored = encode_image(given.clip, pixels(given.train).flip(-1))

    def regression(rows: Tensor) -> Callable[[Tensor], Tensor]:
        both, half = torch.cat([x[rows], mirrored[rows]]).double(), torch.full((2 * int(rows.sum()),), 0.5)
        fitted = LogisticRegression(C=C, tol=1e-9, max_iter=1000).fit(both, y[rows].repeat(2), half)
        return lambda rows: torch.from_numpy(fitted.decision_function(rows.double()))

    held_out = torch.empty(9, 3, dtype=torch.double)
    for fold in range(3):  # of three images per class
        out = torch.arange(9) // 3 == fold
        held_out[out] = regression(~out)(x[out])
    loss = lambda log: F.cross_entropy(math.exp(log) * held_out, y, reduction="sum").item() + log**2 / 2  # noqa: E731
    return math.exp(minimize_scalar(loss).x) * regression(torch.ones(9, dtype=torch.bool))(val).float()


def descend(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], rates: list[float]) -> None:
    """One step on all images for each learning rate."""
    for (group,), rate in ((optimizer.param_groups, rate) for rate in rates):
        group["lr"] = rate
        for p, gradient in zip(group["params"], torch.autograd.grad(loss(), group["params"]), strict=True):
            p.grad = gradient
        optimizer.step()


def cosine_rates(first: float, steps: int, last: float = 0.0) -> list[float]:
    return [last + (first - last) * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]


def tip_adapter(given: Task, alpha: float = 1.0, beta: float = 1.0, lr: float = 0.0) -> Tensor:
    """The keys are trained for one step, in which AdamW moves a value by lr g / (|g| + eps), and decays it."""
    x, val, texts, _ = plain_features(given)
    keys = F.normalize(x.unflatten(0, (-1, 9)).mean(0), dim=-1).requires_grad_()
    values = F.one_hot(given.train.labels, 3).float()

    def logits(of: Tensor) -> Tensor:
        return cosine(given.clip, of, texts) + alpha * torch.exp(-beta * (1 - of @ keys.T)) @ values

    if lr:
        (g,) = torch.autograd.grad(F.cross_entropy(logits(x), given.train.labels), keys)
        keys = keys * (1 - lr * 0.01) - lr * g / (g.abs() + 1e-4)
    return logits(val).detach()


def proker(given: Task, beta: float, penalty: float) -> Tensor:
    """What ridge regression adds to the cosines is scaled, too."""
    train, val, texts, labels = plain_features(given)
    train, val, texts = (t.double() for t in (train, val, texts))
    left = F.one_hot(labels, 3) - train @ texts.T
    similar, queried = (torch.exp(-beta * torch.cdist(x, train).square() / 2) for x in (train, val))
    ridge = torch.linalg.inv(similar + penalty * torch.eye(len(train))) @ left
    return (given.clip.clip.logit_scale.exp() * (val @ texts.T + penalty * queried @ ridge)).float().detach()


def ss_text(given: Task) -> Tensor:
    """The minimum of the mean of -s f w_y and, for each class, |w - t|^2 / (2 its images)."""
    train, val, texts, labels = plain_features(given)
    weight = texts.clone()
    for f, label in zip(train, labels, strict=True):
        weight[label] += given.clip.clip.logit_scale.exp().detach() * (labels == label).sum() / len(train) * f
    return cosine(given.clip, val, F.normalize(weight, dim=-1)).detach()


def gaussian(x: Tensor, y: Tensor, classes: int = 3) -> tuple[Tensor, Tensor]:
    """The paper's formula as it stands, in float64."""
    x = x.double()
    means = torch.stack([x[y == c].mean(0) for c in range(classes)])
    centred = torch.cat([x[y == c] - means[c] for c in range(classes)])
    n, width = x.shape
    covariance = centred.T.cov()
    precision = width * torch.linalg.pinv((n - 1) * covariance + covariance.trace() * torch.eye(width).double())
    return means @ precision, torch.stack([-m @ precision @ m / 2 for m in means])


def gda(given: Task, alpha: float, text: bool = True) -> Tensor:
    train, val, texts, labels = plain_features(given)
    weight, bias = gaussian(train, labels)
    return (alpha * (val.double() @ weight.T + bias)).float() + text * cosine(given.clip, val, texts).detach()


def lp(given: Task, epochs: int) -> Tensor:
    """By autograd and torch's SGD; alpha has a step of its own after every tenth."""
    x, val, texts, y = plain_features(given)
    cosines = x @ texts.T
    v, b = torch.stack([x[y == c].sum(0) for c in range(3)]).requires_grad_(), torch.zeros(3, requires_grad=True)
    start = 250 * torch.stack([cosines[y == c, c].mean() for c in range(3)]).mean()
    alpha = start.repeat(3).requires_grad_()
    rate = 4 * len(x) / torch.linalg.matrix_norm(x, 2).item() ** 2
    optimizer = torch.optim.SGD([v, b], rate, momentum=0.9)

    def loss() -> Tensor:
        return F.cross_entropy(x @ v.T + b + alpha * cosines, y)

    for epoch in range(epochs):
        (gradient,) = torch.autograd.grad(loss(), alpha)
        descend(optimizer, loss, [rate])
        if (epoch + 1) % 10 == 0:
            alpha.data -= len(x) / (4 * (cosines**2).sum(0).max()) * gradient
    return (val @ v.T + b + alpha * (val @ texts.T)).detach()


def clap_logits(given: Task, unit: bool) -> Tensor:
    """Three epochs of one batch, the first at the warm-up's learning rate."""
    clip, (x, val, texts, y) = given.clip, plain_features(given)
    with torch.no_grad():
        start = clip.clip.encode_text(tokens(clip, fill(TEMPLATE)), normalize=unit)
    probabilities = cosine(clip, x, texts).softmax(-1).detach()
    strength = torch.stack([probabilities[y == c, c].mean() for c in range(3)])
    w = start.clone().requires_grad_()

    def loss() -> Tensor:
        logits = cosine(clip, x, F.normalize(w, dim=-1))
        return F.cross_entropy(logits, y) + (strength * (w - start).square().sum(-1)).mean()

    descend(torch.optim.SGD([w], 0.1, momentum=0.9), loss, [1e-5, 0.1, 0.075])
    return cosine(clip, val, F.normalize(w, dim=-1)).detach()


def prolip(given: Task) -> Tensor:
    """Steps alternate between the views."""
    clip, (_, _, texts, _) = given.clip, plain_features(given)
    with torch.no_grad():
        views = [clip.visual.ln_post(hidden(clip, x)) for x in views_of(given)]
        val = clip.visual.ln_post(hidden(clip, pixels(given.val)))
    start = clip.visual.proj.detach()
    p, steps = start.clone().requires_grad_(), iter(range(3))

    def loss() -> Tensor:
        logits = cosine(clip, F.normalize(views[next(steps) % len(views)] @ p, dim=-1), texts)
        return F.cross_entropy(logits, given.train.labels) + 0.25 * (p - start).square().sum()

    descend(torch.optim.Adam([p], 0.01, eps=1e-4), loss, cosine_rates(0.01, 3))
    return cosine(clip, F.normalize(val @ p, dim=-1), texts).detach()


Weights = dict[str, Tensor]


def trained_weights(given: Task, trained: list[Tensor], weights: Callable[[], Weights]) -> Tensor:
    """Three steps of AdamW on zero-shot CLIP with some of its weights replaced by functions of what is trained."""
    ids = tokens(given.clip, fill(TEMPLATE))

    def logits(images: Tensor) -> Tensor:
        features, texts, _ = functional_call(given.clip.clip, weights(), (images, ids))
        return cosine(given.clip, features, texts)

    x = pixels(given.train)
    optimizer = torch.optim.AdamW(trained, 0.01, weight_decay=0.01)
    descend(optimizer, lambda: F.cross_entropy(logits(x), given.train.labels), cosine_rates(0.01, 3, 1e-6))
    return logits(pixels(given.val)).detach()


def clip_lora(given: Task, rank: int) -> Tensor:
    """Low-rank updates B A of queries, keys and values: first the text tower's, then the image tower's."""
    updates = {}
    for tower, width in (("", 64), ("visual.", 128)):
        for i in range(4):
            a = torch.empty(3, rank, width).uniform_(-(width**-0.5), width**-0.5).requires_grad_()
            key = f"{tower}transformer.resblocks.{i}.attn.in_proj_weight"
            updates[key] = a, torch.zeros(3, width, rank, requires_grad=True)

    def weights() -> Weights:
        plain = given.clip.clip.get_parameter
        return {key: plain(key) + rank**-0.5 * (b @ a).flatten(0, 1) for key, (a, b) in updates.items()}

    return trained_weights(given, [t for pair in updates.values() for t in pair], weights)


def clip_svd(given: Task) -> Tensor:
    """The singular values of queries, keys, values and of all other matrices of the blocks."""
    ends, parts = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"), {}
    for name, p in given.clip.clip.named_parameters():
        if name.endswith(ends):
            blocks = p.detach().chunk(3 if "in_proj" in name else 1)
            parts[name] = [torch.linalg.svd(block, full_matrices=False) for block in blocks]
    values = [s.requires_grad_() for found in parts.values() for _, s, _ in found]
    assert len(values) == 8 * 6

    def weights() -> Weights:
        return {n: torch.cat([u @ torch.diag(s) @ v for u, s, v in found]) for n, found in parts.items()}

    return trained_weights(given, values, weights)


def two_stages(given: Task) -> Tensor:
    """Two steps on the norms of both towers, and two on the classifier that they give."""
    plain, x, y = copy.deepcopy(given.clip.clip), pixels(given.train), given.train.labels
    ids = tokens(given.clip, fill(TEMPLATE))
    norms = [p.requires_grad_() for n, p in plain.named_parameters() if any(k[:3] == "ln_" for k in n.split("."))]
    assert len(norms) == 2 * (2 * 8 + 3)

    def logits(images: Tensor, weight: Tensor | None = None) -> Tensor:
        features, texts, _ = plain(images, ids)
        return cosine(given.clip, features, texts if weight is None else F.normalize(weight, dim=-1))

    rates = cosine_rates(0.01, 2, 1e-6)
    descend(torch.optim.AdamW(norms, 0.01, weight_decay=0.01), lambda: F.cross_entropy(logits(x), y), rates)
    weight = plain.encode_text(ids, normalize=True).detach().requires_grad_()
    optimizer = torch.optim.AdamW([weight], 0.01, weight_decay=0.01)
    descend(optimizer, lambda: F.cross_entropy(logits(x, weight), y), rates)
    return logits(pixels(given.val), weight).detach()


def random_prompts(depth: int, n_ctx: int, width: int) -> list[Tensor]:
    return [(0.02 * torch.randn(n_ctx, width)).requires_grad_() for _ in range(depth)]


def words(clip: FrozenCLIP, phrase: str) -> Tensor:
    """The embeddings of a phrase's words."""
    ids = clip.tokenizer([phrase])[0, 1 : 1 + len(phrase.split())]
    return clip.text.token_embedding(ids).detach().clone().requires_grad_()


def trained_prompts(
    given: Task, trained: list[Tensor], encode: Callable[[Tensor], tuple[Tensor, Tensor]], loss_of=None
) -> Tensor:
    """Three epochs of one batch by SGD, the first at the warm-up's learning rate."""
    x, y, logits = pixels(given.train), given.train.labels, partial(cosine, given.clip)

    def loss() -> Tensor:
        features, texts = encode(x)
        added = loss_of(x, features, texts) if loss_of else 0
        return F.cross_entropy(logits(features, texts), y) + added

    optimizer = torch.optim.SGD(trained, 0.05, momentum=0.9, weight_decay=5e-4)
    averages, gauss = [0 * p.detach() for p in trained], [math.exp(-(((e - 1.8) / 1.8) ** 2) / 2) for e in (1, 2, 3)]
    for rate, weight in zip((1e-5, 0.05, 0.0375), gauss, strict=True):
        descend(optimizer, loss, [rate])
        averages = [a + weight / sum(gauss) * p.detach() for a, p in zip(averages, trained, strict=True)]
    if loss_of:  # PromptSRC takes the average over the epochs
        for p, average in zip(trained, averages, strict=True):
            p.data = average
    return logits(*encode(pixels(given.val))).detach()


def coop(given: Task) -> Tensor:
    prompts, clip = random_prompts(1, 3, 64), given.clip
    return trained_prompts(
        given, prompts, lambda x: (encode_image(clip, x), encode_text(clip, fill("X X X {}."), prompts))
    )


def vpt(given: Task, depth: int) -> Tensor:
    prompts, clip = random_prompts(depth, 3, 128), given.clip
    return trained_prompts(
        given, prompts, lambda x: (encode_image(clip, x, prompts), encode_text(clip, fill(TEMPLATE)))
    )


def maple(given: Task, depth: int) -> Tensor:
    """The image's prompts are linear maps of the text's, the first of which are words."""
    clip, text = given.clip, random_prompts(depth, 2, 64)
    maps, text[0] = [nn.Linear(64, 128) for _ in text], words(clip, "a photo")

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        vision = [p @ f.weight.T + f.bias for p, f in zip(text, maps, strict=True)]
        return encode_image(clip, x, vision), encode_text(clip, fill("a photo of a {}."), text)

    return trained_prompts(given, [*text, *(p for f in maps for p in f.parameters())], encode)


def prompt_src(given: Task, depth: int) -> Tensor:
    clip, (text, vision) = given.clip, [random_prompts(depth, 4, width) for width in (64, 128)]
    text[0] = words(clip, "a photo of a")
    with torch.no_grad():
        raw = [clip.clip.encode_text(tokens(clip, fill(template))) for template in promptsrc.TEMPLATES]
    frozen_texts = F.normalize(sum(raw), dim=-1)

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        return encode_image(clip, x, vision), encode_text(clip, fill("a photo of a {}."), text)

    def regularised(x: Tensor, features: Tensor, texts: Tensor) -> Tensor:
        with torch.no_grad():
            frozen = encode_image(clip, x)
            p = cosine(clip, frozen, frozen_texts).softmax(-1)
        kl = (p * (p.log() - cosine(clip, features, texts).log_softmax(-1))).sum() / p.numel()
        return kl + 25 * (texts - frozen_texts).abs().mean() + 10 * (features - frozen).abs().mean()

    return trained_prompts(given, [*text, *vision], encode, regularised)


# Of each case: the method, its options, its equation, and which of CLIP's weights it changes.
PROMPTS, WHOLE = {"epochs": 3, "batch_size": 9, "lr": 0.05}, {"steps": 3, "batch_size": 9, "lr": 0.01}
LORA, CLAP = WHOLE | {"dropout": 0.0}, {"epochs": 3, "batch_size": 256}
ATTENTION, MATRICES = ("in_proj_weight",), ("in_proj_weight", "out_proj.weight", "c_fc.weight", "c_proj.weight")
STAGES, FLIPS = {"steps": 4, "first_stage": 0.5, "batch_size": 9, "lr": 0.01}, {"augment": "flip"}
EQUATIONS = {
    "zero-shot": ("zero-shot", {}, zero_shot),
    "ensemble": ("zero-shot-ensemble", {}, partial(zero_shot, templates=ENSEMBLE)),
    "linear probe": ("linear-probe", {"C": 2.0}, partial(linear_probe, C=2.0)),
    "tip": ("tip-adapter", {"alpha": 2.0, "beta": 3.0}, partial(tip_adapter, alpha=2.0, beta=3.0)),
    "tip, two views": ("tip-adapter", FLIPS, tip_adapter),
    "tip-f": ("tip-adapter-f", {"epochs": 1}, partial(tip_adapter, lr=1e-3)),
    "proker": ("proker", {"beta": 2.0, "penalty": 0.3}, partial(proker, beta=2.0, penalty=0.3)),
    "ss-text": ("ss-text", {}, ss_text),
    "gda": ("gda", {"alpha": 0.5}, partial(gda, alpha=0.5)),
    "gda without text, two views": ("gda", {"text": False} | FLIPS, partial(gda, alpha=1.0, text=False)),
    "lp++": ("lp-plus-plus", {"epochs": 21}, partial(lp, epochs=21)),
    "clap": ("clap", CLAP, partial(clap_logits, unit=True)),
    "clap, two views": ("clap", CLAP | {"unit": False} | FLIPS, partial(clap_logits, unit=False)),
    "prolip": ("prolip", {"lr": 0.01}, prolip, ("visual.proj",)),
    "prolip, two views": ("prolip", {"lr": 0.01} | FLIPS, prolip, ("visual.proj",)),
    "lora": ("clip-lora", LORA | {"rank": 1}, partial(clip_lora, rank=1), ATTENTION),
    "lora of rank 2": ("clip-lora", LORA | {"rank": 2}, partial(clip_lora, rank=2), ATTENTION),
    "svd": ("clip-svd", WHOLE, clip_svd, MATRICES),
    "2sfs": ("2sfs", STAGES, two_stages, ("ln_",)),
    "coop": ("coop", PROMPTS, coop),
    "vpt in one block": ("vpt-deep", PROMPTS | {"depth": 1}, partial(vpt, depth=1)),
    "vpt in all blocks": ("vpt-deep", PROMPTS | {"depth": 12}, partial(vpt, depth=4)),
    "maple": ("maple", PROMPTS | {"depth": 2}, partial(maple, depth=2)),
    "promptsrc": ("promptsrc", PROMPTS | {"depth": 2}, partial(prompt_src, depth=2)),
}


# those of the text probe and of DCP are in test_text_probe.py and test_golden.py
assert {method for method, *_ in EQUATIONS.values()} | {"text-probe", "dcp"} == {*METHODS}


@pytest.mark.parametrize("case", EQUATIONS)
def test_logits_equal_those_of_the_plain_equations(case, clip, photos):
    """What a method changes in zero-shot CLIP's logits, by a training on all images in every step."""
    method, options, equation, *changed = EQUATIONS[case]
    given = task(method, clip, photos, **options)
    given = with_flips(given) if options.get("augment") == "flip" else given
    start = torch.zeros(3, 3) if method.startswith("zero-shot") else zero_shot(given).detach()
    torch.manual_seed(given.seed)
    expected = equation(given) - start
    head = fit_head(method, replace(given, val=None))
    assert expected.abs().max() > 0.02
    assert close(logits_of(head, given.val) - start, expected, 5e-3)
    for name, p in head.encoder.clip.named_parameters():
        assert torch.equal(p, clip.clip.get_parameter(name)) != any(part in name for part in sum(changed, ()))


# ------------------------------------------------------------------------------------------------- what equations leave


@pytest.mark.parametrize("copies", [1, 3])
def test_gaussian_discriminant_without_spread_finds_the_nearest_mean(copies):
    """One image per class, also with views that differ by rounding alone."""
    torch.manual_seed(0)
    means, queries = F.normalize(torch.randn(5, 16), dim=-1), F.normalize(torch.randn(40, 16), dim=-1)
    rows = means.repeat(copies, 1)
    rows += 1e-8 * torch.randn_like(rows) * (copies > 1)
    weight, bias = gaussian_discriminant(rows, torch.arange(5).repeat(copies), 5)
    assert torch.equal((queries @ weight.T + bias).argmax(-1), torch.cdist(queries, means).argmin(-1))
    assert 1 < weight.norm(dim=-1).mean() < 100


def test_gaussian_discriminant_of_more_images_than_features():
    """With fewer, it is an equation of the table."""
    torch.manual_seed(0)
    x = F.normalize(torch.randn(200, 8, dtype=torch.float64) + 3, dim=-1)  # in a cone, as CLIP's features
    y = torch.arange(200) % 5
    for found, wanted in zip(gaussian_discriminant(x, y, 5), gaussian(x, y, 5), strict=True):
        assert close(found, wanted, 1e-9)


def test_clip_lora_drops_inputs_in_training_only(clip, photos):
    given, found = task("clip-lora", clip, photos, batch_size=9, lr=0.01), []
    for dropout in (0.5, 0.0):
        head = fit_head("clip-lora", replace(given, recipe=given.recipe.updated({"dropout": dropout})))
        found.append(logits_of(head, given.val))
        assert torch.equal(found[-1], logits_of(head, given.val))
    assert not close(*found, 1e-4)


# ------------------------------------------------------------------------------------- what validation images choose


TRIED = {  # in their order, as the head's `info`, and the equation of each
    "proker": ([{"beta": b, "lambda": p} for b, p in product(BETAS, PENALTIES)], lambda t, v: proker(t, *v.values())),
    "gda": ([{"alpha": a} for a in ALPHAS], lambda t, v: gda(t, *v.values())),
    "lp-plus-plus": ([{"epoch": n} for n in range(12, 0, -1)], lambda t, v: lp(t, *v.values())),
}


@pytest.mark.parametrize("method", TRIED)
def test_what_is_chosen_on_the_validation_images(method, clip, photos):
    """The value that classifies the most of them: the smallest of several, and of epochs the last."""
    options = {"epochs": 12} if method == "lp-plus-plus" else {}
    given, (values, equation) = with_random_features(task(method, clip, photos, **options)), TRIED[method]
    answers, chosen = [equation(given, value).argmax(-1) for value in values], []
    for labels in (given.val.labels, answers[0], answers[len(answers) // 2], answers[-1]):
        for images in (7, 120):  # few: many ties
            hits = [int((answer == labels)[:images].sum()) for answer in answers]
            head = fit_head(method, replace(given, val=relabelled(given.val, labels[:images])))
            assert head.info == values[hits.index(max(hits))]
            chosen.append(str(head.info))
    assert len({*chosen}) > 2


def test_tip_adapter_chooses_alpha_and_beta_on_the_validation_images(clip, photos):
    given = with_random_features(task("tip-adapter", clip, photos))
    adapter, start = fit_head("tip-adapter", given), fit_head("tip-adapter", replace(given, val=None))
    labels = given.val.labels
    assert top1(logits_of(adapter, given.val), labels) > top1(logits_of(start, given.val), labels)
    assert adapter.info == {"alpha": round(adapter.alpha.item(), 4), "beta": round(adapter.beta.item(), 4)}
    assert 0.1 <= min(adapter.info.values()) <= max(adapter.info.values()) <= 50
    assert start.info == {"alpha": 1.0, "beta": 1.0}


def test_gda_without_validation_images_leaves_training_images_out(clip, photos):
    """In three folds by hand; with one image per class alpha makes both parts of the logits alike in size."""
    given = with_random_features(task("gda", clip, photos))
    x, _, texts, y = plain_features(given)
    given, scores = replace(given, val=None), torch.empty(9, 3)
    for fold in range(3):
        out = torch.arange(9) // 3 == fold
        weight, bias = gaussian(x[~out], y[~out])
        scores[out] = (x[out].double() @ weight.T + bias).float()
    hits = [int(((cosine(clip, x, texts) + alpha * scores).argmax(-1) == y).sum()) for alpha in ALPHAS]
    assert fit_head("gda", given).info == {"alpha": ALPHAS[hits.index(max(hits))], "selection": "cross-validation"}
    found = fit_head("gda", replace(given, train=given.train.of([0, 1, 2]))).info["alpha"]
    weight, bias = gaussian_discriminant(x[:3], y[:3], 3)
    spread = (x[:3] @ weight.T + bias).std().item()
    assert 2 * found * spread == pytest.approx(cosine(clip, x[:3], texts).std().item(), rel=1e-3)


# -------------------------------------------------------------------------------------------- properties of all methods


@pytest.mark.parametrize("method", ["linear-probe", "proker", "gda", "lp-plus-plus", "clap"])
def test_one_shot_and_two_classes(method, clip, photos):
    """And validation images for one of the classes only."""
    train, val = (image_source(clip, part) for part in (photos[:2], photos[3:4]))
    given = replace(task(method, clip, photos), classnames=NAMES[:2], train=train, val=val)
    logits = logits_of(fit_head(method, given), image_source(clip, photos))
    assert logits.shape == (12, 2)
    assert logits.isfinite().all()


@pytest.mark.parametrize("method", ["promptsrc", "clip-lora"])  # whose loops differ
def test_training_in_half_precision(method, clip, photos):
    given = task(method, clip, photos)
    fitted = [logits_of(fit_head(method, replace(given, precision=p)), given.val) for p in ("float32", "bfloat16")]
    assert close(fitted[1], fitted[0], 0.2)  # bfloat16 keeps 8 bits: the runs drift apart
    assert fitted[1].dtype == torch.float32


@pytest.mark.parametrize("method", ["tip-adapter", "gda", "prolip", "coop"])
def test_training_on_random_crops(method, clip, photos):
    """Which differ from the plain images."""
    given = task(method, clip, photos, **({"lr": 0.01} if method in ("prolip", "coop") else {}))
    passes = {"augment_epochs": 2} if method in ("tip-adapter", "gda") else {}
    plain, cropped = (logits_of(fit_head(method, t), given.val) for t in (given, with_crops(given, **passes)))
    assert not close(cropped, plain, 1e-5)


def test_no_augmentation_means_the_first_view_alone(clip, photos):
    """Although a trial before it may have left both views in the cache."""
    given = with_flips(task("gda", clip, photos))
    given = replace(given, recipe=given.recipe.updated({"augment": "none"}))
    one = replace(given, train=replace(given.train, views=given.train.views[:1]))
    first, second = (logits_of(fit_head("gda", each), given.val) for each in (given, one))
    assert torch.equal(first, second)


def test_what_cannot_be_fitted_is_said(clip, photos):
    with pytest.raises(ZooError, match=r"Training diverged: the loss of step \d+ is (nan|inf).*--set lr="):
        fit_head("clap", task("clap", clip, photos, lr=1e30, warmup_lr=1e30))
    given = task("gda", clip, photos)
    given.train = image_source(clip, [item for item in photos if item.label != 1])
    with pytest.raises(ZooError, match="No training image has label 1"):
        fit_head("gda", given)
    clip.visual.proj = clip.clip.attn_mask = None
    for method in ("prolip", "clip-lora"):  # which train these
        with pytest.raises(ZooError, match=r"this CLIP (has none|does not have): use"):
            fit_head(method, task(method, clip, photos))


# ------------------------------------------------------------------------------------------------------------- recipes


def recipe(method: str, shots: int = 16, protocol: str = "few-shot", dataset: str = "caltech101", model="dcp_vitb16"):
    return METHODS[method].recipe(model, dataset, shots, protocol)


SGD_32, PER_CLASS = {"optimizer": "sgd", "batch_size": 32, "warmup_lr": 1e-5}, {"lr": 0.0025, "batch_size": 4}
PUBLISHED = [
    *(("coop", {"shots": k}, {"epochs": n}) for k, n in ((1, 50), (4, 100), (8, 200))),
    ("coop", {"dataset": "imagenet"}, SGD_32 | {"epochs": 50, "n_ctx": 16, "lr": 0.002}),
    ("maple", {"protocol": "base-to-new"}, {"n_ctx": 2, "depth": 9, "lr": 0.0035, "batch_size": 4, "epochs": 5}),
    ("maple", {"protocol": "cross-dataset"}, {"lr": 0.0026, "epochs": 2, "depth": 3}),
    ("tip-adapter-f", {}, {"lr": 1e-3, "eps": 1e-4, "batch_size": 256, "epochs": 20, "augment": "crop-flip"}),
    ("clap", {}, {"optimizer": "sgd", "lr": 0.1, "batch_size": 256, "epochs": 300, "augment_epochs": 20}),
    *(("prolip", {"shots": k}, {"penalty": 1 / k, "lr": 1e-5, "eps": 1e-4, "epochs": 300}) for k in (1, 2, 16)),
    ("lp-plus-plus", {}, {"epochs": 300, "augment": "none"}),
    ("clip-lora", {"shots": 4}, {"rank": 2, "alpha": 1, "dropout": 0.25, "lr": 2e-4, "batch_size": 32, "steps": 2000}),
    ("proker", {"shots": 4}, {"beta": 1.5, "penalty": 0.05}),
    ("clip-svd", {"shots": 4}, {"lr": 5e-4, "weight_decay": 1e-2, "batch_size": 32, "steps": 800}),
    ("2sfs", {"shots": 1}, {"steps": 300, "first_stage": 0.6}),
    ("promptsrc", {}, PER_CLASS | {"n_ctx": 4, "depth": 9, "epochs": 50, "average_mean": 0.6, "average_std": 0.6}),
    ("promptsrc", {"protocol": "base-to-new"}, {"epochs": 20, "depth": 9, "average_mean": 0.75, "average_std": 0.05}),
    ("promptsrc", {"protocol": "cross-dataset"}, {"epochs": 20, "depth": 3, "average_mean": 0.3, "average_std": 0.5}),
]


@pytest.mark.parametrize(("method", "of", "values"), PUBLISHED)
def test_published_recipes(method, of, values):
    found = recipe(method, **of)
    assert {name: getattr(found, name) for name in values} == pytest.approx(values)


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_explains_its_fields_reaches_workers_and_fits_the_miniature(method):
    """Prompts have the budget of its DCP recipe there; other methods change their augmentation and some rates."""
    kind, mini, big = METHODS[method].config, recipe(method, model="dcp_mini"), recipe(method)
    assert METHODS[method].title
    assert METHODS[method].reference
    assert all(part.metadata["help"] for part in fields(kind))
    assert pickle.loads(pickle.dumps(big)) == big
    if method in ("coop", "vpt-deep", "maple", "promptsrc"):
        for name in ("optimizer", "warmup_lr", "weight_decay", "batch_size", "epochs", "augment"):
            assert getattr(mini, name) == getattr(default_recipe("dcp_mini"), name)
    elif method != "dcp":
        rates = {"prolip": {"lr": 1e-3}, "clip-lora": {"lr": 4e-3, "steps": 1600}}
        assert mini == replace(big, augment=mini.augment, **rates.get(method, {}))
        assert mini.augment == ("none" if big.augment == "none" else "flip")
