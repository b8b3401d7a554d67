"""Every door asks the same head about the same images, and gets the same answer: with a linear classifier on
one tower and its gate, with the training images themselves, and with prompts in both towers; in float32 and
in half precision."""

import warnings

import numpy as np
import pytest
import torch
from helpers import behind_the_gate, copied, noisy_picture, predicted_by_command

import dcp_zoo
from dcp_zoo import FewShotClassifier
from dcp_zoo.backbone.clip import linear_of
from dcp_zoo.data import load_image
from dcp_zoo.data.packaged import sample_images
from dcp_zoo.heads.head import Head

COLORS = {"red": (200, 30, 30), "blue": (30, 30, 200), "green": (20, 120, 20), "white": (230, 230, 230)}
NAMES = {"red": "crane", "blue": "crane", "green": "leaf", "white": "snow"}  # two classes share a name
RECIPES = {"text-probe": {}, "tip-adapter": {}, "dcp": {"epochs": 1, "batch_size": 8, "n_ctx": 2, "depth": 2}}
CLOSE = 2e-4  # probabilities in float32


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> tuple[list[str], list[str]]:
    """The paths of 24 pictures, seven of each class but the last, and their labels."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    labels = [*COLORS] * 3 + [*COLORS][:3] * 4
    paths = [noisy_picture(folder / f"{i}.png", COLORS[label], rng) for i, label in enumerate(labels)]
    return paths, labels


@torch.no_grad()
def plainly(head: Head, paths: list[str]) -> np.ndarray:
    """Probabilities by the equations alone: the transform, the head's features, and its classifier of
    them."""
    transform = dcp_zoo.create_transform(head)
    features = head.encode_image(torch.stack([transform(load_image(path)) for path in paths]))
    if not head.abilities.linear:
        return head.classify(features).softmax(-1).numpy()
    logits = torch.nn.functional.linear(features, *head.linear())
    probe = head.gated_probe
    if probe is None:
        return logits.softmax(-1).numpy()
    text = probe.text_scale * torch.nn.functional.linear(features, *linear_of(head.readings))
    distances = probe.measure(head.classes)(features, examples=False)
    gated = behind_the_gate(logits, text, distances, probe.gate[0].item(), 0.1).exp()
    assert (gated - logits.softmax(-1)).abs().max() > 0.1
    return gated.numpy()


def by_predictor(folder, paths: list[str], classes: int) -> list[list[tuple[str, float]]]:
    """The answers of `Predictor`, from its columns."""
    columns = dcp_zoo.Predictor(folder, top_k=classes)({"image": paths})
    ends = ["", *(f"_{place}" for place in range(2, classes + 1))]
    return [[(columns[f"class{end}"][i], columns[f"probability{end}"][i]) for end in ends] for i in range(len(paths))]


def check_ranked(answers: list[list[tuple]], names: list[str], expected: np.ndarray, close: float) -> None:
    """Fails unless each image has these classes, the most probable first, with these probabilities."""
    for answer, probabilities in zip(answers, expected, strict=True):
        order = np.argsort(-probabilities)
        assert [name for name, *_ in answer] == [names[i] for i in order]
        assert [probability for _, probability, *_ in answer] == pytest.approx(probabilities[order], abs=close)


@pytest.mark.filterwarnings("ignore:Repeated class names")
@pytest.mark.parametrize("method", RECIPES)
def test_all_doors_agree(method, pictures, tmp_path, run):
    """Python's functions, the estimator, the command and `Predictor`, which fuses a linear head for many
    images. The classes were edited: they are in another order, and one is new where the head reads names."""
    paths, labels = pictures
    asked = [*paths[:8], *sample_images()]  # which are unlike all that a head has seen
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two classes share a name, and little is learnt
        head = FewShotClassifier(method=method, recipe=RECIPES[method], classnames=NAMES).fit(paths, labels).model_
    new = ["rose"] if head.abilities.transfers else []
    names = [*new, "snow", "crane", "crane"]
    head.set_classnames(names)
    expected = plainly(head, asked)

    check_ranked(dcp_zoo.predict(head, asked, top_k=4, precision="float32"), names, expected, CLOSE)
    evaluated = dcp_zoo.evaluate(head, asked, ["snow"] * len(asked), precision="float32")
    assert evaluated.logits.softmax(-1).numpy() == pytest.approx(expected, abs=CLOSE)
    right = f"{evaluated.accuracy.correct} of {len(asked)} images right"
    assert repr(evaluated) == f"<Evaluation: {right}, {len(names)} classes>"

    folder = head.save_pretrained(tmp_path / "head")
    close = 2e-3 if method == "dcp" else CLOSE  # the prompts are stored in half precision
    probabilities = FewShotClassifier.load(folder).predict_proba(asked)
    assert probabilities == pytest.approx(expected[:, np.argsort(names, kind="stable")], abs=close)
    check_ranked(predicted_by_command(run, folder, asked[-2:]), names, expected[-2:], close)
    check_ranked(by_predictor(folder, asked, len(names)), names, expected, close)
    check_ranked(by_predictor(folder, asked * 3, len(names)), names, np.tile(expected, (3, 1)), close)

    if method == "text-probe":
        half = copied(head).to(torch.float16)
        check_ranked(dcp_zoo.predict(half, asked[:1], top_k=4, precision="float32"), names, expected[:1], 0.02)
        image = dcp_zoo.create_transform(half)(load_image(asked[0]))[None].half()
        with torch.no_grad():
            assert half.fuse()(image).float().softmax(-1).numpy() == pytest.approx(expected[:1], abs=0.02)
