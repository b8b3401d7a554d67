"""dcp_zoo: a timm-style model zoo for DCP, Deeply Coupled Cross-Modal Prompt Learning (arXiv 2305.17903).

Importing it registers the models with timm.
"""

from dcp_zoo.data import list_datasets
from dcp_zoo.errors import ZooError
from dcp_zoo.model.checkpoint import load_head
from dcp_zoo.model.dcp import DCP
from dcp_zoo.zoo import dcp as _timm_entrypoints  # noqa: F401
from dcp_zoo.zoo.convert import convert_cmpa_checkpoint
from dcp_zoo.zoo.factory import create_model, create_transform
from dcp_zoo.zoo.publish import push_to_hub
from dcp_zoo.zoo.registry import get_pretrained_cfg, is_model, list_models, list_pretrained

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
