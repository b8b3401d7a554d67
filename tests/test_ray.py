"""Sweeps on a Ray cluster: the results of one machine, and what happens when workers die, the cluster is too
small, or a sweep is stopped."""

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from helpers import photo, recipe, until
from PIL import Image

pytest.importorskip("ray")
pytest.importorskip("pyarrow")

import psutil
import pyarrow.parquet
import ray

import dcp_zoo
from dcp_zoo.benchmark import store
from dcp_zoo.benchmark.plan import Settings, Trial
from dcp_zoo.benchmark.sweep import Event, import_ray, sweep, sweep_on_ray
from dcp_zoo.errors import ZooError

TRIALS = [Trial("few-shot", "dcp_mini", "coop", "dtd", 1, seed) for seed in range(1, 5)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # otherwise the other tests keep the processor from them
        import_ray().init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(tmp_path / "sweep")


def short(before_the_end: Callable[[Trial, Path], object]) -> Callable[[Trial, Settings], Event]:
    """Replaces `execute` with an empty trial. Workers get it by value: they cannot import this module."""

    def execute(trial: Trial, settings: Settings) -> Event:
        before_the_end(trial, settings.output)
        store.save_result(settings.output, {"trial": asdict(trial), "results": []})
        with (settings.output / "executed").open("a") as log:
            log.write(f"{trial.key}\n")
        return Event(trial, "done")

    return execute


def run_all(execute: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch, **resources: Any) -> list[Event]:
    monkeypatch.setattr("dcp_zoo.benchmark.sweep.execute", execute)
    return list(sweep_on_ray(TRIALS, settings, **resources))


@pytest.mark.scripts
def test_a_killed_worker_loses_and_repeats_no_result(cluster, settings, monkeypatch):
    """One that dies once is repeated, one that always dies fails, and the others run."""
    times = {TRIALS[3].key: 1, TRIALS[0].key: 99}

    def kill_worker(trial: Trial, output: Path) -> None:
        deaths = len(list(output.glob(f"death-{trial.key}-*")))
        if deaths < times.get(trial.key, 0):
            output.mkdir(exist_ok=True)
            (output / f"death-{trial.key}-{deaths}").touch()
            os.kill(os.getpid(), 9)

    monkeypatch.setattr("dcp_zoo.benchmark.sweep.RETRIES", 1)
    events = run_all(short(kill_worker), settings, monkeypatch)
    assert store.done(settings.output) == {trial.key for trial in TRIALS[1:]}
    assert set(Counter((settings.output / "executed").read_text().split()).values()) == {1}
    assert Counter(event.state for event in events) == {"done": 3, "failed": 1}
    ((key, message),) = store.failures(settings.output).items()
    assert key == TRIALS[0].key
    assert re.fullmatch(r"Ray lost it \(\w+\), 2 times", message)


@pytest.mark.scripts
def test_stopping_a_sweep_ends_its_workers(cluster, settings, monkeypatch):
    first = TRIALS[0].key

    def sleep(trial: Trial, output: Path) -> None:
        if trial.key == first:
            output.mkdir(exist_ok=True)
            (output / "pid").write_text(str(os.getpid()))
            time.sleep(600)

    monkeypatch.setattr("dcp_zoo.benchmark.sweep.execute", short(sleep))
    events = sweep_on_ray(TRIALS, settings)
    assert [next(events).state for _ in TRIALS[1:]] == ["done"] * 3
    until(lambda: (settings.output / "pid").is_file() and (settings.output / "pid").read_text())
    pid = int((settings.output / "pid").read_text())
    events.close()
    until(lambda: not Path(f"/proc/{pid}").exists())


@pytest.mark.scripts
def test_a_sweep_on_ray_runs_real_trials(cluster, settings, tmp_path):
    for name in ("black", "white"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (32, 32), name).save(tmp_path / "photos" / name / f"{i}.png")
    trial = Trial("few-shot", "dcp_mini", "zero-shot", "folder", 0, 0)
    assert sweep([trial], replace(settings, data_root=tmp_path / "photos"), run=sweep_on_ray) == {}
    assert store.results(settings.output)[trial.key]["results"][0]["images"] > 0


@pytest.mark.scripts
def test_a_killed_worker_costs_the_recipe_for_ray_data_no_image(cluster, tmp_path, monkeypatch):
    """As it stands on the page: of 2,000 images 1 % cannot be read; a second run computes what is new."""
    monkeypatch.chdir(tmp_path)
    for i in range(2000):
        path = photo(Path("MY_PHOTOS", f"{i % 10}", f"{i:04}.jpg"), i % 100)
        if i % 100 == 1:
            path.write_bytes(path.read_bytes()[:1000])
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(exec, recipe("ray_answers"), {})
        seen: list[psutil.Process] = []

        def computing() -> bool:
            every = psutil.process_iter(["cmdline", "cpu_times"])
            seen[:] = [p for p in every if "MapBatches(Predictor)" in " ".join(p.info["cmdline"] or ())]
            return any(p.info["cpu_times"].user > 15 for p in seen)

        until(lambda: run.done() or computing(), 300)
        assert not run.done()
        seen[0].kill()
        run.result()
    table = sorted(pyarrow.parquet.read_table("ray_answers").to_pylist(), key=lambda row: Path(row["path"]).stem)
    assert [int(Path(row["path"]).stem) for row in table] == list(range(2000))
    assert [i for i, row in enumerate(table) if row["error"]] == list(range(1, 2000, 100))
    expected = dcp_zoo.predict("dcp_mini.caltech101-16shot", [row["path"] for row in table[2:14]])
    assert [row["class"] for row in table[2:14]] == [best.name for (best,) in expected]
    probabilities = [best.probability for (best,) in expected]
    assert [row["probability"] for row in table[2:14]] == pytest.approx(probabilities, abs=1e-5)
    monkeypatch.setattr("ray.data.read_binary_files", None)
    exec(recipe("ray_answers"), {})


def test_what_cannot_run_on_ray_is_said(cluster, settings, monkeypatch, run):
    """A trial larger than every machine, an output folder that is not shared, and no cluster."""
    with pytest.raises(ZooError, match=r"No machine of the cluster has 3 cores and 0 GPUs.*--per-trial"):
        run_all(print, settings, monkeypatch, cpus=3)
    with pytest.raises(ZooError, match="share"):
        run_all(lambda trial, settings: Event(trial, "done"), settings, monkeypatch)
    swept = "benchmark", "few-shot", "--methods", "dcp", "--output", settings.output
    assert "add --ray local" in run.refused(*swept, "--per-trial", "cpus=2")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ZooError, match=r"No Ray cluster at '127.0.0.1:9'.*--ray local"):
        next(sweep_on_ray(TRIALS, settings, address="127.0.0.1:9"))
    for wrong in ("2", "cores=2"):
        assert "such as cpus=2,gpus=0.5" in run.refused(*swept, "--ray", "local", "--per-trial", wrong)
