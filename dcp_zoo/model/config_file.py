"""A checkpoint's `config.json`, read without torch."""

import json
import os.path
from pathlib import Path
from typing import Any

from dcp_zoo.errors import ZooError
from dcp_zoo.model.config import CONFIG_NAME, WEIGHTS_NAME

FORMAT_VERSION = 1  # the only one that is read
CONFIG_TYPES: dict[str, type] = {
    "architecture": str,
    "label_names": list,
    "pretrained_cfg": dict,
    "model_args": dict,
    "dcp": dict,
}
DCP_TYPES: dict[str, type] = {"format_version": int, "clip": str}
OPTION_TYPES: dict[str, type] = {"n_ctx": int, "depth": int, "pooling": str, "share_cmpa": bool, "coupling": str}


def checkpoint_folder(place: str | Path) -> Path:
    """The folder of a checkpoint, given by its own path or by that of one of its two files."""
    path = Path(place)
    return path.parent if path.name in (WEIGHTS_NAME, CONFIG_NAME) and path.is_file() else path


def is_checkpoint(place: str | Path) -> bool:
    """Whether a checkpoint is at this path; False for a name that no path can have."""
    return os.path.isfile(checkpoint_folder(place) / CONFIG_NAME)  # noqa: PTH113  Path would raise


def read_config(directory: str | Path) -> dict[str, Any]:
    """The checked `config.json` of a checkpoint directory.

    Raises:
        ZooError: no such file, invalid JSON, not a DCP checkpoint, or another format.
    """
    path = Path(directory) / CONFIG_NAME
    if not path.is_file():
        raise ZooError(f"{directory} is not a checkpoint: it has no {CONFIG_NAME}. Pass a folder written by training.")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ZooError(f"{path} is damaged: invalid JSON ({error}). Train or download it again.") from error
    block = config.get("dcp") if isinstance(config, dict) else None
    version = block.get("format_version") if isinstance(block, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        raise ZooError(
            f"{path} has format {version}, but this dcp_zoo reads format {FORMAT_VERSION}: upgrade dcp_zoo, or train "
            "or download the head again."
        )
    invalid = _invalid_fields(config, CONFIG_TYPES)
    invalid = invalid or _invalid_fields(config["dcp"], DCP_TYPES)
    if not invalid and "method" not in config["dcp"]:
        invalid = _invalid_fields(config["model_args"], OPTION_TYPES)
    invalid = invalid or [name for name in ("descriptions", "template", "method") if not _is_text(name, config["dcp"])]
    if not invalid and not (config["label_names"] and all(isinstance(name, str) for name in config["label_names"])):
        invalid = ["label_names"]
    if invalid:
        raise ZooError(
            f"{path} is damaged or not that of a DCP checkpoint: {', '.join(invalid)} missing or of the wrong type. "
            "Train or download it again."
        )
    return config


def _is_text(name: str, block: dict[str, Any]) -> bool:
    """Whether a field of the `dcp` block is missing, sentences of each class, or a text without any braces but {}."""
    value = block.get(name)
    if not isinstance(value, dict) or name == "method":
        return value is None or (isinstance(value, str) and not set("{}") & set(value.replace("{}", "")))
    return all(isinstance(texts, list) and all(isinstance(text, str) for text in texts) for texts in value.values())


def _invalid_fields(values: Any, types: dict[str, type]) -> list[str]:
    """The names in `types` that are missing in `values` or have another type (True is not an int here)."""
    return [name for name, kind in types.items() if not isinstance(values, dict) or type(values.get(name)) is not kind]
