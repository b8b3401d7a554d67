"""Few subjects, many photographs: the sign, what is told then, and the subjects that a person names."""

import random
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers import read_csv
from shared import CommandLine
from sklearn.metrics import silhouette_score
from subjects import crops

from dcp_zoo import FewShotClassifier
from dcp_zoo.data import Item, load_image
from dcp_zoo.data.groups import with_groups
from dcp_zoo.data.packaged import sample_images
from dcp_zoo.errors import ZooWarning
from dcp_zoo.features.groups import clustered, silhouette, with_subjects

CLASSES = {"animals": ("cat", "otter", "osprey"), "things": ("coffee", "flowers", "lake")}
pytestmark = pytest.mark.filterwarnings("always:These look like about")
LOOKS = "These look like about 3 subjects in each class"


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two classes of three subjects each, four times each."""
    folder = tmp_path_factory.mktemp("subjects") / "MY_PHOTOS"
    photos = {Path(path).stem: load_image(path) for path in sample_images()}
    rng = random.Random(0)
    for name, subjects in CLASSES.items():
        (folder / name).mkdir(parents=True)
        for subject in subjects:
            for i in range(4):
                crops(photos[subject].reduce(2), rng, 0).save(folder / name / f"{subject}_{i}.jpg")
    return folder


def found_in(items: list[Item], x: np.ndarray, groups: Sequence[list[int]] = ()) -> list[Item]:
    """The items in groups or subjects, by these embeddings."""
    return with_subjects(with_groups(items, groups), x)


def vectors(classes: int, subjects: int, photographs: int) -> tuple[list[Item], np.ndarray]:
    """Items and made-up embeddings."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(classes, subjects, 1, 32))
    rows = centres + 0.3 * rng.normal(size=(classes, subjects, photographs, 32))
    labels = np.repeat(np.arange(classes), subjects * photographs).tolist()
    return [Item("", str(i), label) for i, label in enumerate(labels)], rows.reshape(-1, 32)


def test_silhouettes_are_those_of_scikit_learn() -> None:
    _, x = vectors(1, 4, 5)
    value, clusters = clustered(x)
    assert value == pytest.approx(silhouette_score(x, clusters, metric="cosine"))
    distances = 1 - np.corrcoef(x)
    rng = np.random.default_rng(1)
    for k in (2, 5, 12):
        names = np.unique(np.r_[np.arange(k), rng.integers(k, size=len(x) - k)], return_inverse=True)[1]
        expected = silhouette_score(distances.clip(0) * (1 - np.eye(len(x))), names, metric="precomputed")
        assert silhouette(distances * (1 - np.eye(len(x))), names) == pytest.approx(expected)


def test_clusters_are_groups_where_subjects_are_few() -> None:
    items, x = vectors(3, 4, 5)
    with pytest.warns(ZooWarning, match="about 4 subjects in each class"):
        found = found_in(items, x)
    assert [len({item.group for item in found[i : i + 5]}) for i in range(0, 60, 5)] == [1] * 12
    assert len({item.group for item in found}) == 12


def test_a_found_group_counts_as_one_image_and_stays_together() -> None:
    items, x = vectors(3, 4, 5)
    bursts = [list(range(i, i + 5)) for i in range(0, 60, 5)]  # each subject is one burst: no further sign
    found = found_in(items, x, bursts)
    assert [item.group for item in found] == [str(i // 5 + 1) for i in range(60)]
    pair = [[0, 59]]  # found across two subjects
    with pytest.warns(ZooWarning, match="about 4 subjects"):
        found = found_in(items, x, pair)
    assert found[0].group == found[59].group == found[1].group


@pytest.mark.parametrize("images", [1, 2, 3, 4, 16])
def test_single_images_stay_as_they_are(images: int) -> None:
    items, x = vectors(10, images, 1)
    assert found_in(items, x) == items


def test_unreadable_images_stay_out() -> None:
    items, x = vectors(3, 4, 5)
    x[::7] = np.nan
    with pytest.warns(ZooWarning, match="about 4 subjects"):
        found = found_in(items, x)
    assert [item.group for item in found[::7]] == [""] * len(found[::7])


def test_train_tells_a_range_and_what_to_name(run: CommandLine, few: Path, tmp_path: Path) -> None:
    code, out, err = run("train", few, "--output", tmp_path / "head")
    assert code == 0
    assert LOOKS in err
    told = re.search(r"test top-1.*: (\d+) to (\d+) % on other subjects; estimate ([\d.]+) %", out)
    assert told
    code, named, err = run("train", few, "--group-by", "([a-z]+)_", "--output", tmp_path / "named")
    assert LOOKS not in err
    assert "other subjects" not in named
    low, high, percent = map(float, told.groups())
    assert low < percent <= high
    assert "% on other subjects" in run.ok("info", tmp_path / "head")


def test_fit_says_it(few: Path) -> None:
    images = sorted(map(str, few.rglob("*.jpg")))
    labels = [Path(path).parent.name for path in images]
    with pytest.warns(ZooWarning, match=LOOKS):
        guessed = FewShotClassifier(verbose=False).fit(images, labels)
    groups = [Path(path).stem.split("_")[0] for path in images]
    named = FewShotClassifier(verbose=False).fit(images, labels, groups=groups)
    assert guessed.model_.rejection_threshold() == pytest.approx(named.model_.rejection_threshold(), abs=0.5)


def test_inspect_shows_rows_to_name_and_train_reads_them(run: CommandLine, few: Path, tmp_path: Path) -> None:
    code, _, err = run("inspect", few, "--output", tmp_path)
    assert code == 0
    assert LOOKS in err
    page = (tmp_path / "inspection.html").read_text()
    assert "These look like few subjects" in page
    assert "Group 1: 4 images" in page
    rows = read_csv(tmp_path / "inspection.csv")
    of_subjects = {(Path(row["file"]).stem.split("_")[0], row["group"]) for row in rows}
    assert len(of_subjects) == len({group for _, group in of_subjects}) == 6
    code, out, err = run("train", few, "--labels", tmp_path / "inspection.csv", "--output", tmp_path / "head")
    assert code == 0
    assert LOOKS not in err
    assert "24 images in 6 groups" in out + err


def test_eval_counts_by_subject(run: CommandLine, few: Path, tmp_path: Path) -> None:
    images = [str(path) for path in sorted(few.rglob("*.jpg")) if path.stem.endswith("_0")]
    labels = [Path(path).parent.name for path in images]
    FewShotClassifier(verbose=False).fit(images, labels).save(tmp_path / "head")
    code, out, err = run("eval", few, "--head", tmp_path / "head")
    assert code == 0
    assert LOOKS in err
    assert "of 18, in groups, which count as 6" in out
