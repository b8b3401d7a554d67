"""DCP on every kind of tower and of torch: each fast path against the plain forward pass with the library's
own blocks; open_clip's attention, compilers; and the fused head, a plain module."""

import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any
from unittest import mock

import numpy as np
import open_clip
import open_clip.timm_model
import pytest
import reference
import timm
import torch
from helpers import FEW_STEPS, close, empty_probe, gradients, loud
from open_clip.transformer import Attention
from shared import CFG, build_tiny_clip
from timm.models.vision_transformer import ResPostBlock
from torch import nn
from torch.nn import functional as F

from dcp_zoo import DCP, ZooError
from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.backbone.towers.open_clip import VisionTower
from dcp_zoo.backbone.towers.text import TextTower
from dcp_zoo.data import Item
from dcp_zoo.features.extract import FeatureExtractor
from dcp_zoo.features.loader import ImageLoader
from dcp_zoo.features.photos import Photos
from dcp_zoo.heads.config import COUPLINGS
from dcp_zoo.heads.head import Head
from dcp_zoo.heads.kinds import LinearHead
from dcp_zoo.prediction.explain import logit_shares, weight_of
from dcp_zoo.prediction.heads import outputs_of_loader
from dcp_zoo.training.methods.table import METHODS, fit_head
from dcp_zoo.training.task import Task
from dcp_zoo.zoo.build import build_open_clip, plain_clip

NAMES = ["ant", "wild_cat", "crocodile head", "emu"]
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
WORDS = 90  # ids of `word_tokenizer`, beside 0 (start or padding) and 1 (end)

TEXT = {"context_length": 16, "vocab_size": 100, "width": 64, "heads": 2, "layers": 3}
SIGLIP = TEXT | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
CLIPA = TEXT | {"no_causal_mask": True, "pool_type": "last"}
CAUSAL = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 3}
VIT = {"image_size": 32, "patch_size": 16, "width": 64, "head_width": 32, "layers": 4}
SMALL = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "depth": 4, "num_heads": 2}
TWO = {"vision_cfg": {"layers": 2}, "text_cfg": {"layers": 2}}


def word_tokenizer(start: bool) -> Callable[..., torch.Tensor]:
    """One id per word, like SigLIP's tokenizer (no start token, padded with the end token) or, with `start`,
    like CLIPA's (no end token, padded with 0)."""

    def tokenize(texts: list[str], context_length: int = 16) -> torch.Tensor:
        rows = torch.full((len(texts), context_length), 0 if start else 1)
        for row, text in zip(rows, texts, strict=True):
            words = [99] * start + [2 + sum(map(ord, word)) % WORDS for word in text.replace(".", " .").split()]
            row[: len(words)] = torch.tensor(words[:context_length])
        return rows

    return tokenize


def timm_vision(name: str, pool: str, proj: str | None = None, **changes: Any) -> dict[str, Any]:
    return {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": 32, "small": SMALL | changes}


EVA = {"ref_feat_shape": (2, 2)}
SIGLIP_VIT = timm_vision("vit_base_patch16_siglip_224", "map", "none")
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], Any]] = {
    "siglip": (SIGLIP_VIT, SIGLIP, word_tokenizer(False)),
    "clipa": (VIT | {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}, CLIPA, word_tokenizer(True)),
    "mobileclip-s": (VIT | {"ls_init_value": 0.3}, CAUSAL | {"no_causal_mask": True}, None),
    "coca": (VIT | {"attentional_pool": True, "attn_pooler_heads": 2}, CAUSAL | {"embed_cls": True}, None),
    "timm": (timm_vision("vit_base_patch16_clip_224", "token"), CAUSAL, None),
    "registers": (
        timm_vision("vit_base_patch16_224", "avg", "linear", reg_tokens=2, no_embed_class=True),
        CAUSAL,
        None,
    ),
    "eva02": (timm_vision("eva02_base_patch16_clip_224", "token", **EVA), CAUSAL, None),
    "eva01": (timm_vision("eva_giant_patch14_224", "token"), CAUSAL, None),
    "eva02-e": (timm_vision("eva02_enormous_patch14_clip_224", "token"), CAUSAL, None),
    "eva02-l": (timm_vision("eva02_large_patch14_clip_224", "token", qkv_fused=False, **EVA), CAUSAL, None),
    "pe": (timm_vision("vit_pe_core_base_patch16_224", "map", **EVA), CAUSAL, None),
}


@contextmanager
def small_timm(changes: dict[str, Any]) -> Iterator[None]:
    """timm builds its models with these changes, for open_clip too."""
    create = timm.create_model
    with mock.patch.object(open_clip.timm_model.timm, "create_model", lambda *a, **k: create(*a, **k, **changes)):
        yield


BUILT: dict[str, tuple[open_clip.CustomTextCLIP, torch.Tensor]] = {}


def build_clip(kind: str) -> tuple[open_clip.CustomTextCLIP, Any]:
    """A small CLIP of this kind with random weights, and its tokenizer; each is built once, and copied."""
    vision, text, tokenizer = KINDS[kind]
    if (key := str((vision, text))) not in BUILT:
        torch.manual_seed(0)
        BUILT[key] = new_clip(vision, text), torch.get_rng_state()
    clip, state = BUILT[key]
    torch.set_rng_state(state)
    return deepcopy(clip), tokenizer


def new_clip(vision: dict[str, Any], text: dict[str, Any]) -> open_clip.CustomTextCLIP:
    vision, small = {k: v for k, v in vision.items() if k != "small"}, vision.get("small", {})
    with small_timm(small):
        config = {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text, "custom_text": True, "init_logit_bias": -3.0}
        clip = build_open_clip(config, quick_gelu=False).eval()
    with torch.no_grad():
        for p in clip.parameters():  # no part is without effect
            p.add_(0.05 * torch.randn_like(p))
    return clip


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def build_dcp(kind: str, **options: Any) -> DCP:
    clip, tokenizer = build_clip(kind)
    torch.manual_seed(2)
    return loud(DCP(clip, NAMES, n_ctx=3, tokenizer=tokenizer, **options)).eval()


OPTIONS = [
    {},
    {"coupling": "text_to_vision", "share_cmpa": False, "pooling": "max"},
    {"coupling": "vision_to_text"},
    {"coupling": "self", "share_cmpa": False},
    {"coupling": "none"},
]


def test_logits_and_gradients_equal_the_plain_forward_pass(kind):
    options = OPTIONS[[*KINDS].index(kind) % len(OPTIONS)]
    model = build_dcp(kind, **options)
    logits, expected = model(IMAGES), reference.forward(model, IMAGES)
    assert close(logits, expected)
    found, expected = gradients(model, logits), gradients(model, expected)
    assert close(*(torch.cat([g.flatten() for g in all_of.values()]) for all_of in (found, expected)))
    for name, gradient in expected.items():
        assert close(found[name], gradient, 1e-3), name


@torch.no_grad()
def test_without_prompts_the_towers_are_those_of_open_clip(kind):
    clip, tokenizer = build_clip(kind)
    plain = FrozenCLIP(clip, tokenizer)
    expected = F.normalize(clip.encode_image(IMAGES), dim=-1)
    assert close(plain.encode_image(IMAGES), expected)
    tokens = plain.enter(IMAGES)
    assert tokens.x.shape[1:] == (plain.vision_tower.num_tokens, 64)
    assert close(plain.encode_image(tokens), expected)


def inside(tower: VisionTower, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is read of a transformer's middle and last block, by hooks on its own modules."""
    modules = tower.visual.get_submodule(tower.block_path)
    prefix, found = tower.num_prefix, dict[str, torch.Tensor]()
    middle, last = modules[len(modules) // 2], modules[-1]

    def keep(name: str) -> Callable[..., None]:
        return lambda _, inputs, output: found.update({name: inputs[0] if name == "middle" else output})

    hooks = [middle.register_forward_hook(keep("middle")), last.register_forward_hook(keep("last"))]
    tower.visual(images)
    for hook in hooks:
        hook.remove()
    norm = getattr(middle, "ln_1", getattr(middle, "norm1", None))
    x = found["middle"] if "PostNorm" in type(middle).__name__ else norm(found["middle"])
    every_fourth = tower.norm(found["last"])[:, ::4][:, -(-prefix // 4) :]
    return {
        "middle": torch.cat([x[:, : prefix > 0].flatten(1), x[:, prefix:].mean(1)], 1),
        "last": every_fourth.mean(1),
    }


@torch.no_grad()
def test_what_is_read_of_the_inside_is_what_the_library_computes(kind):
    """Also by DCP's fused head and by a head that reads less; a pooling by attention reads the last block
    itself."""
    model = build_dcp(kind)
    plain, images = model.encoder, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    found = dict(zip(plain.parts, plain.read(images).split([*plain.parts.values()], 1), strict=True))
    expected = inside(plain.vision_tower, images)
    assert ("last" in found) == (plain.vision_tower.pooled == 1)
    for name in found.keys() & expected:
        assert close(found[name], F.normalize(expected[name], dim=-1)), name
    model.store_stats(images)
    for parts in range(1, 1 + len(plain.parts)):
        assert close(plain.read(images, parts), torch.cat([*found.values()][:parts], 1))
        columns = plain.num_features + sum([*plain.parts.values()][:parts])
        model.text_probe = empty_probe(model, parts)
        assert model.num_features == columns
        model.text_probe.weight.copy_(torch.randn(len(NAMES), columns))
        assert close(model.fuse()(images), model(images))


def centred(head: Head, image: torch.Tensor) -> torch.Tensor:
    """The logit of the second class, less the mean logit."""
    logits = head(image)[0]
    return logits[1] - logits.mean()


@torch.no_grad()
def test_where_a_logit_comes_from(kind):
    """Shares in what is a mean over patches add up to its logit; those in tokens differ by place."""
    clip, tokenizer = build_clip(kind)
    plain, image = FrozenCLIP(clip, tokenizer), IMAGES[:1]
    head, tower = (
        LinearHead(plain, NAMES, torch.zeros(4, plain.num_features), torch.zeros(4)).eval(),
        plain.vision_tower,
    )
    head.text_probe = empty_probe(head)
    weight = dict(zip(plain.parts, head.text_probe.weight.split([*plain.parts.values()], 1), strict=True))
    means = [part[:, -tower.width :] for name, part in weight.items() if name in ("middle", "last")]
    for part in means:
        part.copy_(torch.randn_like(part))
    shares = logit_shares(head, image, 1)
    assert shares.shape == image.shape[2:]
    assert close(shares.sum(), centred(head, image), 1e-4)
    for part in means:
        part.zero_()
    weight["embedding"].copy_(torch.randn_like(weight["embedding"]))
    assert logit_shares(head, image, 1).std() > 0


@torch.no_grad()
def test_where_a_logit_of_the_miniature_comes_from():
    plain, image = plain_clip("dcp_mini"), torch.randn(1, 3, 192, 192, generator=torch.Generator().manual_seed(0))
    head = LinearHead(plain, NAMES, torch.zeros(4, 512), torch.zeros(4)).eval()
    head.text_probe = empty_probe(head)
    head.text_probe.weight[:, 512:].normal_()
    assert close(logit_shares(head, image, 1).sum(), centred(head, image), 1e-4)


@torch.no_grad()
def test_a_gate_changes_where_a_logit_comes_from():
    """Weight and features multiply to the logit of the classifier that answers, and shares are by that
    weight."""
    plain, images = plain_clip("dcp_mini"), torch.randn(1, 3, 192, 192, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    head = LinearHead(plain, NAMES, 10 * torch.randn(4, 512), torch.zeros(4)).eval()
    probe = head.text_probe = empty_probe(head)
    probe.weight.normal_(std=5)
    features = head.encode_image(images)
    before, ungated = logit_shares(head, images, 1), features @ weight_of(head, features, 1)
    assert close(ungated, centred(head, images), 1e-4)
    distance = head.distances(features).item()
    for near, is_open in ((0.9, True), (1.1, False)):
        probe.gate = torch.tensor([near * distance, near * distance + 0.2, 0.25])
        assert close(features @ weight_of(head, features, 1), centred(head, images), 1e-3)
        assert close(centred(head, images), ungated, 1e-3) != is_open
        assert close(logit_shares(head, images, 1), before, 1e-4) != is_open


@torch.no_grad()
def test_text_prompts_that_are_words_give_the_sentence(kind):
    """Prompts that equal word embeddings, never rewritten: the features are open_clip's of the whole
    sentence."""
    clip, tokenizer = build_clip(kind)
    tokenizer = tokenizer or open_clip.SimpleTokenizer()
    model = DCP(clip, NAMES, n_ctx=3, tokenizer=tokenizer, coupling="text_to_vision", ctx_init="a photo of")
    model.prompts["text"].copy_(
        clip.text.token_embedding(tokenizer(["a photo of"]))[0, model.name_tokens.prompts.start :][:3]
    )
    sentences = [f"a photo of {name.replace('_', ' ')}." for name in NAMES]
    expected = clip.encode_text(tokenizer(sentences, context_length=16), normalize=True)
    assert close(model.eval().encode_text(), expected)


@torch.no_grad()
def test_calibrated_fused_and_independent_of_the_batch(kind):
    model = build_dcp(kind)
    model.store_stats(2 * torch.randn(5, 3, 32, 32))
    logits = model(IMAGES)
    assert close(model(IMAGES[:1]), logits[:1])
    assert close(model.fuse()(IMAGES), logits)
    assert close(model(model.encoder.enter(IMAGES)), logits)


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"timm_model_name": "convnext_atto", "timm_pool": "avg"}, "transformer blocks, with or without a class"),
        (timm_vision("vit_base_patch16_224", "token", qk_norm=True), r"without norms \(qk_norm\)"),
        (timm_vision("vit_base_patch16_224", "token", block_fn=ResPostBlock), "timm's Block or EvaBlock, not"),
    ],
)
def test_other_image_towers_are_refused_with_the_reason(monkeypatch, vision, message):
    monkeypatch.setitem(KINDS, "other", ({"image_size": 32} | vision, CAUSAL, None))
    clip, _ = build_clip("other")
    with pytest.raises(ZooError, match=message):
        DCP(clip, NAMES)
    if "convnext" in vision["timm_model_name"]:  # which can be read without prompts
        assert close(FrozenCLIP(clip).encode_image(IMAGES), F.normalize(clip.encode_image(IMAGES), dim=-1))


RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
RN50 = RESNET | {"layers": [3, 4, 6, 3], "width": 64}


@FEW_STEPS
@pytest.mark.parametrize(
    ("method", "kind"),
    [
        *(("promptsrc", "siglip"), ("2sfs", "siglip"), ("cocoop", "siglip")),
        *(("coop", "resnet"), ("cocoop", "resnet"), ("prograd", "resnet"), ("clip-adapter", "resnet")),
        ("coop", "rn50"),
    ],
)
def test_other_methods_train_on_towers_that_are_not_clips(method, kind, monkeypatch):
    """Prompts in the text alone do so on any image tower."""
    monkeypatch.setitem(KINDS, "resnet", (RESNET, CAUSAL, None))
    monkeypatch.setitem(KINDS, "rn50", (RN50, CAUSAL, None))
    clip, tokenizer = build_clip(kind)
    plain = FrozenCLIP(clip, tokenizer, CFG)
    pictures = [np.random.default_rng(i).integers(0, 255, (32, 32, 3), np.uint8) for i in range(3)]
    items = [Item(picture, str(i), i % 2) for i, picture in enumerate(pictures)]
    images = ImageLoader(Photos(items), FeatureExtractor(plain))
    published = METHODS[method].recipe("dcp_vitb16", "dtd", 2, "few-shot")
    short = {"epochs": 1, "n_ctx": 3, "batch_size": 3, "steps": 2, "augment": "none"}
    recipe = published.updated({name: value for name, value in short.items() if hasattr(published, name)})
    task = Task(plain, "dcp_vitb16", NAMES[:2], "a {}.", images, None, recipe)
    logits = torch.from_numpy(outputs_of_loader(fit_head(method, task), images, 100).logits)
    assert logits.shape == (3, 2)
    assert logits.isfinite().all()


def build(clip: nn.Module, **options) -> DCP:
    torch.manual_seed(3)
    return loud(DCP(clip, NAMES, n_ctx=3, **options)).eval()


def logits_and_gradients(model: DCP) -> dict[str, torch.Tensor]:
    logits = model.train()(IMAGES)
    return {"logits": logits} | gradients(model, logits)


def blocks(clip: nn.Module) -> list[nn.Module]:
    return [*clip.visual.transformer.resblocks, *clip.transformer.resblocks]


def with_own_attention(clip: nn.Module) -> nn.Module:
    """The CLIP with `open_clip.transformer.Attention` in every block, as in open_clip 4, and the same
    weights."""
    for block in blocks(clip):
        attention = Attention(block.attn.embed_dim, block.attn.num_heads)
        attention.load_state_dict(block.attn.state_dict())
        block.attn = attention
    return clip.eval()


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_own_attention_gives_the_same(golden, coupling):
    own = with_own_attention(build_tiny_clip(golden))
    assert not any(hasattr(block.attn, "embed_dim") for block in blocks(own))
    expected, found = (logits_and_gradients(build(clip, coupling=coupling)) for clip in (build_tiny_clip(golden), own))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_norm_inside_attention_is_refused(golden):
    clip = build_tiny_clip(golden)
    clip.transformer.resblocks[-1].mlp.add_module("ln", nn.LayerNorm(64))  # one block is enough
    with pytest.raises(ZooError, match=r"without norms inside, not mlp.ln.bias, mlp.ln.weight\. Any open_clip"):
        build(clip)
    clip.transformer.resblocks[-1].mlp.ln = nn.Identity()
    assert build(clip)(IMAGES).shape == (3, 4)


@pytest.mark.scripts  # compiles for seconds; the fused head is compiled in every run
@torch.no_grad()
def test_compiled_models_read_no_texts(golden, monkeypatch):
    """Texts are read once, between the graphs, as without a compiler."""
    short = build(build_tiny_clip(golden, **TWO), depth=1)  # more blocks are compiled like these, for seconds
    short.store_stats(IMAGES)
    short.text_probe = empty_probe(short)
    expected = short(IMAGES)
    monkeypatch.setattr(short.encoder, "tokenizer", None)
    monkeypatch.setattr(TextTower, "begin", None)
    compiled = torch.compile(short, backend="aot_eager")
    torch.testing.assert_close(compiled(IMAGES), expected, atol=1e-4, rtol=1e-4)
    monkeypatch.undo()
    short.text_probe.bias += 1  # what a training changes has its effect
    torch.testing.assert_close(compiled(IMAGES), expected + 1, atol=1e-4, rtol=1e-4)


def calibrated(model: DCP) -> DCP:
    """The model with scaled-up trained parameters, a nonzero statistics, and in eval mode."""
    loud(model).store_stats(2 * torch.randn(6, 3, *IMAGES.shape[2:]))
    return model.eval()


@torch.no_grad()
def test_a_fused_head_is_a_frozen_and_small_module_of_its_own(tiny_clip):
    """With any patch embedding, also after torch.save; without stored statistics there is none."""
    tiny_clip.visual.conv1 = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 128, 2, 2))
    model = DCP(tiny_clip, NAMES, n_ctx=3, depth=1, coupling="text_to_vision", share_cmpa=False)
    with pytest.raises(ZooError, match="store_stats"):
        model.fuse()
    fused, file, logits = calibrated(model).fuse(), io.BytesIO(), model(IMAGES)
    assert close(fused(IMAGES), logits)
    assert close(fused.encode_image(IMAGES), model.encode_image(IMAGES))
    torch.save(fused, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(IMAGES), fused(IMAGES))
    assert not any(p.requires_grad for p in fused.parameters())
    text = sum(p.numel() for p in model.encoder.text.transformer.parameters())
    assert sum(p.numel() for p in fused.parameters()) < sum(p.numel() for p in model.encoder.clip.parameters()) - text
    assert close(fused.half()(IMAGES.half()).float(), logits, 0.1)
    assert close(model(IMAGES), logits)
    model.set_classnames(["other"])
    assert fused.classnames == NAMES


@torch.no_grad()
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.scripts)])
def test_compiles_as_a_full_graph(golden, backend):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor needs g++")
    fused = calibrated(DCP(build_tiny_clip(golden, **TWO), NAMES, n_ctx=3, depth=1)).fuse()
    compiled = torch.compile(fused, fullgraph=True, backend=backend)
    assert close(compiled(IMAGES), fused(IMAGES))
