"""Every method of the table against a plain implementation of its equations, on a small CLIP."""

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from equations import (
    NAMES,
    TEMPLATE,
    clap_logits,
    clip_adapter,
    clip_lora,
    clip_svd,
    cocoop,
    coop,
    cosine,
    encode_text,
    fill,
    gaussian,
    gda,
    ivlp,
    kgcoop,
    linear_probe,
    lp,
    maple,
    plain_features,
    prograd,
    proker,
    prolip,
    prompt_src,
    ss_text,
    taskres,
    tip_adapter,
    two_stages,
    vpt,
    zero_shot,
)
from helpers import FEW_STEPS, close
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo import ZooError
from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.data import Item
from dcp_zoo.features.cache import kept_features
from dcp_zoo.features.extract import FeatureExtractor
from dcp_zoo.features.loader import ImageLoader
from dcp_zoo.features.photos import Photos
from dcp_zoo.features.table import FeatureTable
from dcp_zoo.features.views import PLAIN, crop_views
from dcp_zoo.heads.head import Head
from dcp_zoo.prediction.heads import outputs_of_loader
from dcp_zoo.training.evaluation import top1
from dcp_zoo.training.methods import METHODS, fit_head
from dcp_zoo.training.methods.caches import BETAS, PENALTIES
from dcp_zoo.training.methods.linear import ALPHAS, ENSEMBLE, gaussian_discriminant
from dcp_zoo.training.task import Task

pytestmark = FEW_STEPS

QUICK = {"epochs": 2, "batch_size": 4}
OPTIONS = {
    "dcp": QUICK | {"depth": 2},
    "coop": QUICK | {"n_ctx": 3},
    "vpt-deep": QUICK | {"n_ctx": 3, "depth": 2},
    "ivlp": QUICK | {"depth": 2},
    "maple": QUICK | {"depth": 2},
    "promptsrc": QUICK | {"depth": 2},
    "cocoop": QUICK,
    "kgcoop": QUICK,
    "prograd": QUICK | {"n_ctx": 5},
    "taskres": QUICK,
    "clip-adapter": QUICK,
    "clap": QUICK,
    "prolip": {"epochs": 3},
    "lp-plus-plus": {"epochs": 20},
}
OPTIONS |= {name: {"steps": 3, "batch_size": 4} for name in ("clip-lora", "clip-svd", "2sfs")}


def task(method: str, clip: FrozenCLIP, photos: list[Item], **options) -> Task:
    """Trained on the first nine photos, without augmentation, validated on the last three."""
    recipe = METHODS[method].recipe("dcp_vitb16", "caltech101", 4, "few-shot")
    recipe = recipe.updated({"augment": "none"} | OPTIONS.get(method, {}) | options)
    return Task(
        clip, "dcp_vitb16", NAMES, TEMPLATE, loader(clip, photos[:9]), chosen_on(clip, photos[9:]), recipe, seed=1
    )


def loader(clip: FrozenCLIP, items: list[Item], augment: str = "none") -> ImageLoader:
    return ImageLoader(Photos(items), FeatureExtractor(clip), augment)


def chosen_on(clip: FrozenCLIP, items: list[Item]) -> FeatureTable:
    """Images with their embeddings, to choose on."""
    return loader(clip, items).table().embeddings


def with_flips(given: Task) -> Task:
    """Two known views of each training image, as for the miniature: itself and its mirror image."""
    images = replace(given.images, augment="flip")
    return replace(given, images=images, recipe=given.recipe.updated({"augment": "flip"}))


def with_crops(given: Task, **options) -> Task:
    """With new random crops of the training images in every step."""
    recipe = given.recipe.updated({"augment": "crop-flip"} | options)
    return replace(given, images=replace(given.images, augment="crop-flip"), recipe=recipe)


@torch.no_grad()
def with_random_features(given: Task) -> Task:
    """Hard to tell apart: noise around the text features, which stands for nine training and 120 validation
    images."""
    torch.manual_seed(0)
    texts, found = encode_text(given.clip, fill(TEMPLATE)), []
    for items in (given.images.items, [*given.images.items * 13, *given.images.items[:3]]):
        labels = torch.tensor([item.label for item in items])
        noise = 1.5 * torch.randn(len(items), texts.shape[1]) / texts.shape[1] ** 0.5
        rows = F.normalize(texts[labels] + noise, dim=-1)
        of_nothing = [item._replace(path="") for item in items]
        found.append(FeatureTable(of_nothing, {PLAIN: rows}, [(rows.shape[1],)]))
    return replace(given, images=ImageLoader.of_features(found[0]), val=found[1])


def relabelled(table: FeatureTable, labels: Tensor) -> FeatureTable:
    """The first images of a table, with these labels."""
    first = table.of(range(len(labels)))
    return replace(first, items=[item._replace(label=int(y)) for item, y in zip(first.items, labels, strict=True)])


def logits_of(head: Head, images: ImageLoader | FeatureTable) -> Tensor:
    if isinstance(images, FeatureTable):
        images = loader(head.frozen, images.items) if images.items[0].path else ImageLoader.of_features(images)
    return torch.from_numpy(outputs_of_loader(head, images, 64).logits)


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
    "taskres": ("taskres", CLAP | {"lr": 0.1}, taskres),
    "clip-adapter": ("clip-adapter", PROMPTS | {"ratio": 0.3}, clip_adapter),
    "prolip": ("prolip", {"lr": 0.01}, prolip, ("visual.proj",)),
    "prolip, two views": ("prolip", {"lr": 0.01} | FLIPS, prolip, ("visual.proj",)),
    "lora": ("clip-lora", LORA | {"rank": 1}, partial(clip_lora, rank=1), ATTENTION),
    "lora of rank 2": ("clip-lora", LORA | {"rank": 2}, partial(clip_lora, rank=2), ATTENTION),
    "svd": ("clip-svd", WHOLE, clip_svd, MATRICES),
    "2sfs": ("2sfs", STAGES, two_stages, ("ln_",)),
    "coop": ("coop", PROMPTS, coop),
    "cocoop": ("cocoop", PROMPTS, cocoop),
    "kgcoop": ("kgcoop", PROMPTS, kgcoop),
    "prograd": ("prograd", PROMPTS | {"n_ctx": 6, "projection": 0.9}, prograd),
    "vpt in one block": ("vpt-deep", PROMPTS | {"depth": 1}, partial(vpt, depth=1)),
    "vpt in all blocks": ("vpt-deep", PROMPTS | {"depth": 12}, partial(vpt, depth=4)),
    "ivlp": ("ivlp", PROMPTS | {"depth": 2}, partial(ivlp, depth=2)),
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
    weight, bias = gaussian_discriminant(rows[None], torch.arange(5).repeat(copies), 5)
    assert torch.equal((queries @ weight.T + bias).argmax(-1), torch.cdist(queries, means).argmin(-1))
    assert 1 < weight.norm(dim=-1).mean() < 100


def test_gaussian_discriminant_of_more_images_than_features():
    """With fewer, it is an equation of the table."""
    torch.manual_seed(0)
    x = F.normalize(torch.randn(200, 8, dtype=torch.float64) + 3, dim=-1)  # in a cone, as CLIP's features
    y = torch.arange(200) % 5
    for found, wanted in zip(gaussian_discriminant(x[None], y, 5), gaussian(x, y, 5), strict=True):
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
    """In three folds by hand; with one image per class alpha makes both parts of the logits alike in
    size."""
    given = with_random_features(task("gda", clip, photos))
    x, _, texts, y = plain_features(given)
    given, scores = replace(given, val=None), torch.empty(9, 3)
    for fold in range(3):
        out = torch.arange(9) // 3 == fold
        weight, bias = gaussian(x[~out], y[~out])
        scores[out] = (x[out].double() @ weight.T + bias).float()
    hits = [int(((cosine(clip, x, texts) + alpha * scores).argmax(-1) == y).sum()) for alpha in ALPHAS]
    assert fit_head("gda", given).info == {"alpha": ALPHAS[hits.index(max(hits))], "selection": "cross-validation"}
    found = fit_head("gda", replace(given, images=given.images.of([0, 1, 2]))).info["alpha"]
    weight, bias = gaussian_discriminant(x[None, :3], y[:3], 3)
    spread = (x[:3] @ weight.T + bias).std().item()
    assert 2 * found * spread == pytest.approx(cosine(clip, x[:3], texts).std().item(), rel=1e-3)


def test_gda_chooses_alpha_on_images_as_they_are(clip, photos):
    """Although it is fitted to random crops."""
    plain = task("gda", clip, photos)
    x, _, texts, y = (part[:3] for part in plain_features(plain))
    given = replace(with_crops(plain, augment_epochs=2), val=None)
    given = replace(given, images=given.images.of([0, 1, 2]))
    views = crop_views(2, given.seed)
    crops = given.images.table(views=views).embeddings.rows(*views)
    weight, bias = gaussian_discriminant(crops, y, 3)
    spread = (x @ weight.T + bias).std().item()
    found = fit_head("gda", given).info["alpha"]
    assert 2 * found * spread == pytest.approx(cosine(clip, x, texts).std().item(), rel=1e-3)


# -------------------------------------------------------------------------------------------- properties of all methods


@pytest.mark.parametrize("method", ["linear-probe", "proker", "gda", "lp-plus-plus", "clap"])
def test_one_shot_and_two_classes(method, clip, photos):
    """And validation images for one of the classes only."""
    images, val = loader(clip, photos[:2]), chosen_on(clip, photos[3:4])
    given = replace(task(method, clip, photos), classnames=NAMES[:2], images=images, val=val)
    logits = logits_of(fit_head(method, given), loader(clip, photos))
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


def test_no_augmentation_means_the_plain_view_alone(clip, photos):
    """Although a trial before it may have left both views in the cache."""
    flips = with_flips(task("gda", clip, photos))
    given = replace(flips, recipe=flips.recipe.updated({"augment": "none"}))
    one = replace(given, images=loader(clip, photos[:9]))
    with kept_features():
        fit_head("gda", flips)
        first, second = (logits_of(fit_head("gda", each), given.val) for each in (given, one))
    assert torch.equal(first, second)


def test_what_cannot_be_fitted_is_said(clip, photos):
    with pytest.raises(ZooError, match=r"Training diverged: the loss of step \d+ is (nan|inf).*--set lr="):
        fit_head("clap", task("clap", clip, photos, lr=1e30, warmup_lr=1e30))
    given = task("gda", clip, photos)
    given.images = loader(clip, [item for item in photos if item.label != 1])
    with pytest.raises(ZooError, match="No training image has label 1"):
        fit_head("gda", given)
    tasks = {method: task(method, clip, photos) for method in ("prolip", "clip-lora")}
    clip.visual.proj = clip.clip.attn_mask = None  # which they train
    for method, given in tasks.items():
        with pytest.raises(ZooError, match=r"this CLIP (has none|does not have): use"):
            fit_head(method, given)
