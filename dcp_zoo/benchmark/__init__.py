"""The paper's protocols: trials planned as a grid, run one by one or on a cluster, each ending in one file."""

from .plan import PROTOCOLS, plan_trials
from .store import gather
from .trial import Settings, Trial, run_trial

__all__ = ["PROTOCOLS", "Settings", "Trial", "gather", "plan_trials", "run_trial"]
