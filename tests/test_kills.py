"""Commands that are killed at random moments, and saves at the same time: a few of those of `benchmarks/kills.py`."""

import random

import kills
import pytest


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, kills.Case]:
    return kills.cases(tmp_path_factory.mktemp("data"))


@pytest.mark.scripts
@pytest.mark.parametrize("name", ["classes add", "export"])
def test_a_kill_leaves_the_old_state_or_the_new_one(cases, tmp_path, name):
    counts = kills.run_case(cases[name], 1, tmp_path, random.Random())
    assert (counts["third"], counts["broken"]) == (0, 0)


def test_a_head_of_two_saves_is_noticed(tmp_path):
    kills.save(tmp_path, 1, 2)
    assert kills.read(tmp_path) == "new"
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"3"', '"2"'))
    assert kills.read(tmp_path) == "third"


@pytest.mark.scripts
def test_saves_at_the_same_time_leave_one_of_the_heads(tmp_path):
    counts = kills.run_saves(tmp_path / "head", 20, 2)
    assert (counts["third"], counts["broken"]) == (0, 0)
