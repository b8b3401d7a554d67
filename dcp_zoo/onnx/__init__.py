"""ONNX: exported files, and a classifier that reads them without torch and CLIP."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
