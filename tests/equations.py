"""Every method of the table again, as its paper writes it: on a small CLIP, in few lines, without regard to
speed.

Here are the towers of CLIP with all tokens in every block, and for each method a function from a task to the
logits of its validation images. `test_baselines.py` compares the package with them."""

import copy
import math
from collections.abc import Callable
from functools import partial

import torch
from scipy.optimize import minimize_scalar
from shared import CFG
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.data.images import crop, load_image, normalise
from dcp_zoo.features.loader import ImageLoader
from dcp_zoo.features.table import FeatureTable
from dcp_zoo.training.methods import prompts as prompt_methods
from dcp_zoo.training.task import Task

NAMES = ["red", "blue_sky", "dark green"]
TEMPLATE = "a picture of a {}."


def pixels(images: ImageLoader | FeatureTable) -> Tensor:
    return torch.stack([torch.from_numpy(normalise(crop(load_image(x.path), CFG), CFG)) for x in images.items])


# ----------------------------------------------------------------------------------- the towers, implemented plainly


def encode_image(clip: FrozenCLIP, images: Tensor, prompts: list[Tensor] = []) -> Tensor:  # noqa: B006
    """The vision tower with all tokens in every block; prompts (M, Dv) replace the last M tokens before each
    block."""
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
    """The text tower with the full context in every block; prompts (M, Dt) replace the tokens after the
    start."""
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
    """Features of the views of the training images in rows (V n, E), of the validation images, and of the
    class names (C, E); and the labels (V n,) of the rows."""
    if given.images.extract is None:
        train, val = given.images.precomputed.rows()[0], given.val.rows()[0]
    else:
        train = torch.cat([encode_image(given.clip, x) for x in views_of(given)])
        val = encode_image(given.clip, pixels(given.val))
    labels = given.images.labels.repeat(len(train) // len(given.images))
    return train, val, encode_text(given.clip, fill(TEMPLATE)), labels


def views_of(given: Task) -> list[Tensor]:
    """The views of the training images, in pixels."""
    x = pixels(given.images)
    return [x, x.flip(-1)] if given.images.augment == "flip" else [x]


# ---------------------------------------------------------------------------------------------- each method's equations
# Each takes a task, and gives the logits of the validation images.


def zero_shot(given: Task, templates: tuple[str, ...] = ()) -> Tensor:
    _, val, texts, _ = plain_features(given)
    others = [encode_text(given.clip, fill(template)) for template in templates]
    return cosine(given.clip, val, F.normalize(sum(others, texts), dim=-1))


def linear_probe(given: Task, C: float) -> Tensor:
    """Of images and their mirror images, which weigh as much as one; its scale is that of the images left
    out."""
    x, val, _, y = plain_features(given)
    with torch.no_grad():
        mirrored = encode_image(given.clip, pixels(given.images).flip(-1))

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
    """The keys are trained for one step, in which AdamW moves a value by lr g / (|g| + eps), and decays
    it."""
    x, val, texts, _ = plain_features(given)
    keys = F.normalize(x.unflatten(0, (-1, 9)).mean(0), dim=-1).requires_grad_()
    values = F.one_hot(given.images.labels, 3).float()

    def logits(of: Tensor) -> Tensor:
        return cosine(given.clip, of, texts) + alpha * torch.exp(-beta * (1 - of @ keys.T)) @ values

    if lr:
        (g,) = torch.autograd.grad(F.cross_entropy(logits(x), given.images.labels), keys)
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


def taskres(given: Task) -> Tensor:
    """Three epochs of one batch by Adam on what is added to the raw text features."""
    clip, (x, val, _, y) = given.clip, plain_features(given)
    with torch.no_grad():
        raw = clip.clip.encode_text(tokens(clip, fill(TEMPLATE)))
    residual = torch.zeros_like(raw).requires_grad_()

    def logits(images: Tensor) -> Tensor:
        return cosine(clip, images, F.normalize(raw + 0.5 * residual, dim=-1))

    optimizer = torch.optim.Adam([residual], 0.1, weight_decay=5e-4)
    descend(optimizer, lambda: F.cross_entropy(logits(x), y), [1e-5, 0.1, 0.075])
    return logits(val).detach()


def clip_adapter(given: Task) -> Tensor:
    """Three epochs of one batch by SGD; of image features that are twice as long as they should be."""
    clip, (x, val, texts, y) = given.clip, plain_features(given)
    width = x.shape[1]
    layers = [nn.Linear(width, width // 4, bias=False), nn.ReLU(), nn.Linear(width // 4, width, bias=False), nn.ReLU()]
    network = nn.Sequential(*layers)

    def logits(images: Tensor) -> Tensor:
        return cosine(clip, F.normalize(0.3 * network(2 * images) + 0.7 * 2 * images, dim=-1), texts)

    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    descend(optimizer, lambda: F.cross_entropy(logits(x), y), [1e-5, 0.05, 0.0375])
    return logits(val).detach()


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
        return F.cross_entropy(logits, given.images.labels) + 0.25 * (p - start).square().sum()

    descend(torch.optim.Adam([p], 0.01, eps=1e-4), loss, cosine_rates(0.01, 3))
    return cosine(clip, F.normalize(val @ p, dim=-1), texts).detach()


Weights = dict[str, Tensor]


def trained_weights(given: Task, trained: list[Tensor], weights: Callable[[], Weights]) -> Tensor:
    """Three steps of AdamW on zero-shot CLIP with some of its weights replaced by functions of what is
    trained."""
    ids = tokens(given.clip, fill(TEMPLATE))

    def logits(images: Tensor) -> Tensor:
        features, texts, _ = functional_call(given.clip.clip, weights(), (images, ids))
        return cosine(given.clip, features, texts)

    x = pixels(given.images)
    optimizer = torch.optim.AdamW(trained, 0.01, weight_decay=0.01)
    descend(optimizer, lambda: F.cross_entropy(logits(x), given.images.labels), cosine_rates(0.01, 3, 1e-6))
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
    plain, x, y = copy.deepcopy(given.clip.clip), pixels(given.images), given.images.labels
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
    given: Task,
    trained: list[Tensor],
    encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    loss_of=None,
    averaged: bool = False,
) -> Tensor:
    """Three epochs of one batch by SGD, the first at the warm-up's learning rate."""
    x, y, logits = pixels(given.images), given.images.labels, partial(cosine, given.clip)

    def loss() -> Tensor:
        features, texts = encode(x)
        added = loss_of(x, features, texts) if loss_of else 0
        return F.cross_entropy(logits(features, texts), y) + added

    optimizer = torch.optim.SGD(trained, 0.05, momentum=0.9, weight_decay=5e-4)
    averages, gauss = [0 * p.detach() for p in trained], [math.exp(-(((e - 1.8) / 1.8) ** 2) / 2) for e in (1, 2, 3)]
    for rate, weight in zip((1e-5, 0.05, 0.0375), gauss, strict=True):
        descend(optimizer, loss, [rate])
        averages = [a + weight / sum(gauss) * p.detach() for a, p in zip(averages, trained, strict=True)]
    if averaged:
        for p, average in zip(trained, averages, strict=True):
            p.data = average
    return logits(*encode(pixels(given.val))).detach()


def coop(given: Task) -> Tensor:
    prompts, clip = random_prompts(1, 3, 64), given.clip
    return trained_prompts(
        given, prompts, lambda x: (encode_image(clip, x), encode_text(clip, fill("X X X {}."), prompts))
    )


def cocoop(given: Task) -> Tensor:
    """Each image has a text of its own, with prompts that its features shift."""
    clip, prompts = given.clip, words(given.clip, "a photo of a")
    random_prompts(1, 4, 64)
    first, second = nn.Linear(64, 4), nn.Linear(4, 64)

    def logits(images: Tensor) -> Tensor:
        rows = []
        for f in encode_image(clip, images):
            text = encode_text(clip, fill("a photo of a {}."), [prompts + second(first(f).relu())])
            rows.append(cosine(clip, f, text))
        return torch.stack(rows)

    trained = [prompts, *first.parameters(), *second.parameters()]
    optimizer = torch.optim.SGD(trained, 0.05, momentum=0.9, weight_decay=5e-4)
    loss = lambda: F.cross_entropy(logits(pixels(given.images)), given.images.labels)  # noqa: E731
    descend(optimizer, loss, [1e-5, 0.05, 0.0375])
    return logits(pixels(given.val)).detach()


def kgcoop(given: Task) -> Tensor:
    """The mean of one minus the cosine between the text with prompts and without."""
    clip, prompts = given.clip, [words(given.clip, "a photo of a")]
    frozen = encode_text(clip, fill(TEMPLATE)).detach()
    return trained_prompts(
        given,
        prompts,
        lambda x: (encode_image(clip, x), encode_text(clip, fill("a photo of a {}."), prompts)),
        lambda x, features, texts: 8 * (1 - F.cosine_similarity(texts, frozen)).mean(),
    )


def prograd(given: Task) -> Tensor:
    """Three steps on all images, each along the gradient without most of its part against zero-shot CLIP."""
    clip, x, y = given.clip, pixels(given.images), given.images.labels
    p = torch.cat([torch.zeros(2, 64), words(clip, "a photo of a").detach()]).requires_grad_()
    frozen = cosine(clip, encode_image(clip, x), encode_text(clip, fill(TEMPLATE))).softmax(-1).detach()
    optimizer = torch.optim.SGD([p], 0.05, momentum=0.9, weight_decay=5e-4)

    def logits(images: Tensor) -> Tensor:
        return cosine(clip, encode_image(clip, images), encode_text(clip, fill("X X a photo of a {}."), [p]))

    for rate in (1e-5, 0.05, 0.0375):
        z = logits(x)
        general = -(frozen * z.log_softmax(-1)).sum(-1).mean()
        (g,), (h,) = (torch.autograd.grad(of, p, retain_graph=True) for of in (F.cross_entropy(z, y), general))
        direction = h / h.norm()
        along = (g * direction).sum()
        p.grad = g - 0.9 * along * direction if along < 0 else g
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return logits(pixels(given.val)).detach()


def vpt(given: Task, depth: int) -> Tensor:
    prompts, clip = random_prompts(depth, 3, 128), given.clip
    return trained_prompts(
        given, prompts, lambda x: (encode_image(clip, x, prompts), encode_text(clip, fill(TEMPLATE)))
    )


def ivlp(given: Task, depth: int) -> Tensor:
    """Prompts of their own in both towers; the first of the text's are words."""
    clip = given.clip
    text = random_prompts(depth, 4, 64)
    vision = random_prompts(depth, 4, 128)
    text[0] = words(clip, "a photo of a")

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        return encode_image(clip, x, vision), encode_text(clip, fill("a photo of a {}."), text)

    return trained_prompts(given, [*text, *vision], encode)


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
        raw = [clip.clip.encode_text(tokens(clip, fill(template))) for template in prompt_methods.TEMPLATES]
    frozen_texts = F.normalize(sum(raw), dim=-1)

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        return encode_image(clip, x, vision), encode_text(clip, fill("a photo of a {}."), text)

    def regularised(x: Tensor, features: Tensor, texts: Tensor) -> Tensor:
        with torch.no_grad():
            frozen = encode_image(clip, x)
            p = cosine(clip, frozen, frozen_texts).softmax(-1)
        kl = (p * (p.log() - cosine(clip, features, texts).log_softmax(-1))).sum() / p.numel()
        return kl + 25 * (texts - frozen_texts).abs().mean() + 10 * (features - frozen).abs().mean()

    return trained_prompts(given, [*text, *vision], encode, regularised, averaged=True)
