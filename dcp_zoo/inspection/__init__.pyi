from .inspect import Inspected as Inspected
from .inspect import Inspection as Inspection
from .suggest import Suggestion as Suggestion
