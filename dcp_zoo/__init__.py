"""dcp_zoo: a timm-style model zoo for DCP, Deeply Coupled Cross-Modal Prompt Learning (arXiv 2305.17903).

Importing it registers the models with timm.
"""

from . import dcp as _timm_entrypoints  # noqa: F401
from .checkpoint import load_head
from .convert import convert_cmpa_checkpoint
from .data import list_datasets
from .errors import ZooError
from .factory import create_model, create_transform
from .model import DCP
from .publish import push_to_hub
from .registry import get_pretrained_cfg, is_model, list_models, list_pretrained

__all__ = [
    "DCP",
    "ZooError",
    "convert_cmpa_checkpoint",
    "create_model",
    "create_transform",
    "get_pretrained_cfg",
    "is_model",
    "list_datasets",
    "list_models",
    "list_pretrained",
    "load_head",
    "push_to_hub",
]
