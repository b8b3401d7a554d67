"""Classes with the same name stay apart; names in any script, and several sentences per class in place of
its name, as in CuPL."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from equations import NAMES, TEMPLATE, cosine, encode_image, encode_text, pixels
from helpers import FEW_STEPS, close, empty_probe, loud
from test_baselines import logits_of, task
from test_method_heads import load, small
from test_tower_kinds import IMAGES, build_clip

from dcp_zoo import DCP, ZooError, create_transform
from dcp_zoo.cli.console import rejection_note
from dcp_zoo.data import load_image
from dcp_zoo.data.packaged import sample_images
from dcp_zoo.data.readers import read_descriptions
from dcp_zoo.heads.config import read_config
from dcp_zoo.training.methods import METHODS, fit_head, prompts
from dcp_zoo.zoo.factory import create_model

CRANES = ["crane", "crane", "b"]

pytestmark = [
    FEW_STEPS,
    pytest.mark.filterwarnings("ignore:Repeated class names"),
]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["text-probe", "dcp"])
def test_classes_with_the_same_name_stay_apart(kind, clip, photos, tmp_path):
    """Of a head with a text probe, which reads one tower or two."""
    given = replace(small(kind, clip, photos, classifier="text-probe"), classnames=CRANES)
    with torch.enable_grad():
        head, x = fit_head(kind, given), pixels(given.images)
    before = head(x)
    assert not close(before[:, 0], before[:, 1], 0.01)

    def answers(*rows: int) -> bool:
        """Whether its logits are these of the first, now and from a checkpoint."""
        loaded = load(clip, head.save_pretrained(tmp_path, overwrite=True))
        return all(close(each(x), before[:, rows]) for each in (head, loaded))

    assert answers(0, 1, 2)
    head.set_classnames(["b", "crane", "crane"])
    assert answers(2, 0, 1)
    head.set_classnames(CRANES)
    assert answers(0, 1, 2)
    head.set_classnames(["crane", "b"])
    assert answers(0, 2)


SENTENCES = {
    "red": ["a red thing.", "something like a ripe tomato."],
    "Blue sky": ["the sky at noon."],  # found for blue_sky
    "dark green": ["a forest.", "grass in the shade.", "an old bottle of wine."],
}


SCRIPTS = ["红熊猫", "γάτα", "قطة صغيرة"]


def build_kind(kind, names, descriptions=None):
    clip, tokenizer = build_clip(kind)
    return DCP(clip, names, n_ctx=3, tokenizer=tokenizer, texts=descriptions or TEMPLATE)


@torch.no_grad()
def test_a_class_is_the_mean_of_its_sentences(clip, photos):
    given = replace(task("zero-shot", clip, photos), texts=SENTENCES)
    means = [torch.nn.functional.normalize(encode_text(clip, own).mean(0), dim=-1) for own in SENTENCES.values()]
    expected = cosine(clip, encode_image(clip, pixels(given.val)), torch.stack(means))
    for method in ("zero-shot", "zero-shot-ensemble"):  # they take the place of all templates
        head = fit_head(method, given)
        assert close(logits_of(head, given.val), expected)
        head.set_classnames([*NAMES, "cat"], SENTENCES | {"cat": ["a cat."]})
        assert close(logits_of(head, given.val)[:, : len(NAMES)], expected)


@pytest.mark.parametrize("method", METHODS)
def test_two_copies_of_a_text_change_nothing(method, clip, photos, monkeypatch):
    """So that every method is known to read the sentences, and to train with their mean."""
    prompted = method in (
        "coop",
        "cocoop",
        "kgcoop",
        "prograd",
        "ivlp",
        "maple",
        "promptsrc",
        "dcp",
    )  # the text follows prompts
    monkeypatch.setattr(prompts, "TEMPLATES", ("{}.",))
    changes = {"clip-lora": {"dropout": 0.0}, "maple": {"ctx_init": "a photo"}, "dcp": {"classifier": "none"}}
    options = changes.get(method, {})
    given = task(method, clip, photos, **options)
    template = "{}." if prompted else TEMPLATE
    texts = {name: [template.format(name.replace("_", " "))] * 2 for name in NAMES}
    by_name = "zero-shot" if method == "zero-shot-ensemble" else method  # which has other templates for names
    expected = logits_of(fit_head(by_name, replace(given, texts=template)), given.val)
    found = logits_of(fit_head(method, replace(given, texts=texts)), given.val)
    assert close(found, expected, 0.03 if method == "text-probe" else 1e-3)  # fitting amplifies rounding
    other = replace(given, texts={name: ["a thing.", f"number {i}."] for i, name in enumerate(NAMES)})
    reads = logits_of(fit_head(method, other), given.val)
    assert close(reads, expected, 1e-3) == (method == "linear-probe")


@pytest.mark.parametrize("kind", ["siglip", "clipa"])
def test_sentences_after_prompts(kind):
    """DCP on sentences against the same texts as classes of their own: answers and gradients."""
    sentences = {"ant": ["small insect", "lives in a hill"], "emu": ["a tall bird"]}
    flat = loud(build_kind(kind, [s for own in sentences.values() for s in own]))
    model = build_kind(kind, list(sentences), {name: [f"{s}." for s in own] for name, own in sentences.items()})
    model.load_state_dict(flat.state_dict(), strict=False)
    for each in (flat, model):
        each.train()
    image, text = flat.encode(IMAGES)
    parts = [part.mean(0) for part in text.split([2, 1])]
    expected = flat.encoder.logits(image, torch.nn.functional.normalize(torch.stack(parts), dim=-1))
    found = model(IMAGES)
    assert close(found, expected)
    for each, logits in ((flat, expected), (model, found)):
        each.zero_grad()
        logits.log_softmax(-1)[:, 0].sum().backward()
        assert each.prompts["text"].grad.abs().max() > 0
    assert close(model.prompts["text"].grad, flat.prompts["text"].grad, 1e-4)
    model.eval().store_stats(IMAGES)
    assert close(model.fuse()(IMAGES), model(IMAGES))


def test_a_head_of_another_method_keeps_its_sentences(clip, photos, tmp_path):
    given = replace(task("coop", clip, photos), texts=SENTENCES)
    head, x = fit_head("coop", given), pixels(given.val)
    loaded = load(clip, head.save_pretrained(tmp_path))
    with torch.no_grad():
        assert torch.equal(loaded(x), head(x))
        with pytest.raises(ZooError, match="no sentences for 'cat'"):
            loaded.set_classnames([*NAMES, "cat"])
        assert torch.equal(loaded(x), head(x))
        loaded.set_classnames([*NAMES, "cat"], texts={})  # back to names
        assert loaded(x).shape[1] == len(NAMES) + 1


def test_files_that_are_no_descriptions(tmp_path):
    path = tmp_path / "texts.json"
    for content, problem in (("{", "JSON as of CuPL"), ('{"cat": [" "]}', "an empty list or sentence for 'cat'")):
        path.write_text(content)
        with pytest.raises(ZooError, match=problem):
            read_descriptions(path)


def test_the_command_line_with_names_in_any_script(photos, tmp_path, run):
    """Train on folders with such names and sentences, then measure and predict."""
    folder, texts = tmp_path / "photos", tmp_path / "texts.json"
    for item in photos[:9]:  # three of each class
        (folder / SCRIPTS[item.label]).mkdir(parents=True, exist_ok=True)
        shutil.copy(item.path, folder / SCRIPTS[item.label])
    texts.write_text(json.dumps({name: [f"{name}。", "a photo."] for name in SCRIPTS}, ensure_ascii=False), "utf-8")
    options, head = ("--method", "dcp", "--set", "epochs=1"), tmp_path / "head"
    run.ok("train", folder, "--no-refit", "--descriptions", texts, *options, "--output", head)
    stored = read_config(head)
    assert stored["label_names"] == sorted(SCRIPTS)
    assert f"{SCRIPTS[0]}。" in str(stored["dcp"])
    answers = json.loads(run.ok("predict", photos[0].path, "--head", head, "--json"))[0]["predictions"]
    assert {answer["class"] for answer in answers} == set(SCRIPTS)
    out = run.ok("eval", "--head", head, "--data-root", folder, "--json")
    assert json.loads(out)["top1"] == stored["dcp"]["metrics"]["top1_stored"]
    assert "6 sentences" in run("info", head)[1]


def test_other_sentences_unset_the_threshold(tmp_path):
    """It was fitted for the logits that the first ones give."""
    names, same, other = ["a", "b"], {"a": ["one."], "b": ["two."]}, {"a": ["one."], "b": ["three."]}
    model = create_model("dcp_mini", "clip", classnames=names, descriptions=same, n_ctx=2, depth=2)
    model.store_stats(torch.randn(2, 3, 192, 192))
    model.text_probe = empty_probe(model)
    model.text_probe.threshold.fill_(1.0)
    model.text_probe.means.fill_(0.1)
    model.save_pretrained(tmp_path)
    for texts, holds in ((None, True), (same, True), (other, False)):
        loaded = create_model(str(tmp_path), True, descriptions=texts)
        assert bool(loaded.cannot_reject) != holds
    loaded = create_model(str(tmp_path), True)
    loaded.set_classnames(names[::-1])
    assert not loaded.cannot_reject
    loaded.set_classnames(names, other)
    assert "for other texts than" in loaded.cannot_reject


EDITS = {  # of the classes, and whether what was measured of a head holds afterwards
    "other order": (lambda head: head.set_classnames(head.classnames[::-1]), True),
    "more": (lambda head: head.set_classnames([*head.classnames, "colour"]), False),
    "fewer": (lambda head: head.set_classnames(["house", "horse", "guitar"]), False),
    "other texts": (lambda head: head.set_classnames(head.classnames, {n: [n] for n in head.classnames}), False),
}


@pytest.mark.parametrize("change", EDITS)
def test_after_an_edit_of_the_classes_nothing_old_is_said(change, tmp_path, run):
    """In Python and by `info`; of a photograph the answer stays, from a checkpoint, too."""
    head = create_model("dcp_mini.pacs_photo-16shot", True).eval()
    edit, holds = EDITS[change]
    note = rejection_note(head.info)
    assert "Of things much like its classes it accepts" in note
    edit(head)
    head.save_pretrained(tmp_path)
    details = json.loads(run.ok("info", tmp_path, "--json"))
    assert rejection_note(details) == (note if holds else "")
    assert ("metrics" in details) == holds
    assert (note in " ".join(run.ok("info", tmp_path).split())) is holds
    loaded = create_model(str(tmp_path), True).eval()
    image = create_transform(head)(load_image(sample_images()[0]))[None]
    with torch.no_grad():
        assert close(loaded(image), head(image), 1e-4)


def test_names_in_any_script_are_read_and_those_that_are_too_long_refused(clip):
    long = "cat " * 80
    with pytest.raises(ZooError, match="The text .* takes 82 tokens, but only 73 are left next to 3"):
        DCP(clip, ["dog", long.strip()], n_ctx=3)
    with pytest.raises(ZooError, match="The text .* takes 81 tokens.*shorten it"):
        DCP(clip, ["dog"], n_ctx=3, texts={"dog": ["a dog.", long]})
    with pytest.raises(ZooError, match="The text .* takes 82 tokens, but only 77 are left: shorten it"):
        clip.encode_sentences([long], "{}")
    assert clip.encode_sentences(["cat " * 75], "{}").isfinite().all()  # exactly as long as the text tower reads
    assert torch.pdist(clip.encode_sentences([*SCRIPTS, "cat"], "{}")).min() > 0
