"""Classes are known by their position, not by their name: repeated names, renamed, added and removed classes."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import close, loud
from PIL import Image
from test_baselines import pixels
from test_method_heads import load, small

from dcp_zoo import DCP, FewShotClassifier, ZooError
from dcp_zoo.data import Item
from dcp_zoo.heads.config import read_config
from dcp_zoo.training.methods import METHODS, fit_head
from dcp_zoo.training.methods.text_probe import fit_probe
from dcp_zoo.training.sources import image_source

COLOURS = ((200, 30, 30), (30, 30, 200), (20, 150, 20), (220, 220, 40), (20, 20, 20))
NAMES = ["crane", "crane", "b", "last"]  # the fifth colour is a new class
AMBIGUOUS = "2 classes are named crane: pass the position of one in place of its name: 0, 1"

pytestmark = pytest.mark.filterwarnings("ignore:Repeated class names")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Item]:
    """Five noisy pictures of each colour."""
    folder, items, rng = tmp_path_factory.mktemp("pictures"), [], np.random.default_rng(0)
    for i in range(25):
        noise = Image.fromarray(rng.normal(128, 60, (32, 32, 3)).clip(0, 255).astype(np.uint8))
        path = folder / f"{i}.png"
        Image.blend(Image.new("RGB", (32, 32), COLOURS[i // 5]), noise, 0.2).save(path)
        items.append(Item(str(path), path.name, i // 5))
    return items


@torch.enable_grad()
def fitted(kind, clip, items, names=NAMES):
    """A head with a text probe: "text-probe", or "dcp", which reads two towers."""
    torch.manual_seed(0)
    train = image_source(clip, items)
    if kind == "text-probe":
        given = small(kind, clip, items, classifier="text-probe")
        return fit_head(kind, replace(given, classnames=names, train=train, val=None))
    head = loud(DCP(clip, names, n_ctx=2)).eval()
    head.store_stats(pixels(train))
    head.method = "dcp"
    head.info = {"text_probe": fit_probe(head, train)}
    return head


@torch.no_grad()
@pytest.mark.parametrize("kind", ["text-probe", "dcp"])
def test_classes_with_the_same_name_stay_apart(kind, clip, pictures, tmp_path):
    head = fitted(kind, clip, pictures[:20])
    x, labels, new = (
        pixels(image_source(clip, pictures[:20])),
        torch.arange(4).repeat_interleave(5),
        pixels(image_source(clip, pictures[20:])),
    )
    before = head(x)
    assert torch.equal(before.argmax(1), labels)

    def answers(*rows: int) -> bool:
        """Whether its logits are these of the first, now and from a checkpoint, for images that come with new ones."""
        loaded = load(clip, head.save_pretrained(tmp_path, torch.float32, **head.info))
        return all(close(each(x)[:, : len(rows)], before[:, rows]) for each in (head, loaded))

    assert answers(0, 1, 2, 3)
    head.set_classnames(["b", "crane", "last", "crane"])
    assert answers(2, 0, 3, 1)
    head.set_classnames(NAMES)
    assert answers(0, 1, 2, 3)
    head.add_class("new", new)
    assert answers(0, 1, 2, 3)
    assert head(new).argmax(1).tolist() == [4] * 5
    for wrong, message in (("crane", AMBIGUOUS), (5, "There is no class 5: the positions are 0 to 4")):
        with pytest.raises(ZooError, match=message):
            head.remove_class(wrong)
    with pytest.raises(ZooError, match="known=5, but the model has seen no image of fox: omit it, or pass known=0"):
        head.add_class("fox", x, known=5)
    head.remove_class(0)
    assert head.classnames == ["crane", "b", "last", "new"]
    assert answers(1, 2, 3)
    assert head(new).argmax(1).tolist() == [3] * 5
    head.rename_class(0, "bird")
    assert head.classnames == ["bird", "b", "last", "new"]
    assert answers(1, 2, 3)


@torch.no_grad()
def test_images_of_a_new_class_are_encoded_a_few_at_a_time(clip, pictures):
    whole, x = fitted("text-probe", clip, pictures[:20]), pixels(image_source(clip, pictures[20:]))
    many, sizes = x.repeat(14, 1, 1, 1), []
    heads = [copy.deepcopy(whole) for _ in range(3)]
    stem = next(module for module in heads[0].encoder.clip.visual.modules() if isinstance(module, torch.nn.Conv2d))
    stem.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    for head, images in zip(heads, (many, (many[i : i + 7] for i in range(0, 70, 7)), x), strict=True):
        head.add_class("new", images)
    assert max(sizes) == 32
    assert close(heads[1](x), heads[0](x))
    assert heads[0].info["class_images"]["new"] == len(many)
    assert close(heads[0].text_probe.means[-1], heads[2].text_probe.means[-1])
    with pytest.raises(ZooError, match=r"Expected images \(n, 3, H, W\)"):
        whole.add_class("new", [])


def test_a_classifier_of_classes_with_the_same_name(pictures, tmp_path):
    """By the public doors alone."""
    images = [Image.open(item.path).convert("RGB") for item in pictures]
    labels = np.repeat(np.arange(4), 5)
    classifier = FewShotClassifier(classnames=dict(enumerate(NAMES))).fit(images[:20], labels)
    assert classifier.predict(images[:20]).tolist() == labels.tolist()
    classifier.save(tmp_path)
    loaded = FewShotClassifier.load(tmp_path)
    assert loaded.predict(images[:20]).tolist() == labels.tolist()


@torch.no_grad()
@pytest.mark.parametrize(
    ("method", "classifier"),
    [("prolip", "text-probe"), ("dcp", "text-probe"), ("maple", "none"), ("tip-adapter", "none")],
)
def test_another_name_changes_no_logits(method, classifier, clip, photos, tmp_path):
    """Of heads that read one tower or two, texts or none: now, from a checkpoint, and with more classes later."""
    given = small(method, clip, photos, classifier=classifier)
    with torch.enable_grad():
        head, x = fit_head(method, given), pixels(given.val)
    before, names = head(x), list(head.classnames)
    head.rename_class(names[1], "zebra")
    names[1] = "zebra"
    loaded = load(clip, head.save_pretrained(tmp_path, torch.float32))
    for each in (head, loaded):
        assert each.classnames == names
        assert close(each(x), before, 1e-6)
        if METHODS[method].abilities.transfers:
            each.set_classnames(["emu", *names])
            assert close(each(x)[:, 1:], before, 1e-5)


@torch.no_grad()
def test_metrics_of_other_classes_are_not_saved(clip, photos, tmp_path):
    """Also if something else is noted of the head after the change."""
    given = small("text-probe", clip, photos)
    head = fit_head("text-probe", given)
    head.info = head.info | {"metrics": {"top1_stored": 50.0}, "test_images": 3}
    head.add_class("zebra", pixels(given.val))
    head.info |= {"x": 1}
    saved = read_config(head.save_pretrained(tmp_path / "added"))["dcp"]
    assert "metrics" not in saved
    assert saved["x"] == 1
    assert saved["not_measured"].startswith("the class zebra was added after the accuracy was measured")
    head.info |= {"metrics": {"top1_stored": 60.0}}  # of the present classes
    saved = read_config(head.save_pretrained(tmp_path / "measured"))["dcp"]
    assert (saved["metrics"], "not_measured" in saved) == ({"top1_stored": 60.0}, False)


@torch.no_grad()
def test_a_class_is_added_in_half_precision(clip, pictures):
    """Fitted in float32: the length of the new row agrees."""
    head, new = fitted("text-probe", clip, pictures[:20]), pixels(image_source(clip, pictures[20:]))
    half = copy.deepcopy(head).half()
    head.add_class("new", new)
    half.add_class("new", new.half())
    length, other = (each.text_probe.weight[-1].float().norm().item() for each in (head, half))
    assert other == pytest.approx(length, rel=0.01)
