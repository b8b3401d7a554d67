"""Rows of the table against open_clip's own configs, and models that have no row: open_clip:ARCH/TAG, Hub
repos."""

import json
from functools import cache
from pathlib import Path
from unittest import mock

import open_clip
import pytest
import torch
from PIL import Image
from shared import GOLDEN
from test_tower_kinds import build_clip, word_tokenizer
from torch.utils.flop_counter import FlopCounterMode

from dcp_zoo import ZooError, create_model, create_transform
from dcp_zoo.backbone._torch import skip_init
from dcp_zoo.backbone.mini import build_mini_clip
from dcp_zoo.backbone.tokens import last_tokens, start_tokens
from dcp_zoo.heads.config import DCPConfig
from dcp_zoo.heads.dcp import DCP
from dcp_zoo.training.recipes import default_recipe
from dcp_zoo.zoo import build as zoo_build
from dcp_zoo.zoo.specs import MODELS, SIZES, open_clip_spec


@pytest.mark.parametrize("spec", [spec for spec in MODELS.values() if spec.clip], ids=lambda spec: spec.name)
def test_a_row_says_what_open_clip_says(spec):
    theirs = open_clip_spec(f"open_clip:{spec.clip}/{spec.clip_pretrained}")
    assert spec.data_cfg == theirs.data_cfg
    assert spec.clip_repo == theirs.clip_repo


@cache
def counted(name: str | None, size: int, config: DCPConfig) -> tuple[int, int, int | None]:
    """The parameters of a CLIP, its operations for an image of this size, and the numbers in a head. The
    latter is None without the CLIP's tokenizer, which is not installed."""
    with torch.device("meta"), skip_init():
        clip = zoo_build.build_open_clip(open_clip.get_model_config(name), False) if name else build_mini_clip()
    with FlopCounterMode(display=False) as counter:
        clip.encode_image(torch.empty(1, 3, size, size, device="meta"))
    parameters, operations = sum(p.numel() for p in clip.parameters()), counter.get_total_flops()
    if name == "ViT-H-14-worldwide":  # whose towers have the sizes of ViT-H-14's
        return parameters, operations, None
    with skip_init():
        dcp = DCP(clip, ["cat"], config)
    stats = dcp.num_coupled * dcp.prompts["vision"].numel()
    return parameters, operations, stats + sum(p.numel() for p in dcp.parameters() if p.requires_grad)


COUNTED = [  # in every run the default ones; open_clip's towers take half a second each
    pytest.param(spec, marks=() if name in ("dcp_mini", *SIZES.values()) else pytest.mark.scripts, id=name)
    for name, spec in MODELS.items()
]


@pytest.mark.parametrize("spec", COUNTED)
def test_parameters_and_operations_are_in_the_row(spec):
    parameters, operations, numbers = counted(spec.clip, spec.image_size, default_recipe(spec.name).config)
    assert spec.parameters == round(parameters / 1e6)
    assert spec.gflops == round(operations / 1e9, 1)
    assert numbers is None or spec.head_mb == round(2e-6 * numbers, 1)


@pytest.mark.parametrize("pair", ["ViT-B-16-SigLIP2/webli", "MobileCLIP2-B/dfndr2b", "ViT-B-16/openai"])
def test_the_test_transform_is_open_clips_own(pair):
    """Bit for bit, on an image that needs resizing and cropping."""
    architecture, tag = pair.split("/")
    cfg = open_clip.get_pretrained_cfg(architecture, tag)
    preprocess = {key: cfg[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in cfg}
    theirs = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(size=224, **preprocess), False)
    image = Image.effect_noise((311, 500), 80).convert("RGB")
    assert torch.equal(create_transform(f"open_clip:{pair}")(image), theirs(image))


def test_fresh_prompts_leave_room_for_names():
    """SigLIP's SO400M reads 16 tokens: as many prompts as the others have would fill them."""
    with mock.patch.object(zoo_build, "build_open_clip", return_value=build_clip("siglip")[0]):
        options = {"classnames": ["ant"], "tokenizer": word_tokenizer(False)}
        assert create_model("dcp_siglip_so400m", **options).config.n_ctx == 4
        assert create_model("dcp_siglip_so400m", n_ctx=2, **options).config.n_ctx == 2


def test_what_cannot_be_built_is_explained(monkeypatch):
    """Before anything is downloaded."""
    for name, message in (
        ("open_clip:ViT-B-16-SigLIP2/weblii", "Nearest: ViT-B-16-SigLIP2/webli"),
        ("openclip:ViT-B-16/openai", "open_clip:ARCH/TAG"),
    ):
        with pytest.raises(ZooError, match=message):
            create_model(name)
    monkeypatch.setattr(zoo_build, "fetch_clip", lambda *_: pytest.fail("downloaded"))
    monkeypatch.setattr(open_clip, "get_tokenizer", mock.Mock(side_effect=OSError("no such file")))
    with pytest.raises(ZooError, match=r"of ViT-B-16-SigLIP2 cannot be loaded: no such file.*tokenizer="):
        create_model("dcp_siglip2_b16", "clip", classnames=["ant"])


def write_tokenizer(folder: Path) -> dict[str, list[int]]:
    """SigLIP 2's tokenizer, which is Gemma's, with the pieces that some texts need: returns these with their
    ids."""
    tokenizers = pytest.importorskip("tokenizers")
    known = json.loads((GOLDEN.parent / "gemma.json").read_text("utf-8"))
    merges = [tuple(pair) for pair in known["merges"]]
    model = tokenizers.models.BPE(known["pieces"], merges, unk_token="<unk>", fuse_unk=True)
    made = tokenizers.Tokenizer(model)
    made.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    made.post_processor = tokenizers.processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 1)])
    made.add_special_tokens(special)
    made.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": False,
        "add_eos_token": True,
        "padding_side": "right",
    }
    config |= {f"{name[1:-1]}_token": name for name in special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return known["ids"]


def test_the_tokenizer_of_a_model_for_many_languages(monkeypatch, tmp_path):
    """Its token ids, padded to 64, are those of Gemma's own tokenizer for text in lower case without
    punctuation and underscores, as SigLIP 2 was trained."""
    pytest.importorskip("transformers")
    known, spec = write_tokenizer(tmp_path), MODELS["dcp_siglip2_b16"]
    config = open_clip.get_model_config(spec.clip)
    config["text_cfg"]["hf_tokenizer_name"] = str(tmp_path)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, spec.clip, config)
    tokenizer = zoo_build.build_tokenizer(spec)
    rows = tokenizer([*known])
    assert rows.tolist() == [ids + [0] * (64 - len(ids)) for ids in known.values()]
    assert start_tokens(tokenizer) == 0
    assert last_tokens(rows).tolist() == [len(ids) - 1 for ids in known.values()]
