from .inspection import Inspected as Inspected
from .inspection import Inspection as Inspection
from .search import Suggestion as Suggestion
