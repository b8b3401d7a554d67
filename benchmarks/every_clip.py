"""What works on each of open_clip's (architecture, weights) pairs: `results/every_clip.csv`, one row per
architecture.

    python benchmarks/every_clip.py

Random weights. Each architecture is built at its own width, image size and vocabulary; only depth is cut, to
2 blocks. Texts have a tokenizer of our own: the structure is checked, not the accuracy. A row that is there
already is not run again.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import open_clip
import open_clip.timm_model
import timm
import torch
from growing import GrowingTable
from torch.nn import functional as F

import dcp_zoo
from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.data import Item
from dcp_zoo.features.loader import ImageLoader
from dcp_zoo.features.table import FeatureTable
from dcp_zoo.features.views import MIRRORED, PLAIN
from dcp_zoo.training.methods.table import METHODS, fit_head
from dcp_zoo.training.task import Task
from dcp_zoo.zoo.build import build_open_clip

RESULTS = Path(__file__).parent / "results" / "every_clip.csv"
NAMES = ["cat", "red fox", "emu"]
BLOCKS = 2
N_CTX = 4
FEATURE_METHODS = ("tip-adapter", "gda")
COLUMNS = ("architecture", "tags", "dcp", "features")


def small_config(architecture: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """open_clip's config, cut down, and the arguments that cut down timm's image tower."""
    config = open_clip.get_model_config(architecture)
    vision = config["vision_cfg"]
    text = config["text_cfg"]
    timm_args: dict[str, Any] = {}
    name = vision.get("timm_model_name")
    if name:
        if "convnext" in name:
            timm_args = {"depths": (1, 1, 1, 1)}
        elif "patch" in name or "vitamin" in name or name == "vit_base_mci_224":
            timm_args = {"depth": BLOCKS}
    else:
        vision["layers"] = [1, 1, 1, 1] if isinstance(vision["layers"], list) else BLOCKS
    if "hf_model_name" not in text:
        text["layers"] = BLOCKS
    if "multimodal_cfg" in config:
        config["multimodal_cfg"]["layers"] = 1
    return config, timm_args


def tokenizer_like(text: dict[str, Any]) -> Callable[..., torch.Tensor]:
    """One id per word, with start, end and padding where the architecture's tokenizer has them."""
    last = text.get("pool_type") == "last"
    size = text.get("vocab_size", 49408)
    start = [] if last and "SigLIP" in text.get("hf_tokenizer_name", "") else [size - 2]
    end = [] if last else [text["eos_id"] if text.get("pool_type") == "eos" else size - 1]

    def tokenize(texts: list[str], context_length: int = text.get("context_length", 77)) -> torch.Tensor:
        rows = torch.full((len(texts), context_length), 1 if last and not start else 0)
        for row, line in zip(rows, texts, strict=True):
            words = [3 + sum(map(ord, word)) % 900 for word in line.replace(".", " .").split()]
            ids = [*start, *words, *end][:context_length]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    return tokenize


def build_small(config: dict[str, Any], timm_args: dict[str, Any]) -> Any:
    create = timm.create_model
    with mock.patch.object(open_clip.timm_model.timm, "create_model", lambda *a, **k: create(*a, **k, **timm_args)):
        torch.manual_seed(0)
        return build_open_clip(json.loads(json.dumps(config)), quick_gelu=bool(config.get("quick_gelu"))).eval()


def check_dcp(clip: Any, tokenizer: Any, images: torch.Tensor) -> None:
    """Build, train a step, calibrate, fuse, export, and compare the three answers."""
    model = dcp_zoo.DCP(clip, NAMES, n_ctx=N_CTX, tokenizer=tokenizer)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)
    loss = F.cross_entropy(model(images), torch.arange(len(images)))
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    model.eval().requires_grad_(False)
    model.store_stats(images)
    torch.testing.assert_close(model.fuse()(images), model(images), atol=1e-3, rtol=1e-3)
    model.pretrained_cfg = {"input_size": tuple(images.shape[1:])}
    torch.export.export(model.fuse(), (images,))


def check_features(clip: Any, tokenizer: Any, images: torch.Tensor) -> None:
    """What methods on features need, and two of them."""
    plain = FrozenCLIP(clip, tokenizer, {})
    with torch.no_grad():
        features = torch.cat([plain.encode_image(images), plain.encode_image(images.flip(-1))])
        assert plain.zero_shot_classifier(NAMES).shape == (3, features.shape[1])
    assert features.isfinite().all()
    items = [Item("", "", i % len(images)) for i in range(len(features))]
    for name in FEATURE_METHODS:
        table = FeatureTable(items, {PLAIN: features, MIRRORED: features}, [features.shape[1:]])
        recipe = METHODS[name].recipe("dcp_vitb16", "caltech101", 2, "few-shot")
        recipe = recipe.updated({"augment": "none"}) if hasattr(recipe, "augment") else recipe
        known = ImageLoader.of_features(table)
        task = Task(plain, "dcp_vitb16", NAMES[: len(images)], "a photo of a {}.", known, table, recipe)
        assert fit_head(name, task).classify(features).shape == (len(items), len(images))


def outcome(check: Callable[[], None]) -> str:
    """ "yes", or the first line of what went wrong."""
    try:
        check()
    except Exception as error:
        reason = str(error).splitlines()[0].split(" Any open_clip")[0] if str(error) else type(error).__name__
        return reason.rpartition("): it ")[2]
    return "yes"


def has_one_size(architecture: str) -> bool:
    """Whether open_clip's config and timm's agree on the image size, which is not cut down in one alone."""
    vision = open_clip.get_model_config(architecture)["vision_cfg"]
    cfg = timm.get_pretrained_cfg(vision["timm_model_name"]) if "timm_model_name" in vision else None
    return cfg is None or cfg.input_size[1] == vision["image_size"]


def run(config: dict[str, Any], timm_args: dict[str, Any]) -> tuple[str, str]:
    if "hf_model_name" in config["text_cfg"]:
        reason = f"its text tower is Hugging Face's {config['text_cfg']['hf_model_name']}"
        return f"{reason}, which DCP does not take apart", f"not run: {reason}, which must be downloaded"
    clip = build_small(config, timm_args)
    tokenizer = tokenizer_like(config["text_cfg"])
    size = config["vision_cfg"]["image_size"]
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    features = outcome(lambda: check_features(clip, tokenizer, images))
    return outcome(lambda: check_dcp(clip, tokenizer, images)), features


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tags = dict[str, list[str]]()
    table = GrowingTable(RESULTS, COLUMNS, COLUMNS[:1])
    for architecture, tag in open_clip.list_pretrained():
        tags.setdefault(architecture, []).append(tag)
    for architecture, names in tags.items():
        if (architecture,) not in table:
            dcp, features = run(*small_config(architecture))
            if dcp == "yes" and not has_one_size(architecture):
                dcp = "needs images of one size, the same for open_clip and timm."
            table.add([(architecture, " ".join(names), dcp, features)])


if __name__ == "__main__":
    main()
