"""Faults during a sweep: a clear state and message, and the sweep continues, or resumes when started again."""

import errno
from pathlib import Path

import pytest
from helpers import made_up_result, no_images

from dcp_zoo.benchmark import Settings, Trial, plan, plan_trials, store
from dcp_zoo.benchmark.sweep import sweep
from dcp_zoo.errors import ZooError

TRIALS = plan_trials("few-shot", methods=["coop"], datasets=["dtd"], shots=[1], seeds=[1, 2, 3])


# ------------------------------------------------------------------------------------------- trials that take no time


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> dict[int, BaseException]:
    """The errors that trials raise, by seed."""
    found: dict[int, BaseException] = {}

    def run_trial(trial: Trial, settings: Settings, **kwargs: object) -> dict:
        if trial.seed in found:
            raise found[trial.seed]
        return made_up_result(trial)

    monkeypatch.setattr("dcp_zoo.benchmark.sweep.run_trial", run_trial)
    monkeypatch.setattr(plan, "read_split", no_images)
    return found


def seeds_done(output: Path) -> list[int]:
    return sorted(trial.seed for trial in TRIALS if trial.key in store.done(output))


@pytest.mark.parametrize(
    "command",
    [
        ["train", "MY_PHOTOS"],
        ["export", "--head", "my_head", "--output", "out/my.onnx"],
        ["benchmark", "few-shot", "--datasets", "folder", "--data-root", "MY_PHOTOS", "--output", "out"],
        ["report", "out"],
    ],
    ids=lambda command: command[0],
)
def test_a_folder_that_is_not_writable_is_found_first(run, flowers, my_head, no_work, monkeypatch, command):
    def refuse(*args, **options):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("dcp_zoo.files.TemporaryFile", refuse)
    monkeypatch.setattr("dcp_zoo.files.Path.touch", refuse)  # of a lock
    err = run.refused(*command)
    assert f"Cannot write to {'MY_PHOTOS_head' if command[0] == 'train' else 'out'}" in err
    assert "Permission denied. Choose another --output" in err


@pytest.mark.parametrize("call", ["os.fsync", "Path.touch"])
def test_a_full_folder_stops_the_sweep_with_nothing_half_written(
    tmp_path: Path, faults: dict, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    assert sweep(TRIALS[:1], Settings(tmp_path)) == {}
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(f"dcp_zoo.files.{call}", refuse)
        with pytest.raises(ZooError, match=r"Cannot write .*[Cc]hoose another --output"):
            sweep(TRIALS, Settings(tmp_path))
    files = {path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"}
    assert {path: path.read_bytes() for path in files} == before
    assert sweep(TRIALS, Settings(tmp_path)) == {}
    assert seeds_done(tmp_path) == [1, 2, 3]
