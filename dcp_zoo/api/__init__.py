"""The Python API for your own images: `FewShotClassifier`, and the functions `train`, `evaluate` and `predict`."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
