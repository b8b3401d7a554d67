"""Data sets in the layout that CoOp made common, folders of one's own pictures, and their few-shot subsets."""

from dcp_zoo.data.images import ImageDataset, load_image
from dcp_zoo.data.load import CheckRow, check, load_split
from dcp_zoo.data.splits import Item, Split, few_shot, subsample_classes, subset_sha256
from dcp_zoo.data.table import DATASETS, VARIANTS, DatasetSpec, classnames, list_datasets

__all__ = [
    "DATASETS",
    "VARIANTS",
    "CheckRow",
    "DatasetSpec",
    "ImageDataset",
    "Item",
    "Split",
    "check",
    "classnames",
    "few_shot",
    "list_datasets",
    "load_image",
    "load_split",
    "subsample_classes",
    "subset_sha256",
]
