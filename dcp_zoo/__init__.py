"""A timm-style model zoo for DCP, Deeply Coupled Cross-Modal Prompt Learning (ACL Findings 2023): a frozen
CLIP becomes an image classifier from 1 to 16 images per class. The public names are in `__init__.pyi` and
imported on first use; the models register with timm as soon as timm is imported."""

import lazy_loader
import wrapt

__version__ = "0.1.0"  # which setup.cfg reads
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
wrapt.register_post_import_hook("dcp_zoo.zoo.dcp:register", "timm")
