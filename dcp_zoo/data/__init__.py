"""Datasets in CoOp's layout, your own image folders, datasets of the Hub and webdataset shards, and their few-shot
subsets."""

from dcp_zoo.data.images import load_image
from dcp_zoo.data.load import CheckRow, as_trained, check, check_images, load_split
from dcp_zoo.data.splits import (
    DatasetSpec,
    Item,
    Split,
    all_for_training,
    check_testable,
    few_shot,
    for_training,
    subsample_classes,
    subset_sha256,
)
from dcp_zoo.data.table import DATASETS, VARIANTS, classnames, find_spec, is_own, list_datasets

__all__ = [
    "DATASETS",
    "VARIANTS",
    "CheckRow",
    "DatasetSpec",
    "Item",
    "Split",
    "all_for_training",
    "as_trained",
    "check",
    "check_images",
    "check_testable",
    "classnames",
    "few_shot",
    "find_spec",
    "for_training",
    "is_own",
    "list_datasets",
    "load_image",
    "load_split",
    "subsample_classes",
    "subset_sha256",
]
