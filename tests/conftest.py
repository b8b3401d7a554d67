"""What every process of pytest needs. The fixtures are in shared.py: importing torch takes seconds, in which
xdist's main process, which runs no test, would keep the others from starting."""

import gc
import os

import pytest

gc.disable()  # until the tests begin: it would look through all that is imported, again and again
# containers set it: every process that a test starts would compile torch again, which takes longer than the
# test
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.pop("COLUMNS", None)  # which xdist gives its processes: rich would take it for the width of all tables
# tests run on all cores already: threads and processes that they start would each compute with as many
# threads again
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_ENDPOINT", "http://127.0.0.1:9")  # no test asks the Hub: those that need one start one


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores, as tests spend a fifth of their time waiting: for a browser, servers,
    Ray."""
    return (os.cpu_count() or 1) + 1


def pytest_configure(config: pytest.Config) -> None:
    starts_others = config.getoption("numprocesses", None) and not config.getoption("collectonly")
    if not starts_others or hasattr(config, "workerinput"):
        config.pluginmanager.import_plugin("shared")


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
