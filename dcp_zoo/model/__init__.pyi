from .clip import FrozenCLIP as FrozenCLIP
from .fused import FusedHead as FusedHead
from .fused import load_fused as load_fused
