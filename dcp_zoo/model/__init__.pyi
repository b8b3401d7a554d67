from .clip import FrozenCLIP as FrozenCLIP
from .fused import FusedDCP as FusedDCP
from .fused import load_fused as load_fused
