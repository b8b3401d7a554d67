"""Datasets in CoOp's layout, your own image folders, datasets of the Hub and webdataset shards, and their few-shot
subsets. The public names are listed in `__init__.pyi` and imported on first use, so that the table needs no reader."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
