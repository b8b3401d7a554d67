"""The fast paths against plain equations, and the caches against every way to change their inputs."""

import pytest
import reference
import torch
from helpers import close, gradients, in_distribution, loud, vision_blocks
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.functional import center_crop
from torchvision.transforms.functional import to_tensor as pil_to_tensor

from dcp_zoo import DCP, create_model
from dcp_zoo.backbone.towers.open_clip import attend
from dcp_zoo.data import Item
from dcp_zoo.features.device import autocast
from dcp_zoo.features.loader import PhotoReader
from dcp_zoo.features.photos import Photos
from dcp_zoo.heads.config import COUPLINGS
from dcp_zoo.heads.head import Head
from dcp_zoo.training.methods.dcp import clip_in

NAMES = ["ant", "wild_cat", "crocodile head", "a very long class name with many words", "emu"]
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def to_tensor(image: Image.Image) -> torch.Tensor:
    return pil_to_tensor(center_crop(image, 24))


def build(clip: nn.Module, **options) -> DCP:
    return loud(DCP(clip, NAMES, n_ctx=3, **options)).eval()


def test_attention_in_bfloat16_is_nearly_as_exact_as_torchs():
    q, k, v = (
        2 * torch.randn(2, 3, length, 16, generator=torch.Generator().manual_seed(length)) for length in (5, 9, 9)
    )

    def found(attention, dtype):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        out = attention(*inputs, None, False)
        return [t.float() for t in (out, *torch.autograd.grad(out.sin().sum(), inputs))]

    plain = found(lambda q, k, v, *_: (q @ k.mT / 4).softmax(-1) @ v, torch.float64)
    ours, torchs = found(attend, torch.bfloat16), found(F.scaled_dot_product_attention, torch.bfloat16)
    for exact, one, other in zip(plain, ours, torchs, strict=True):
        assert (one - exact).norm() < 3 * (other - exact).norm() + 1e-3 * exact.norm()
    for exact, one in zip(plain, found(attend, torch.float32), strict=True):
        torch.testing.assert_close(one, exact, atol=1e-5, rtol=1e-4)


def fresh(model: DCP) -> torch.Tensor:
    """The logits without any cache, as gradients are enabled."""
    with torch.enable_grad():
        return model(IMAGES).detach()


def poke(t: torch.Tensor) -> None:
    """Change one value."""
    t.view(-1)[t.numel() // 2] += 0.5


MUTATIONS = {
    "classes": lambda m: m.set_classnames(NAMES[::-1]),
    "prompts": lambda m: m.prompts["text"].mul_(1.5),
    "half and back": lambda m: m.bfloat16().float(),
    "another storage": lambda m: setattr(m.prompts["text"], "data", m.prompts["text"] * 2),
    "one number of cmpa": lambda m: poke(m.cmpa[0].to_vision.mlp.c_proj.bias),
    "one number of a text block": lambda m: poke(m.encoder.text.transformer.resblocks[1].mlp.c_fc.bias),
    "embedding of a name": lambda m: m.encoder.text.token_embedding.weight[m.name_tokens[0].ids[0]].add_(1),
    "ln_final": lambda m: poke(m.encoder.text.ln_final.bias),
    "statistics in place": lambda m: m.stored_stats.mul_(2),
    "calibration": lambda m: m.store_stats(IMAGES * 3),
    "load_state_dict": lambda m: m.load_state_dict({k: v * 1.1 for k, v in m.state_dict().items()}),
    "optimizer": lambda m: step(m),
    "parameter": lambda m: setattr(
        m.encoder.text, "text_projection", nn.Parameter(m.encoder.text.text_projection * torch.randn(1, 64))
    ),
}


def step(model: DCP) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    with torch.enable_grad():
        model(IMAGES).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("mutation", MUTATIONS)
@torch.no_grad()
def test_text_features_are_never_stale(tiny_clip, mutation):
    """And are computed once only: the text tower has not run again for the last logits."""
    model = build(tiny_clip, coupling="text_to_vision" if mutation in ("prompts", "ln_final") else "bidirectional")
    model.store_stats(IMAGES)
    before = model(IMAGES)
    assert torch.equal(model(IMAGES), before)
    MUTATIONS[mutation](model)
    assert close(model(IMAGES), fresh(model), 1e-6)
    passes = []
    model.encoder.text.ln_final.register_forward_hook(lambda *_: passes.append(1))
    model.encoder.text.transformer.resblocks[0].ln_1.register_forward_hook(lambda *_: passes.append(1))
    model(IMAGES)
    assert not passes


@torch.no_grad()
def test_cache_follows_dtype_and_autocast(tiny_clip):
    model = build(tiny_clip)
    model.store_stats(IMAGES)
    model(IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(IMAGES)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(model(IMAGES), fresh(model))
    assert not close(autocast, model(IMAGES), 1e-6)
    with torch.enable_grad():  # nothing is cached then
        model(IMAGES).sum().backward()
    assert model.prompts["text"].grad.abs().sum() > 0
    assert model.double()(IMAGES.double()).dtype == torch.float64


def test_what_is_cached_stays_inside(tiny_clip):
    model = build(tiny_clip)
    model.store_stats(IMAGES)
    model.predict(IMAGES)  # in inference mode, whose tensors could not be used in training
    with torch.no_grad():
        logits = model(IMAGES)
        for tensor in (model.encode_text(), model.encode(IMAGES)[1], *model.image_prompts()):
            tensor.mul_(2)
        assert torch.equal(model(IMAGES), logits)


SIMILAR_NAMES = ["red fox", "red car", "red", "red car 2012 model", "red car 2012 coupe", "emu", "crane", "crane_bird"]


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_names_of_similar_lengths_run_together(tiny_clip, coupling, monkeypatch):
    monkeypatch.setattr("dcp_zoo.backbone.towers.text.CHUNK_PADDING", 2)
    model = build(tiny_clip, coupling=coupling).train()
    model.set_classnames(SIMILAR_NAMES)
    shapes = [tuple(chunk.ids.shape) for chunk in model.name_tokens]
    assert shapes == [(3, 3), (3, 4), (2, 9)]
    logits, expected = model(IMAGES), reference.forward(model, IMAGES)
    assert close(logits.detach(), expected.detach())
    found, expected = gradients(model, logits), gradients(model, expected)
    assert all(close(g, expected[n], 1e-4) for n, g in found.items())  # another order of float32 sums


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_grad_checkpointing_gives_the_same_gradients_with_less_memory(tiny_clip, coupling):
    model = build(tiny_clip, coupling=coupling).train()
    model.set_grad_checkpointing(False)
    expected, kept = gradients(model, model(IMAGES)), kept_for_backward(model)
    model.set_grad_checkpointing(True)
    assert all(close(g, expected[n]) for n, g in gradients(model, model(IMAGES)).items())
    assert kept_for_backward(model) < kept / 2


def kept_for_backward(model: Head) -> int:
    """Bytes of the activations that a step keeps, as autograd saves them."""
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def note(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t  # kept, so that no other tensor gets its place
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = model(IMAGES).sum()
    assert loss.requires_grad
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights)


@pytest.mark.parametrize(
    ("precision", "coupling"), [("float16", "text_to_vision"), *(("bfloat16", coupling) for coupling in COUPLINGS)]
)
def test_half_precision_stores_clip_once_and_trains_in_float32(tiny_clip, coupling, precision):
    model = build(tiny_clip, coupling=coupling).train()
    expected, logits = gradients(model, model(IMAGES)), model(IMAGES).detach()
    with clip_in(model, precision):
        held = {p.dtype for p in model.encoder.clip.parameters() if p.numel() > 1}
        assert held == {getattr(torch, precision)}
        with autocast(torch.device("cpu"), precision):
            assert close(model(IMAGES).detach(), logits, 0.1)
            found = gradients(model, model(IMAGES))
        for name, gradient in found.items():
            assert gradient.dtype == torch.float32
            assert F.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0) > 0.9, name
        model.store_stats(IMAGES)  # without autocast too
        with torch.no_grad():
            assert close(model.eval()(IMAGES), logits, 0.1)


def test_clip_in_float32_is_copied_nowhere(tiny_clip):
    """Of weights without a place no copy can be made."""
    model = build(tiny_clip).to("meta")
    with clip_in(model, "float32"):
        assert {p.device.type for p in model.parameters()} == {"meta"}
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"), clip_in(model, "bfloat16"):
        pass


def test_to_reject_takes_no_second_pass():
    head, passes = create_model("dcp_mini.caltech101-1shot", True), []
    images = torch.randn(3, *head.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
    head.text_probe.threshold.fill_(in_distribution(head.eval(), images).median())
    for block in vision_blocks(head):
        block.ln_2.register_forward_hook(lambda *_: passes.append(1))
    named = head.predict(images)
    once = len(passes)
    found = head.predict(images, reject=True)
    assert len(passes) == 2 * once
    assert found.count(None) == 1
    assert all(name in (None, known) for name, known in zip(found, named, strict=True))


@torch.no_grad()
def test_every_parameter_of_a_head_is_loaded(monkeypatch):
    """Tensors that `skip_init` leaves uninitialised and no file fills would be NaN here; nothing is drawn
    for them."""
    empty, state = torch.empty, torch.get_rng_state()

    def filled(*args, **options):
        t = empty(*args, **options)
        return t.fill_(float("nan")) if t.is_floating_point() else t

    monkeypatch.setattr(torch, "empty", filled)
    model = create_model("dcp_mini.caltech101-16shot", True)
    assert all(p.isfinite().all() for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_decoded_images_are_cached_up_to_a_size_and_unchanged(tmp_path):
    """What is not kept is decoded again: here from files that have changed."""
    items = [Item(str(tmp_path / f"{i}.png"), f"{i}.png", i) for i in range(6)]
    for i, item in enumerate(items):
        Image.effect_noise((40 + i, 30), 80).convert("RGB").save(item.path)
    read = PhotoReader(Photos(items, 8000), to_tensor, None, [False] * 6)
    plain = torch.stack([to_tensor(Image.open(item.path).convert("RGB")) for item in items])
    for _ in range(2):
        assert torch.equal(read(range(6)).x, plain)
    for item in items:
        Image.new("RGB", (40, 30)).save(item.path)
    assert sum(bool(image.any()) for image in read(range(6)).x) == 2
