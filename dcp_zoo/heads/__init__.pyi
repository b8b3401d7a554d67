from .config import Abilities as Abilities
from .fused import FusedHead as FusedHead
