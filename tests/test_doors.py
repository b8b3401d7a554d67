"""Every door asks the same head about the same images, and gets the same answer: all kinds of heads, in all precisions,
with classes that share a name, and others than it was trained on. No door opens on another CLIP."""

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import copied, told
from PIL import Image
from safetensors.torch import load_file, save_file

import dcp_zoo
from dcp_zoo import FewShotClassifier, ZooError
from dcp_zoo.backbone import MINI_WEIGHTS
from dcp_zoo.cli.console import rejection_note
from dcp_zoo.data import load_image
from dcp_zoo.heads.head import Head
from dcp_zoo.zoo.build import plain_clip

pytestmark = pytest.mark.usefixtures("quick_probe")

COLORS = {"red": (200, 30, 30), "blue": (30, 30, 200), "green": (20, 120, 20), "white": (230, 230, 230)}
NAMES = {"red": "crane", "blue": "crane", "green": "leaf", "white": "snow"}
QUICK = {"epochs": 1, "batch_size": 8}
KINDS = {  # of each kind of head, its recipe
    "text-probe": {},
    "gda": {},
    "tip-adapter": {},
    "prolip": {"epochs": 2, "classifier": "text-probe"},
    "maple": QUICK | {"depth": 2, "classifier": "text-probe"},
    "dcp": QUICK | {"n_ctx": 2, "depth": 2},
}
CLOSE = 2e-4  # probabilities in float32; the kinds that are asked in half precision, and how close they are
HALF = {"gda": (torch.bfloat16, 0.15), "text-probe": (torch.float16, 0.02)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Eight pictures, two of each class, and their labels."""
    folder, paths, labels, rng = tmp_path_factory.mktemp("colours"), [], [], np.random.default_rng(0)
    for i in range(8):
        label = [*COLORS][i % 4]
        paths.append(str(picture(folder / f"{i:02}.png", label, rng)))
        labels.append(label)
    return paths, labels


def picture(path: Path, label: str, rng: np.random.Generator) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = rng.normal(0, 25, (140, 150, 3)) + COLORS[label]
    Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def heads(pictures):
    """A head of each kind, made once."""
    made: dict[str, Head] = {}

    def get(kind: str) -> Head:
        if kind not in made:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # two classes share a name, and little is learnt
                made[kind] = FewShotClassifier(method=kind, recipe=KINDS[kind], classnames=NAMES).fit(*pictures).model_
        return copied(made[kind])

    return get


@torch.no_grad()
def plainly(head: Head, paths: list[str]) -> np.ndarray:
    """Probabilities by the equations alone: the transform, the head's features, and its linear function of them."""
    transform = dcp_zoo.create_transform(head)
    images = torch.stack([transform(load_image(path)) for path in paths]).to(head.encoder.visual.proj.dtype)
    features = head.encode_image(images)
    if not head.abilities.linear:
        return head.classify(features).float().softmax(-1).numpy()
    weight, bias = head.linear()
    return (features.float() @ weight.float().T + bias.float()).softmax(-1).numpy()


def in_order(rows: list, names: list[str]) -> np.ndarray:
    """The probabilities of each row, best first; of which class each is, its name says: two may share it."""
    assert all(sorted(name for name, _ in row) == sorted(names) for row in rows)
    return np.array([[p for _, p in row] for row in rows])


def edit(head: Head) -> None:
    """Other classes in another order, where the head reads names also a new one; two share a name."""
    new = ["rose"] if head.abilities.transfers else []
    head.set_classnames([*new, "snow", "crane", "crane"])


@pytest.mark.parametrize("kind", KINDS)
def test_all_doors_agree(kind, pictures, heads, tmp_path, run, monkeypatch):
    """In float32, also those of a checkpoint."""
    monkeypatch.setattr("dcp_zoo.prediction.heads.FEW", 4)  # images, of more than which a head is fused
    head, (paths, _) = heads(kind), pictures
    edit(head)
    names, expected = head.classnames, plainly(head, paths)
    ranked = -np.sort(-expected)
    for number in (3, len(paths)):
        found = dcp_zoo.predict(head, paths[:number], top_k=len(names), precision="float32")
        assert in_order(found, names) == pytest.approx(ranked[:number], abs=CLOSE)
    head.save_pretrained(tmp_path / "head")
    loose = 2e-3 if kind == "dcp" else CLOSE  # its prompts are stored in half precision
    loaded = dcp_zoo.create_model(str(tmp_path / "head"), True).eval()
    assert loaded.classnames == names
    assert plainly(loaded, paths[:3]) == pytest.approx(expected[:3], abs=loose)
    estimator, by_label = FewShotClassifier.load(tmp_path / "head"), np.argsort(names, kind="stable")
    assert estimator.predict_proba(paths[:3]) == pytest.approx(expected[:3][:, by_label], abs=loose)
    rows = dcp_zoo.Predictor(tmp_path / "head", top_k=len(names))({"image": paths})
    best = estimator.predict_proba(paths)
    assert np.stack([rows[f"probability{i}"] for i in ("", *(f"_{i}" for i in range(2, 1 + len(names))))], 1) == (
        pytest.approx(-np.sort(-best), abs=1e-5)
    )
    if kind in ("tip-adapter", "dcp"):  # with and without a linear classifier
        assert in_order(told(run, tmp_path / "head", paths[:2]), names) == pytest.approx(ranked[:2], abs=loose)
    if kind in HALF:
        answers_in_half_precision(head, paths[:1], expected[:1], *HALF[kind])
    evaluated = dcp_zoo.evaluate(head, paths[:3], ["snow"] * 3, precision="float32")
    assert evaluated.logits.softmax(-1).numpy() == pytest.approx(expected[:3], abs=CLOSE)
    assert repr(evaluated) == f"<Evaluation: {evaluated.accuracy.correct} of 3 images right, {len(names)} classes>"


def answers_in_half_precision(whole: Head, paths: list[str], expected: np.ndarray, dtype, close: float) -> None:
    """Fused, and through the door of Python, within `close` of the probabilities in float32. For an image, CPUs take
    seconds."""
    head = copied(whole).to(dtype)
    images = torch.stack([dcp_zoo.create_transform(head.fuse())(load_image(path)) for path in paths]).to(dtype)
    with torch.no_grad():
        assert head.fuse()(images).float().softmax(-1).numpy() == pytest.approx(expected, abs=close)
    found = dcp_zoo.predict(head, paths, top_k=len(head.classnames), precision="float32")
    assert in_order(found, head.classnames) == pytest.approx(-np.sort(-expected), abs=close)


@pytest.mark.parametrize("kind", ["tip-adapter", "dcp"])  # which reads no texts, and which has all parts
def test_a_state_dict_loads_as_a_whole_or_not_at_all(kind, pictures, heads):
    """Also into a head without a text probe, and for classes that the text probe was not fitted on."""
    whole, (paths, _) = heads(kind), pictures
    edit(whole)
    for names in ([*reversed(whole.classnames)][:-1], ["rose", "daisy", "iris", "lily"]):
        if names[-1] != "lily" or whole.texts:
            whole.set_classnames(names)
        state, other = {name: t.clone() for name, t in whole.state_dict().items()}, copied(whole)
        with torch.no_grad():
            for tensor in other.to_state().values():
                tensor.mul_(0.5)
        other.text_probe = None
        assert plainly(other, paths[:2]) != pytest.approx(plainly(whole, paths[:2]), abs=1e-4)
        assert not any(other.load_state_dict(state))
        assert plainly(other, paths[:2]) == pytest.approx(plainly(whole, paths[:2]), abs=1e-6)
        other.text_probe = None
        with pytest.raises(RuntimeError, match=r"text_probe\.other"):
            other.load_state_dict(state | {"text_probe.other": torch.ones(1)})
    with pytest.raises(RuntimeError, match="name_tokens.other"):
        whole.load_state_dict(state | {"name_tokens.other": torch.ones(1)})


EDITS = {  # and whether what was measured of the classes holds after it
    "other order": (lambda head: head.set_classnames(head.classnames[::-1]), True),
    "more": (lambda head: head.set_classnames([*head.classnames, "colour"]), False),
    "fewer": (lambda head: head.set_classnames(["house", "horse", "guitar"]), False),
    "other texts": (lambda head: head.set_classnames(head.classnames, {n: [n] for n in head.classnames}), False),
}


@pytest.mark.parametrize("change", EDITS)
def test_after_an_edit_of_the_classes_nothing_old_is_said(change, pictures, tmp_path, run):
    head, (edit, holds) = dcp_zoo.create_model("dcp_mini.pacs_photo-16shot", True).eval(), EDITS[change]
    told_before = rejection_note(head.info)
    assert "Of things much like its classes it accepts" in told_before
    edit(head)
    head.save_pretrained(tmp_path)
    found = json.loads(run.ok("info", tmp_path, "--json"))
    assert rejection_note(found) == (told_before if holds else "")
    assert ("metrics" in found) == holds
    assert (told_before in " ".join(run.ok("info", tmp_path).split())) is holds
    loaded = dcp_zoo.create_model(str(tmp_path), True).eval()
    assert plainly(loaded, pictures[0][:1]) == pytest.approx(plainly(head, pictures[0][:1]), abs=CLOSE)


def test_warnings_point_at_the_line_of_the_user(pictures, heads):
    """Not into this package, or the context managers that decorate its functions."""
    (paths, _), head = pictures, heads("text-probe")
    for call, about in (
        (lambda: FewShotClassifier().fit(paths, [0, 1] * 4), "CLIP reads the class names"),
        (lambda: dcp_zoo.create_model("dcp_mini", "clip", classnames=["a", "a"]), "Repeated class names"),
        (lambda: head.set_classnames(["a", "a"]), "Repeated class names"),
    ):
        with pytest.warns(UserWarning, match=about) as caught:
            call()
        assert {warning.filename for warning in caught if about in str(warning.message)} == {__file__}


def test_a_folder_of_some_classes_is_judged_among_all(heads, tmp_path, run, monkeypatch):
    """By the command, also with a table of the images, and in Python: classes without images stay possible answers."""
    monkeypatch.chdir(tmp_path)
    head, rng, names = heads("text-probe"), np.random.default_rng(1), {"green": "leaf", "white": "snow"}
    head.save_pretrained("head")
    head = dcp_zoo.create_model("head", True)
    for i in range(8):  # half of the images are of classes without a folder
        picture(Path("some", [*names.values()][i % 2], f"{i}.png"), [*COLORS][i // 2], rng)
    found = dcp_zoo.evaluate(head, "some")
    assert head.classnames == found.classnames
    assert {pair.predicted for pair in found.confused_pairs} - {*names.values()}, "otherwise nothing is tested"
    rows = [f"{path},{path.parent.name}" for path in Path("some").rglob("*.png")]
    Path("table.csv").write_text("\n".join(["file,class", *rows]))
    for images in (["some"], ["--labels", "table.csv"]):
        told = json.loads(run.ok("eval", *images, "--head", "head", "--json"))
        assert told["top1"] == round(found.accuracy.percent, 2)
        assert told["per_class"] == {row.name: [row.correct, row.images] for row in found.per_class}
        assert told["confused_pairs"] == [list(pair) for pair in found.confused_pairs]


@pytest.fixture
def other_clip(tmp_path, monkeypatch):
    """The miniature gets other weights from now on: two of its blocks change places."""
    first, second = (f"visual.transformer.resblocks.{i}." for i in (1, 2))
    weights = {re.sub(f"^{first}", "other.", name): tensor for name, tensor in load_file(MINI_WEIGHTS).items()}
    weights = {re.sub(f"^{second}", first, name): tensor for name, tensor in weights.items()}
    weights = {re.sub("^other.", second, name): tensor for name, tensor in weights.items()}
    save_file(weights, tmp_path / "clip.safetensors")
    return lambda: monkeypatch.setattr("dcp_zoo.zoo.build.MINI_WEIGHTS", tmp_path / "clip.safetensors")


@pytest.mark.parametrize("kind", ["prolip", "dcp"])  # the first changes CLIP's weights
def test_no_door_opens_on_other_weights_of_clip(kind, pictures, heads, tmp_path, run, other_clip):
    """Of whatever precision the head was when it was saved."""
    head, image, plain = heads(kind), pictures[0][0], plain_clip("dcp_mini").fingerprint()
    folder = head.half().save_pretrained(tmp_path / "head")
    assert dcp_zoo.create_model(str(folder), True).frozen.fingerprint() == plain
    other_clip()
    now = plain_clip("dcp_mini").fingerprint()
    assert now[:16] == plain[:16]  # the sum of all words is the same
    assert now[16:] != plain[16:]
    message = f"was trained on other weights.* {plain}, .*'bundled' weights.* of dcp_mini, have {now}.*train the head"
    doors = [
        lambda: dcp_zoo.create_model(str(folder), True),
        lambda: FewShotClassifier.load(folder),
        lambda: dcp_zoo.predict(str(folder), image),
        lambda: dcp_zoo.load_head(dcp_zoo.create_model("dcp_mini", "clip", n_ctx=2, depth=2), folder),
    ]
    for open_door in doors if kind == "dcp" else doors[:-1]:  # the last takes a head of its own kind
        with pytest.raises(ZooError, match=message):
            open_door()
    assert "other weights" in run.refused("predict", image, "--head", folder)


def test_a_head_may_not_know_its_clip(heads, tmp_path):
    """It loads, and says so once."""
    folder = heads("gda").save_pretrained(tmp_path / "head")
    config = json.loads((folder / "config.json").read_text())
    del config["dcp"]["clip_fingerprint"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="trained on is unknown: CLIP was not loaded in float32") as told:
        dcp_zoo.create_model(str(folder), True)
    assert len(told) == 1
