from .search import Suggestion as Suggestion
from .inspection import Inspected as Inspected
from .inspection import Inspection as Inspection
