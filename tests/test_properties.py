"""Properties that hold for any input: what strangers write is read or refused, and never escapes. Examples
are made by hypothesis, the same at every run; `.ci/fuzz.py` damages whole files, and for longer than
here."""

import csv
import json
import random
import re
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

import fuzz
import pytest
from helpers import tar
from test_download import zipped

from dcp_zoo.backbone.classes import TEMPLATE, check_classnames, class_texts
from dcp_zoo.backbone.tokens import default_tokenizer
from dcp_zoo.data import load_labelled
from dcp_zoo.data.download import unpack
from dcp_zoo.data.find import find_images
from dcp_zoo.data.packaged import Archive
from dcp_zoo.data.readers import read_classnames, read_descriptions
from dcp_zoo.errors import ZooError
from dcp_zoo.files import HIDDEN, printable
from dcp_zoo.prediction.outputs import TABLES
from dcp_zoo.tables import quoted, read_csv, split_list

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

settings.register_profile("tests", max_examples=40, deadline=None, derandomize=True, database=None)
settings.load_profile("tests")
TEXT = st.text(st.characters(exclude_categories=()), max_size=400)  # surrogates too
TEXT |= st.text(st.sampled_from("ab,;\t\n\r \"'=-+@%{}\u202e\ufeff\udce4é."), max_size=12)  # what means something
NASTY = st.sampled_from(["..", ".", "", "a", "b.jpg", "C:", "\\", "~", " ", ".. ", "...", "CON", "\\..\\", "x:y", "/"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
CONTENT = st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode())
CONTENT |= st.sampled_from(
    [b"[" * 100_000, b"[" + b"9" * 5000 + b"]", b'{"a":' * 100_000]
)  # beyond Python's own limits


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("place")


@given(TEXT)
def test_any_name_can_be_shown(name):
    assert not HIDDEN.search(printable(name))
    assert printable(printable(name)) == printable(name)


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=9))
def test_any_names_survive_a_table(place, pairs):
    rows = [{"image": a, "class": b, "predictions": [{"class": b, "probability": 0.5}]} for a, b in pairs]
    for suffix in (".csv", ".jsonl"):
        TABLES[suffix](str(place / f"p{suffix}"), rows)
    with (place / "p.csv").open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        assert not any(cell.startswith(tuple("=+-@\t\r")) for row in csv.reader(file) for cell in row)
    encoded = [[re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", name) for name in pair] for pair in pairs]
    assert [row[:2] for row in read_csv(place / "p.csv")[1:]] == encoded
    assert [json.loads(line) for line in (place / "p.jsonl").read_text().split("\n")[:-1]] == rows


@given(st.lists(TEXT, min_size=1, max_size=9))
def test_any_names_survive_a_list(names):
    assert split_list(",".join(map(quoted, names))) == names
    assert split_list("\n".join(map(quoted, names))) == names or "" in names  # blank lines are none


@given(st.lists(TEXT, min_size=2, max_size=4))
def test_any_class_names_are_labels_that_clip_reads_or_refused(place, names):
    rows = [
        {"image": f"{i}.jpg", "class": name, "predictions": [{"class": name, "probability": 1.0}]}
        for i, name in enumerate(names)
    ]
    TABLES[".csv"](str(place / "labels.csv"), rows)
    for i in range(len(names)):
        (place / f"{i}.jpg").touch()
    with suppress(ZooError), warnings.catch_warnings(action="ignore"):  # that some are the same
        found = load_labelled("folder", place, place / "labels.csv")
        assert found.classnames == sorted({name.strip() for name in names} - {""})
        default_tokenizer()(class_texts(check_classnames(found.classnames), TEMPLATE)[0])


@given(CONTENT)
def test_any_file_of_names_is_read_or_refused(place, content):
    for name, read in (
        ("names.txt", read_classnames),
        ("texts.json", read_descriptions),
        ("list.txt", lambda file: find_images([str(file)])),
        ("labels.csv", lambda file: load_labelled("folder", place, file)),
    ):
        (place / name).write_bytes(content)
        with suppress(ZooError), warnings.catch_warnings(action="ignore"):  # that it is not in UTF-8
            assert read(place / name)


@given(st.lists(NASTY, max_size=6).map("/".join), st.sampled_from([zipped, tar]))
def test_any_member_lands_inside(member, make):
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "a.bin").write_bytes(make({"d/ok.jpg": b"x", f"d/{member}": b"y"}))
        try:
            unpack(Archive("http://x/a.bin", folders={"d": ""}), root / "a.bin", root / "in" / "set")
        except ZooError:
            assert not list((root / "in" / "set").iterdir())
        assert {path.name for path in root.iterdir()} == {"a.bin", "in"}
        assert {path.name for path in (root / "in").iterdir()} == {"set"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "inputs"), {"pictures": 20, "checkpoints": 5, "labels": 20}.items())
def test_the_first_inputs_of_the_fuzzing_script(kind, inputs, tmp_path):
    make, damage = fuzz.KINDS[kind]
    corpus = make()
    for number in range(inputs):
        with suppress(ZooError):
            damage(corpus, random.Random(f"{kind} {number}"), tmp_path)()
