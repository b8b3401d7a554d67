from .clip import FrozenCLIP as FrozenCLIP
from .fused import FusedHead as FusedHead
