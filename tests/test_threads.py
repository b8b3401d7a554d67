"""How many threads compute, and how they wait."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dcp_zoo import threads
from dcp_zoo.training.device import decoders


def test_functions_choose_the_threads_of_their_own_thread_only():
    """Otherwise one that starts meanwhile keeps what another has set for itself, and all later ones with it."""

    def elsewhere() -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    before = torch.get_num_threads(), elsewhere()
    with threads.fair_threads(before[1] + 2):
        assert (torch.get_num_threads(), elsewhere()) == (before[1] + 2, before[1])
    assert (torch.get_num_threads(), elsewhere()) == before


def test_commands_compute_with_the_cores_they_may_use(run, flowers, monkeypatch):
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    run.ok("train", "MY_PHOTOS", "--shots", "2")
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
