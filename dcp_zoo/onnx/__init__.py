"""Deployment: exported files, and a classifier that needs neither torch nor CLIP."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
