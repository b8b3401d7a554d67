"""How many threads compute, and how they wait."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool

import pytest
import torch

from dcp_zoo import threads
from dcp_zoo.data import check_images, load_split
from dcp_zoo.data.images import thumbnails
from dcp_zoo.training.device import decoders


def test_threads_are_those_granted_or_the_cores(monkeypatch):
    chosen: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr("joblib.cpu_count", lambda: 3)  # which knows the quota of a container
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads.use_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    threads.use_threads()
    assert chosen == [3, 7]


def test_functions_choose_the_threads_of_their_own_thread_only():
    """Otherwise one that starts meanwhile keeps what another has set for itself, and all later ones with it."""

    def elsewhere() -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    before = torch.get_num_threads(), elsewhere()
    with threads.fair_threads(before[1] + 2):
        assert (torch.get_num_threads(), elsewhere()) == (before[1] + 2, before[1])
    assert (torch.get_num_threads(), elsewhere()) == before


def test_images_are_read_on_the_cores_of_the_container(monkeypatch, flowers):
    pools: list[int] = []
    for kind, place in ((ThreadPoolExecutor, "dcp_zoo.data.images"), (ThreadPool, "dcp_zoo.data.unreadable")):
        monkeypatch.setattr(f"{place}.{kind.__name__}", lambda n, kind=kind: pools.append(n) or kind(n))
    monkeypatch.setattr("joblib.cpu_count", lambda: 3)
    for granted in ("", "2,1"):
        monkeypatch.setenv("OMP_NUM_THREADS", granted)
        check_images(load_split("folder", flowers).items)
        thumbnails([str(flowers / "rose" / "0.jpg")])
    assert pools == [3, 3, 2, 2]


@pytest.mark.parametrize(
    "command",
    [
        ["train", "MY_PHOTOS", "--shots", "2"],
        ["eval", "--head", "my_head", "--data-root", "MY_PHOTOS"],
        ["benchmark", "few-shot", "--datasets=folder", "--data-root=MY_PHOTOS", "--methods=zero-shot", "--output=out"],
    ],
    ids=lambda command: command[0],
)
def test_commands_compute_with_the_cores_they_may_use(run, flowers, my_head, monkeypatch, command):
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    run.ok(*command)
    assert chosen == [3]


def test_processes_decode_where_a_gpu_would_wait(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    places = ("cuda", 2001), ("cuda", 2000), ("cpu", 50_000)
    assert [decoders(torch.device(name), images) for name, images in places] == [3, 0, 0]


def printed(program: str, own: dict[str, str]) -> list[str]:
    """What a program prints of the environment variables, and whether it has imported torch before."""
    env = {name: value for name, value in os.environ.items() if name not in threads.PASSIVE} | own
    show = f"print('torch' in sys.modules, *map(os.environ.get, {[*threads.PASSIVE]}))"
    command = [sys.executable, "-c", f"import os, sys\n{program.format(show=show)}"]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize("own", [{}, {"KMP_BLOCKTIME": "200"}])
def test_waiting_threads_of_a_command_sleep_unless_the_user_says_otherwise(own):
    found = printed("from dcp_zoo.cli import main\nmain(lambda: {show})", own)
    assert found == ["False", "passive", own.get("KMP_BLOCKTIME", "0")]


def test_an_import_changes_nothing_in_the_environment():
    """So that it does not matter whether torch or this package comes first."""
    assert printed("import dcp_zoo\ndcp_zoo.FewShotClassifier\n{show}", {}) == ["True", "None", "None"]
