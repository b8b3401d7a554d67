"""Many images: where they come from, what is written, and that a run survives kills and full disks."""

import json
import math
import os
import re
import resource
import shutil
import signal
import sqlite3
import time
from contextlib import closing
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Around, classify, copied, encoded, read_csv, recipe, stopped_in_image_tower, until
from PIL import Image
from pyarrow.parquet import read_table
from rich.table import Table
from rich.text import Text

import dcp_zoo
from dcp_zoo import FewShotClassifier, Predictor, ZooError
from dcp_zoo.answers import Outputs
from dcp_zoo.cli import console
from dcp_zoo.data import load_image
from dcp_zoo.data.find import find_images
from dcp_zoo.data.images import crop
from dcp_zoo.data.packaged import sample_images
from dcp_zoo.data.readers import label_rows
from dcp_zoo.errors import ZooWarning
from dcp_zoo.files import locked
from dcp_zoo.prediction import Backend
from dcp_zoo.prediction.heads import HeadBackend
from dcp_zoo.prediction.job import OutputFiles
from dcp_zoo.prediction.job import run as run_job
from dcp_zoo.prediction.outputs import write_sheet
from dcp_zoo.zoo.registry import WEIGHTS

BUNDLED, HEAD = "dcp_mini.caltech101-1shot", "dcp_mini.caltech101-16shot"  # the second is that of the page
CFG = {"input_size": [3, 8, 8], "crop_pct": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3}


def jpeg(i: int, size: tuple[int, int] = (12, 10)) -> bytes:
    """A grey image of level 10 i."""
    return encoded(Image.new("L", size, 10 * i), "JPEG")


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """The working folder with `photos`: 24 images in two subfolders, the fifth of which is damaged."""
    monkeypatch.chdir(tmp_path)
    for i in range(24):
        path = tmp_path / "photos" / ("a" if i < 12 else "b") / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"" if i == 4 else jpeg(i))
    return Path("photos")


def compute(pixels: np.ndarray) -> Outputs:
    """Bright or dark, from the mean level; the features are the mean levels of the colours."""
    means = pixels.mean((2, 3), dtype=np.float32) / 255
    bright = means.mean(1)
    return Outputs(np.log(np.stack([1 - bright, bright], 1) + 1e-9), features=means)


class Fake(Backend):
    """Its outputs are a function of the pixels."""

    def __init__(self, compute, *more: str) -> None:
        self.architecture = "fake"
        self.classnames = ["dark", "bright", *more]
        self.preprocessing = CFG
        self.of_pixels = compute

    def compute(self, pixels: np.ndarray) -> Outputs:
        return self.of_pixels(pixels)


FAKE = Fake(compute)


def run_bulk(images, backend, outputs, plan, together=False, **options):
    return run_job(images, Around(backend, plan, features=True, **options), outputs, together)


def test_folders_patterns_and_lists(photos):
    names = [f"photos/{'a' if i < 12 else 'b'}/{i:02}.jpg" for i in range(24)]
    for other in ("photos/.hidden/x.jpg", "photos/__MACOSX/x.jpg", "photos/a/._00.jpg", "photos/notes.md"):
        Path(other).parent.mkdir(exist_ok=True)
        Path(other).write_bytes(jpeg(1))
    with pytest.warns(ZooWarning, match="Ignored in photos: 1 .md"):
        assert find_images(["photos"]) == names
    assert find_images(["photos/**/*.jpg"]) == names
    assert find_images(["photos/b/*", names[0]]) == [*names[12:], names[0]]
    Path("photos/list.txt").write_text("b/13.jpg\n\na/00.jpg\n/somewhere/x.jpg\n")
    assert find_images(["photos/list.txt"]) == [names[13], names[0], "/somewhere/x.jpg"]
    Path("photos/a[1].jpg").write_bytes(jpeg(1))  # a file, not a pattern
    assert find_images(["photos/a[1].jpg"]) == ["photos/a[1].jpg"]


@pytest.mark.filterwarnings("ignore:Ignored in videos")
def test_a_source_without_images_is_explained(photos):
    for file in ("videos/1.mp4", "videos/day/2.MP4", "videos/a.txt"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).touch()
    for source, message in (
        ("videos", "There is no image in videos "),
        ("photos/*.png", r"There is no image in photos/\*.png"),
        ("s3://bucket/photos", "There is no file or folder s3://bucket/photos: check the path"),
    ):
        with pytest.raises(ZooError, match=message):
            find_images([source])


def test_the_recipe_for_datasets_keeps_each_image_and_computes_once(photos, monkeypatch):
    """As it stands on the page, with an image that cannot be read."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("cache").absolute())
    photos.rename("MY_PHOTOS")
    exec(recipe("datasets_answers"), {})
    table = read_table("datasets_answers.parquet").to_pylist()
    assert [Path(row["path"]).stem for row in table] == [f"{i:02}" for i in range(24)]
    assert [i for i, row in enumerate(table) if row["error"]] == [4]
    probabilities = FewShotClassifier.load(WEIGHTS / HEAD).predict_proba([row["path"] for row in table if row["class"]])
    assert [row["probability"] for row in table if row["class"]] == pytest.approx(probabilities.max(1), abs=1e-5)
    before = Path("datasets_answers.parquet").read_bytes()
    with stopped_in_image_tower():  # which is not reached
        exec(recipe("datasets_answers"), {})
    assert Path("datasets_answers.parquet").read_bytes() == before


def test_all_formats_hold_the_same(photos):
    images = find_images(["photos"])
    for suffix, features in ((".csv", Path("f.npz")), (".jsonl", None), (".parquet", None)):
        outputs = OutputFiles(Path(f"p{suffix}"), features)
        (error,) = run_bulk(images, FAKE, outputs, {}, top_k=9, batch_size=5)
        assert "photos/a/04.jpg" in error
    rows = [row for batch, _ in classify(images, FAKE, top_k=2) for row in batch]
    assert [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()] == rows
    assert rows[1] == {
        "image": "photos/a/01.jpg",
        "class": "dark",
        "predictions": [{"class": "dark", "probability": 0.960784}, {"class": "bright", "probability": 0.039216}],
    }
    table, arrays, parquet = read_csv("p.csv"), np.load("f.npz"), read_table("p.parquet")
    assert parquet.column_names == [*[*table[0]][:-1], "error", "rejected"]
    assert [*map(str, parquet.schema.types)] == ["string", "string", "float", "string", "float", "string", "bool"]
    blank = dict.fromkeys(parquet.column_names, "") | {"rejected": False}
    for cells, row in zip(parquet.to_pylist(), table, strict=True):
        numbers = {name: float(row[name] or "nan") for name in ("probability", "probability_2")}
        assert cells == pytest.approx(blank | row | numbers, nan_ok=True)
    assert [*table[0]] == ["image", "class", "probability", "class_2", "probability_2", "error"]
    assert [row["image"] for row in table] == [*arrays["image"]] == images
    assert [i for i, row in enumerate(table) if row["error"] and not row["class"]] == [4]
    expected = compute(np.stack([crop(load_image(images[i]), CFG) for i in range(5, 24)])).features
    assert np.isnan(arrays["features"][4]).all()
    np.testing.assert_allclose(arrays["features"][5:], expected)


def stopping(after: int, error: BaseException) -> Backend:
    """Raises an error when it has computed so many batches."""
    calls = iter(range(after))

    def stop(pixels: np.ndarray) -> Outputs:
        if next(calls, None) is None:
            raise error
        return compute(pixels)

    return Fake(stop)


BEGUN = "p.csv.partial.sqlite"


def kept() -> int:
    """The number of answers of a run that has not ended."""
    with closing(sqlite3.connect(BEGUN)) as database:
        ((count,),) = database.execute("SELECT count(*) FROM answers")
    return count - 1


def test_a_stopped_run_goes_on(photos):
    """With the same head and options alone."""
    images, outputs = find_images(["photos"]), OutputFiles(Path("p.csv"), Path("f.npz"))
    run_bulk(images, FAKE, OutputFiles(Path("q.csv"), Path("g.npz")), {"head": "x"}, batch_size=3)
    for expected in (6, 11):  # the damaged one again
        with pytest.raises(KeyboardInterrupt):
            run_bulk(images, stopping(2, KeyboardInterrupt()), outputs, {"head": "x"}, batch_size=3)
        assert (outputs.table.exists(), kept()) == (False, expected)
    with pytest.raises(
        ZooError, match=r"p.csv.partial.sqlite holds the first answers of another run, which differs in head, top k"
    ):
        run_bulk(images, FAKE, outputs, {"head": "y"}, top_k=1)
    run_bulk(images, stopping(5, AssertionError("repeated")), outputs, {"head": "x"}, batch_size=3)
    assert Path("p.csv").read_bytes() == Path("q.csv").read_bytes()
    np.testing.assert_array_equal(np.load("f.npz")["features"], np.load("g.npz")["features"])
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["f.npz", "g.npz", "p.csv", "photos", "q.csv"]


def test_a_run_that_goes_on_answers_for_the_files_as_they_are_now(photos):
    """What is the same is kept; images that are new, were replaced or could not be read are computed, and no
    row of a removed one is left."""
    with pytest.raises(KeyboardInterrupt):
        run_bulk(
            find_images(["photos"]), stopping(1, KeyboardInterrupt()), OutputFiles(Path("r.csv")), {}, batch_size=8
        )
    Path("photos/a/03.jpg").write_bytes(jpeg(24))  # and nothing else
    run_bulk(find_images(["photos"]), FAKE, OutputFiles(Path("r.csv")), {}, batch_size=8)
    assert read_csv("r.csv")[3]["class"] == "bright"
    outputs, unread = OutputFiles(Path("p.csv"), Path("f.npz")), Path("photos/a/04.jpg")
    unread.write_bytes(bytes(len(jpeg(4))))
    state = unread.stat()
    for after in (4, 1):
        with pytest.raises(KeyboardInterrupt):
            run_bulk(find_images(["photos"]), stopping(after, KeyboardInterrupt()), outputs, {}, batch_size=3)
        Path(f"photos/a/01{after}.jpg").write_bytes(jpeg(25))  # among those that are done
    Path("photos/a/03.jpg").write_bytes(jpeg(3))
    unread.write_bytes(jpeg(4))
    os.utime(unread, ns=(state.st_atime_ns, state.st_mtime_ns))  # as where a plugin was missing
    Path("photos/a/05.jpg").unlink()
    Path("photos/a/06.jpg").rename("photos/b/06.jpg")
    images = find_images(["photos"])
    run_bulk(images, stopping(5, AssertionError("repeated")), outputs, {}, batch_size=3)  # 11 are as they were
    fresh = OutputFiles(Path("q.csv"), Path("g.npz"))
    run_bulk(images, FAKE, fresh, {}, batch_size=3)
    assert read_csv("p.csv") == read_csv("q.csv")
    assert [row["class"] for row in read_csv("p.csv") if "/03." in row["image"]] == ["dark"]
    for name in ("image", "features"):
        np.testing.assert_array_equal(np.load("f.npz")[name], np.load("g.npz")[name])


def stop_after_six(images, *_):
    """A progress bar during which Ctrl-C is pressed."""
    yield from islice(images, 6)
    raise KeyboardInterrupt


def test_ctrl_c_says_how_to_go_on(run, photos):
    """Once there is something to go on from: what a run before it has left."""
    outputs = OutputFiles(Path("p.csv"))
    with pytest.raises(KeyboardInterrupt):
        run_job(find_images(["photos"]), Predictor(BUNDLED, top_k=5, batch_size=5), outputs, progress=stop_after_six)
    with stopped_in_image_tower():
        code, _, err = run("predict", "photos", "--head", BUNDLED, "--output", "p.csv")
    assert "Stopped. What was computed is kept: repeat the command" in err
    assert code == 130


def test_a_run_does_not_go_on_in_another_precision(photos, my_head):
    """Of "auto", which another machine has resolved otherwise."""
    images, outputs = find_images(["photos"]), OutputFiles(Path("p.csv"))
    with pytest.raises(KeyboardInterrupt):
        run_job(images, Predictor("my_head", batch_size=5), outputs, progress=stop_after_six)
    change = 'UPDATE answers SET row = replace(row, \'"precision": "{}"\', \'"precision": "{}"\') WHERE image = x\'\''
    with closing(sqlite3.connect(BEGUN)) as database, database:
        assert database.execute(change.format("float32", "bfloat16")).rowcount == 1
    with pytest.raises(ZooError, match="of another run, which differs in precision"):
        run_job(images, Predictor("my_head"), outputs)
    with closing(sqlite3.connect(BEGUN)) as database, database:
        database.execute(change.format("bfloat16", "float32"))
    run_job(images, Predictor("my_head", precision="float32"), outputs)
    assert len(read_csv("p.csv")) == 24


def test_two_processes_do_not_write_the_same_output(photos):
    images, outputs = find_images(["photos"]), OutputFiles(Path("p.csv"))
    with locked(outputs.partial(".lock"), ""), pytest.raises(ZooError, match=r"Another process .* p.csv.partial"):
        run_bulk(images, FAKE, outputs, {})
    assert not Path("p.csv").exists()


def test_a_full_disk_loses_nothing(photos):
    """Here a limit for the size of files, which is below that of all answers."""
    images, outputs = find_images(["photos"]), OutputFiles(Path("p.csv"), Path("f.npz"))

    def wide(pixels: np.ndarray) -> Outputs:
        found = compute(pixels)
        return found._replace(features=np.tile(found.features, 700))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (130_000, hard))
    try:
        with pytest.raises(ZooError, match=r"Cannot write to .*Run the same command again later: it continues"):
            run_bulk(images, Fake(wide), outputs, {}, batch_size=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert kept() in (4, 8, 12)
    left = iter(range(math.ceil((25 - kept()) / 4)))  # the damaged one again

    def once(pixels: np.ndarray) -> Outputs:
        assert next(left, None) is not None, "repeated"
        return wide(pixels)

    run_bulk(images, Fake(once), outputs, {}, batch_size=4)
    assert len(read_csv("p.csv")) == 24


def slow_run() -> None:
    """In a process of its own, which leads a group of processes."""

    def slow(pixels: np.ndarray) -> Outputs:
        time.sleep(0.05)
        with Path("computed").open("a") as file:
            file.write("1")
        return compute(pixels)

    os.setsid()
    backend = Fake(slow)
    images, outputs = find_images(["photos"]), OutputFiles(Path("p.csv"), Path("f.npz"))
    run_bulk(images, backend, outputs, {}, batch_size=1)


def test_a_killed_run_leaves_rows_and_no_process(photos):
    """Its workers end by themselves."""

    def has_ended(group: int) -> bool:
        try:
            os.killpg(group, signal.SIGCONT)
        except ProcessLookupError:
            return True
        return False

    process = get_context("fork").Process(target=slow_run)
    process.start()
    until(lambda: Path("computed").exists() and len(Path("computed").read_text()) > 9)
    process.kill()
    process.join()
    until(partial(has_ended, process.pid), 10)
    assert not Path("p.csv").exists()
    outputs, left = OutputFiles(Path("p.csv"), Path("f.npz")), 25 - kept()  # the damaged one again
    run_bulk(find_images(["photos"]), stopping(left, AssertionError("repeated")), outputs, {}, batch_size=1)
    assert len(read_csv("p.csv")) == 24


def test_the_contact_sheet_begins_with_the_least_certain(photos):
    """Of many images of a class it shows 60; here each is listed six times."""
    Path("photos/b/22.jpg").rename("photos/b/<b>.jpg")
    images = sorted(find_images(["photos"]) * 6)
    rows = [row for batch, _ in classify(images, FAKE) for row in batch]
    write_sheet(Path("out/s.html"), rows, "s.html")
    page = Path("s.html").read_text()
    assert re.findall(r'<h2 id="\d">(\w+)\s*<small>(.*?)</small>', page, re.DOTALL) == [
        ("bright", "66 images, the 60 least certain"),
        ("dark", "72 images, the 60 least certain"),
    ]
    shown = re.findall(r"<figcaption>\d+ % (\S+)<br>", page)
    bright, dark = shown[:60:6], shown[60::6]
    assert (bright[:3], dark[:3]) == (["13.jpg", "14.jpg", "15.jpg"], ["12.jpg", "11.jpg", "10.jpg"])
    assert 'href="../photos/b/%3Cb%3E.jpg"' in page
    assert page.count("data:image/jpeg;base64,") == len(shown) == 120
    assert "Cannot read the image photos/a/04.jpg" in page
    assert not re.search(r'(?:src|href)="(?!data:|#|\.\./photos/)', page)


def doubtful(pixels: np.ndarray) -> Outputs:
    """Dark and bright images look alike among themselves, and two of them are taken for the other kind; of
    two more classes there are none."""
    level = np.round(pixels.mean((1, 2, 3)) / 10)
    bright, doubt = level > 11, np.isin(level, (7, 19))
    logit = np.where(bright != doubt, 1, -1) * np.where(doubt, 0.1, 2.0)
    features = np.stack([1.0 * bright, 1.0 * ~bright, level / 100], 1).astype(np.float32)
    logits = np.stack([0 * logit, logit, 0 * logit - 9, 0 * logit - 9], 1).astype(np.float32)
    return Outputs(logits, features=features / np.linalg.norm(features, axis=1)[:, None])


DOUBTFUL = Fake(doubtful, "red", "green")


def test_images_of_a_folder_help_each_other(photos):
    images = find_images(["photos"])
    outputs = OutputFiles(Path("p.csv"), Path("f.npz"), Path("s.html"))
    run_bulk(images, DOUBTFUL, outputs, {}, together=True)
    rows = {Path(row["image"]).stem: row for row in read_csv("p.csv")}
    assert [name for name, row in rows.items() if row["alone"] != row["class"]] == ["07", "19"]
    assert [(rows[name]["alone"], rows[name]["class"]) for name in ("07", "19")] == [
        ("bright", "dark"),
        ("dark", "bright"),
    ]
    assert (rows["04"]["alone"], rows["04"]["error"] != "") == ("", True)
    assert Path("s.html").read_text().count("<small>alone ") == 2
    assert np.load("f.npz")["features"].shape == (24, 3)


@pytest.fixture(scope="module")
def bundled() -> dcp_zoo.DCP:
    return dcp_zoo.create_model(BUNDLED, True).eval()


def test_predict_a_folder(run, photos, bundled):
    images = find_images(["photos"])
    files = ["--output", "p.csv", "--features", "f.npz", "--sheet", "s.html"]
    code, _, err = run("predict", "photos", "--head", BUNDLED, *files, "--top-k", 2)
    assert code == 1, err
    assert "Cannot read the image photos/a/04.jpg" in err
    assert "1 of 24 images cannot be read." in err
    assert "Wrote p.csv, with 24 images." in err
    ((rows, outputs),) = classify(images, HeadBackend(bundled, features=True), top_k=2)
    assert [row["class_2"] for row in read_csv("p.csv") if not row["error"]] == [
        row["predictions"][1]["class"] for row in rows if "error" not in row
    ]
    np.testing.assert_array_equal(np.load("f.npz")["features"], outputs.features)
    with torch.inference_mode():
        image = dcp_zoo.create_transform(bundled)(load_image(images[7]))
        np.testing.assert_allclose(outputs.features[7], bundled.encode_image(image[None])[0], atol=1e-5)
    assert Path("s.html").read_text().count("<figure") == 23
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["f.npz", "p.csv", "photos", "s.html"]


HOSTILE = "\x1b]0;title\x07\u202egpj\x9b2J\u2028\nError[red]: x\x7f"


def test_names_do_not_command_the_terminal(run, photos, bundled, monkeypatch, capsys):
    """Those of files, classes and errors; and nothing else that is printed, whoever prints it."""
    head = copied(bundled)
    head.set_classnames([f"{HOSTILE}{i}" for i in range(5)])
    head.save_pretrained("head")
    folder = Path("photos/b")
    shutil.copy("photos/a/01.jpg", folder / f"{HOSTILE}.jpg")
    (folder / f"{HOSTILE}no.jpg").write_bytes(b"")
    monkeypatch.setattr(console.output, "_width", 250)
    code, out, _ = run("predict", folder, "--head", "head")
    assert (code, "Error[red]: x" in out) == (1, True)
    assert "\\x1b]0;title\\x07\\u202egpj\\x9b2J\\u2028\\nError" in out
    console.output.print(HOSTILE, Table(HOSTILE, title=HOSTILE), Text(HOSTILE))
    console.log(HOSTILE, console.ERROR)
    more = capsys.readouterr()
    assert more.out.count("\\u202egpj") == 3
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e]", out + more.out + more.err)
    assert not re.search("^Error", out, re.MULTILINE)


def test_rejection_is_one_column_in_every_output(run, photos):
    """Of the classes of the head, as in Python; and the table is a labels file."""
    head, files = ("--head", "dcp_mini.caltech101-16shot", "--reject"), ("photos/b/12.jpg", *sample_images())
    run.ok("predict", *files, *head, "--output", "p.csv")
    run.ok("predict", *files, *head, "--output", "p.jsonl")
    shown = json.loads(run.ok("predict", *files, *head, "--json"))
    decided = [
        "none of these" if row is None else row[0].name for row in dcp_zoo.predict(head[1], [*files], reject=True)
    ]
    table, lines = read_csv("p.csv"), [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]
    for rows in (table, lines, shown):
        assert [row["class"] for row in rows] == decided
    assert lines == shown
    assert [row["rejected"] for row in shown] == [name == "none of these" for name in decided]
    assert 0 < decided.count("none of these") < len(decided)
    assert [row["best"] for row in table] == [row["predictions"][0]["class"] for row in lines]
    assert all(float(row["probability"]) > 0 for row in table)
    assert [row.name for row in label_rows(Path("p.csv"), Path("/"))] == decided
    for others in (("--classes", "ant,beaver,lynx,cup"), ("--classes", "dog,cat", "--output", "q.csv")):
        code, _, err = run("predict", "--sample", *head, *others)
        assert (code, "has seen no image of" in err) == (2, True), err
        assert "much like its classes" not in err, "no note on what passes before the error"
    assert not Path("q.csv").exists()
