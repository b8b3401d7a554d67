"""Logits, losses and gradients against the authors' code, for the fast and the plain forward pass."""

import json
import re
from dataclasses import dataclass

import pytest
import reference
import torch
from helpers import FEW_STEPS, close
from safetensors.torch import load_file
from shared import GOLDEN
from torch.nn import functional as F

from dcp_zoo import DCP
from dcp_zoo.backbone.inputs import Pixels
from dcp_zoo.data import Item
from dcp_zoo.features.extract import FeatureExtractor
from dcp_zoo.features.loader import ImageLoader
from dcp_zoo.features.photos import Photos
from dcp_zoo.training.loop import train
from dcp_zoo.training.recipes import AUTHORS, Recipe
from dcp_zoo.training.task import Task

OLD_TORCH = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10)
TOLERANCE = 2e-4 if OLD_TORCH else 1e-4  # relative; old builds round otherwise, 1.1e-4 was seen
PARTS = {  # the release's module names and ours
    "proj_t2v": "to_vision.query",
    "ln_pa_1_visual": "to_vision.norm1",
    "promt_attention_visual": "to_vision.attn",
    "ln_pa_2_visual": "to_vision.norm2",
    "mlp_pa_visual": "to_vision.mlp",
    "proj_v2t": "to_text.query",
    "ln_pa_1_text": "to_text.norm1",
    "promt_attention_text": "to_text.attn",
    "ln_pa_2_text": "to_text.norm2",
    "mlp_pa_text": "to_text.mlp",
}


def our_name(name: str, shared: bool) -> str | None:
    """Our name for one of the release's parameters; None for those of block 0, which have no effect unless
    shared."""
    if name.startswith("prompt_learner"):
        return "prompts.text" if name.endswith("text") else "prompts.vision"
    block, part, rest = re.fullmatch(r"resblocks\.(\d+)\.prompt_attn\.(\w+)\.(.+)", name).groups()
    k = 0 if shared else int(block) - 1
    return None if k < 0 else f"cmpa.{k}.{PARTS[part]}.{rest}"


@pytest.fixture(params=range(9), ids=lambda i: f"case{i}")
def case(request, golden, tiny_clip) -> tuple[DCP, dict]:
    """A DCP with the case's weights, and the case's tensors under our names."""
    meta = dict(golden["cases"][request.param])
    tensors = load_file(GOLDEN / meta.pop("file"))
    model = DCP(tiny_clip, golden["classnames"], **meta)
    found = {"param": {}, "grad": {}}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        if kind in found and our_name(name, meta["share_cmpa"]):
            found[kind][our_name(name, meta["share_cmpa"])] = tensor
    own = {n for n, p in model.named_parameters() if p.requires_grad}
    if meta["coupling"] == "text_to_vision":  # the release has a text half here that is never trained
        assert not any("to_text" in name for name in own | found["grad"].keys())
    assert own == found["grad"].keys()
    model.load_state_dict({n: found["param"][n] for n in own}, strict=False)
    return model, tensors | found


@pytest.mark.parametrize("forward", ["fast", "plain"])
def test_token_ids_logits_loss_and_every_gradient(case, golden, forward):
    model, expected = case
    model.train()
    start, (ids, _) = 1 + model.config.n_ctx, reference.tokenize(model)  # after the prompts
    assert torch.equal(ids[:, start:], expected["tokenized_prompts"].long()[:, start:])
    images, labels = golden["backbone"]["images"], torch.tensor(golden["labels"])
    logits = model(images) if forward == "fast" else reference.forward(model, images)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    assert close(logits, expected["logits"], TOLERANCE)
    assert close(loss, expected["loss"], TOLERANCE)
    for name, gradient in expected["grad"].items():
        assert close(model.get_parameter(name).grad, gradient, TOLERANCE), name
    model.eval().stats = "batch"
    with torch.no_grad():
        assert close(model(images[:1]), expected["logits_first_alone"], TOLERANCE)


def with_weights(model: DCP, case: dict) -> DCP:
    """The model with a case's trained tensors, which one CMPA shares, cut to its number of prompts."""
    found = {our_name(n.removeprefix("param."), True): t for n, t in case.items() if n.startswith("param.")}
    for name, own in model.to_state().items():
        own.data.copy_(found[name][: len(own)])
    return model


@dataclass
class OneBatch(ImageLoader):
    """The golden images as one batch per epoch."""

    batch: tuple[Pixels, torch.Tensor] = ()

    def shuffled(self, *args, **options):
        return [self.batch]


@FEW_STEPS
@pytest.mark.parametrize("name", ["release", "paper"])
def test_ten_steps_of_the_authors_trainer(golden, tiny_clip, name):
    """Losses of the authors' code, with its optimizer and schedule, one step in each of the first ten
    epochs: as it was released, and with its new text prompts written back, as in the paper."""
    recipe = Recipe(**AUTHORS[name], stop_epoch=10)
    expected = json.loads((GOLDEN / "trajectory.json").read_text())[recipe.coupling]
    model = with_weights(DCP(tiny_clip, golden["classnames"], recipe.config), load_file(GOLDEN / expected["case"]))
    labels = golden["labels"]
    items = [Item("", "", label) for label in labels]
    batch = Pixels(golden["backbone"]["images"]), torch.tensor(labels)
    images = OneBatch(Photos(items), FeatureExtractor(model.encoder), batch=batch)
    task = Task(model.encoder, "", model.classnames, model.texts, images, None, recipe)
    assert close(torch.tensor(train(task, model)), torch.tensor(expected["losses"]), 1e-3)


def test_words_of_the_phrase_beyond_the_prompts_stay(golden, tiny_clip):
    """The authors' code reads "p1 p2 of a name." after two prompts from "a photo of a"."""
    expected = json.loads((GOLDEN / "trajectory.json").read_text())["phrase"]
    recipe = Recipe(**AUTHORS["release"], n_ctx=expected["n_ctx"])
    model = DCP(tiny_clip, golden["classnames"], recipe.config)
    text = model.prompts["text"].detach().clone()
    with_weights(model, load_file(GOLDEN / expected["case"])).prompts["text"].data.copy_(text)
    images, labels = golden["backbone"]["images"], torch.tensor(golden["labels"])
    for logits in (model.train()(images), reference.forward(model, images)):
        assert close(F.cross_entropy(logits, labels), torch.tensor(expected["loss"]), TOLERANCE)
