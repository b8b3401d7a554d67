from .inspection import Inspected as Inspected
from .inspection import Inspection as Inspection
from .search import Suggestion as Suggestion
from .spot_check import Promise as Promise
from .spot_check import Share as Share
from .spot_check import SpotCheck as SpotCheck
