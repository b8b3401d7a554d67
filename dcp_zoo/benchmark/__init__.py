"""The paper's protocols: trials planned as a grid, run one by one or on a cluster, each ending in one file."""

from dcp_zoo.benchmark.plan import PROTOCOLS, plan_trials
from dcp_zoo.benchmark.store import gather
from dcp_zoo.benchmark.trial import Settings, Trial, run_trial

__all__ = ["PROTOCOLS", "Settings", "Trial", "gather", "plan_trials", "run_trial"]
