"""The state of sweeps: results, failed trials and missing trials."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dcp_zoo.benchmark import store
from dcp_zoo.errors import ZooError, import_extra

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class State:
    """Results as returned by `store.gather`, failed trials with their error messages, and missing trials."""

    results: "pd.DataFrame"
    failed: dict[str, str]
    missing: list[str]


def read_state(folders: Sequence[str | Path]) -> State:
    """Read the output folders of sweeps. ZooError if there is no result."""
    import_extra("pandas", "plots")
    paths = [Path(folder) for folder in folders]
    done = {key for path in paths for key in store.done(path)}
    if not done:
        raise ZooError(
            f"There is no result in {', '.join(map(str, paths))}: pass the --output folder of `dcp-zoo benchmark`."
        )
    failed = {key: reason for path in paths for key, reason in store.failures(path).items() if key not in done}
    planned = {key for path in paths for key in store.planned(path)}
    return State(store.gather(paths), failed, sorted(planned - done - failed.keys()))
