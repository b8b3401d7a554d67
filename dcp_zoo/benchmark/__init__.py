"""The paper's protocols: a grid of trials, run one by one or on a cluster, with one result file each."""

from dcp_zoo.benchmark.plan import PROTOCOLS, Settings, Trial, plan_trials
from dcp_zoo.benchmark.store import gather

__all__ = ["PROTOCOLS", "Settings", "Trial", "gather", "plan_trials"]
