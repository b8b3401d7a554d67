"""Conversion of the authors' checkpoints: the golden one, and everything that must be rejected."""

import itertools
import json
import os
import pickle
import shutil
import timeit
from collections import defaultdict
from collections.abc import Callable

import convert as script
import pytest
import torch
from convert import convert_cmpa_checkpoint, read_pickle
from helpers import close
from PIL import Image
from safetensors.torch import load_file
from shared import CFG, GOLDEN, CommandLine
from torch import nn

import dcp_zoo
from dcp_zoo import ZooError
from dcp_zoo.backbone.clip import FrozenCLIP

CHECKPOINT = GOLDEN / "model.pth.tar-20"  # belongs to case 1


def test_the_golden_checkpoint_gives_its_logits(golden, tiny_clip, tmp_path):
    case = load_file(GOLDEN / "case1.safetensors")
    model = convert_cmpa_checkpoint(CHECKPOINT, classnames=golden["classnames"], clip=tiny_clip)
    config = model.config
    assert (config.coupling, config.share_cmpa, config.n_ctx, model.num_coupled) == ("text_to_vision", True, 16, 3)
    assert all(cmpa.to_text is None for cmpa in model.cmpa)
    images = golden["backbone"]["images"]
    with torch.inference_mode():
        torch.testing.assert_close(model(images), case["logits"], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(model(images[:1]), case["logits_first_alone"], rtol=1e-5, atol=1e-4)

    model.store_stats(images)  # and once saved and loaded it still does
    model.save_pretrained(tmp_path)
    again = dcp_zoo.DCP(tiny_clip, golden["classnames"], coupling="text_to_vision", depth=3)
    dcp_zoo.load_head(again, tmp_path).eval()
    with torch.inference_mode():
        assert again.stats == "stored"
        torch.testing.assert_close(again(images), case["logits"], rtol=1e-4, atol=1e-3)


@pytest.mark.scripts
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_checkpoint_as_dassl_writes_it(golden, tiny_clip, tmp_path, zipped):
    """Its warm-up schedule is stored with the `successor`, an object that holds the optimizer; here in half
    precision, as the release trains."""
    checkpoint = torch.load(CHECKPOINT, weights_only=True)
    prompts = nn.Parameter(checkpoint["state_dict"]["prompt_learner.prompts_text"])
    optimizer = torch.optim.SGD([prompts], 0.0035, momentum=0.9, weight_decay=5e-4)
    prompts.sum().backward()
    optimizer.step()
    successor = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20.0)
    scheduler = {"successor": successor, "warmup_epoch": 1, "cons_lr": 1e-5, "base_lrs": [0.0035], "last_epoch": 20}
    half = {name: t.half() if t.is_floating_point() else t for name, t in checkpoint["state_dict"].items()}
    stored = {"state_dict": half, "optimizer": optimizer.state_dict(), "scheduler": scheduler, "val_result": 91.8}
    path = tmp_path / "model-best.pth.tar"
    torch.save(checkpoint | stored, path, _use_new_zipfile_serialization=zipped)
    allowed = torch.serialization.get_safe_globals()
    model = convert_cmpa_checkpoint(path, classnames=golden["classnames"], clip=tiny_clip)
    assert close(model.prompts["text"], half["prompt_learner.prompts_text"].float())
    assert set(torch.serialization.get_safe_globals()) == set(allowed)


@pytest.mark.scripts
def test_another_clip_and_other_classes_are_refused(golden, tiny_clip):
    names = golden["classnames"]
    for changed, message in (
        (names[:4], "5 classes, but 4 class names"),
        ([names[1], names[0], *names[2:]], "another class in place of 'brontosaurus'"),
    ):
        with pytest.raises(ZooError, match=message):
            convert_cmpa_checkpoint(CHECKPOINT, classnames=changed, clip=tiny_clip)
    with torch.no_grad():
        tiny_clip.visual.transformer.resblocks[2].mlp.c_fc.weight[0, 0] += 0.1
    with pytest.raises(ZooError, match=r"1 of 109 tensors differ.*resblocks.2.mlp.c_fc.weight"):
        convert_cmpa_checkpoint(CHECKPOINT, classnames=names, clip=tiny_clip)


class Harmful:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable, *args: object, state: object = None) -> None:
        self.call = (function, args, state)

    def __reduce__(self):
        return self.call


CODE = "__import__('os').mkdir('executed')"
HARMFUL = [
    Harmful(os.mkdir, "executed", state={"successor": 1}),
    Harmful(timeit.timeit, CODE, "pass", timeit.default_timer, 1),
    Harmful(pickle.loads, pickle.dumps(Harmful(os.mkdir, "executed"))),
]


def stored_in(harmful: Harmful) -> list[object]:
    """Checkpoints with this object in different places, also in the state of a class that may be stored."""
    successor = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([torch.zeros(1)], 0.1), 20.0)
    successor.T_max = harmful
    return [
        {"state_dict": harmful},
        {"state_dict": {"prompt_learner.prompts_text": harmful}},
        {"state_dict": {}, "optimizer": {"state": [(1, {"nested": harmful})]}},
        {"state_dict": {}, "scheduler": {"successor": successor}},
        {"state_dict": defaultdict(dict, first=harmful)},
        {harmful: 1},
    ]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_pickle_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pth.tar-20"
    for checkpoint in itertools.chain.from_iterable(stored_in(harmful) for harmful in HARMFUL):
        for zipped in (True, False):
            torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
            with pytest.raises(ZooError, match=r"harmful code .*Nothing in it was executed"):
                read_pickle(path)
    assert [*tmp_path.iterdir()] == [path]
    pickle.loads(pickle.dumps(HARMFUL[2]))  # what an unguarded reader would have done
    assert (tmp_path / "executed").exists()


@pytest.mark.scripts
def test_command_line(golden, tiny_clip, tmp_path, monkeypatch, capsys):
    """`hub/convert.py` with the small CLIP in place of a downloaded one, calibrated on a folder of
    images."""
    run = CommandLine(monkeypatch, capsys, script.app)

    def create_model(name: str, pretrained: str, **args) -> dcp_zoo.DCP:
        assert (name, pretrained) == ("dcp_vitb16", "clip")
        return dcp_zoo.DCP(FrozenCLIP(tiny_clip, pretrained_cfg=CFG), **args)

    monkeypatch.setattr("convert.create_model", create_model)
    (tmp_path / "names.txt").write_text("\n".join(golden["classnames"]))
    (tmp_path / "images/ant").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (40, 40), (80 * i, 20, 90)).save(tmp_path / f"images/ant/{i}.png")
    shutil.copy(CHECKPOINT, tmp_path / "model.pth.tar-20")
    args = ["--model", "dcp_vitb16", "--classnames", tmp_path / "names.txt", "--output", tmp_path / "head"]
    run.ok(tmp_path / "model.pth.tar-20", *args, "--images", tmp_path / "images", "--device", "cpu")
    assert "head already holds a checkpoint" in run.refused(tmp_path / "model.pth.tar-20", *args)
    config = json.loads((tmp_path / "head/config.json").read_text())
    assert load_file(tmp_path / "head/model.safetensors")["context"].shape == (3, 16, 128)
    assert config["dcp"]["converted_from"] == "model.pth.tar-20"
    assert config["label_names"] == golden["classnames"]
