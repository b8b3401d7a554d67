from .inspection import Inspected as Inspected
from .inspection import Inspection as Inspection
from .suggest import Suggestion as Suggestion
