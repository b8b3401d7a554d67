"""Datasets in CoOp's layout, your own folders of images, datasets of the Hub; few-shot subsets."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
