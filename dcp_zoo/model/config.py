"""DCP's options, a checkpoint's `config.json`, and the sizes of the miniature: plain values, without torch."""

import json
import os.path
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from dcp_zoo.errors import ZooError, as_zoo_error, check_choice

COUPLINGS = ("bidirectional", "text_to_vision")
POOLINGS = ("mean", "max", "first")
STATS = ("batch", "stored", "per-image")
WEIGHTS_NAME, CONFIG_NAME = "model.safetensors", "config.json"  # the files of a checkpoint
REFUSED = 0.05  # of the images of known classes, by a head's threshold


def option(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field with a help text and optional valid choices."""
    return field(default=default, metadata={"help": help, "choices": choices})


COUNTS = frozenset(  # options that are None, or at least 1
    (
        "n_ctx depth prompted_blocks batch_size eval_batch_size epochs stop_epoch flat_epochs steps rank augment_epochs"
    ).split()
)


def check_options(config: Any) -> None:
    """Raise ZooError if a field of a dataclass of `option`s has a value outside its choices, or is a count below 1."""
    for part in fields(config):
        value = getattr(config, part.name)
        if part.metadata.get("choices"):
            check_choice(part.name, value, part.metadata["choices"])
        least = 2 if part.name == "prompted_blocks" else 1  # prompts are coupled between blocks
        if part.name in COUNTS and value is not None and value < least:
            raise ZooError(f"{part.name} must be at least {least}, not {value}.")


@dataclass(frozen=True)
class DCPConfig:
    """The options of a DCP: the single source of their names, defaults, choices and help texts. Raises ZooError for an
    unknown choice, or a number below 1."""

    n_ctx: int = option(16, "prompt tokens in each tower")
    depth: int = option(9, "coupled blocks; at most one less than the blocks of the shorter tower")
    pooling: str = option("mean", "how vision prompts are pooled over the batch", POOLINGS)
    share_cmpa: bool = option(True, "one CMPA for all coupled blocks instead of one per block")
    coupling: str = option("bidirectional", "the paper's, or what the authors' release computes", COUPLINGS)
    ctx_init: str | None = option(None, "phrase that initialises the text prompts if n_ctx is at most 4")
    prompted_blocks: int | None = option(
        None, "late coupling: prompts enter only this many last blocks of each tower; null: all, as in the paper"
    )

    as_dict = asdict

    def __post_init__(self) -> None:
        check_options(self)

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> "DCPConfig":
        """A config from keyword options; ZooError lists the valid ones if one is unknown."""
        known = [part.name for part in fields(cls)]
        unknown = sorted(options.keys() - set(known))
        if unknown:
            raise ZooError(f"A DCP has no option {', '.join(unknown)}: it has {', '.join(known)}.")
        return cls(**options)


FORMAT_VERSION = 2  # the only one that is read
OTHER_HEADS = ("linear", "prompts", "cache")  # kinds of heads besides DCP, see `dcp_zoo.zoo.factory.KINDS`
CONFIG_TYPES = {"architecture": str, "label_names": list, "pretrained_cfg": dict, "model_args": dict, "dcp": dict}
DCP_TYPES: dict[str, type] = {"format_version": int, "clip": str}


def checkpoint_folder(place: str | Path) -> Path:
    """The folder of a checkpoint, given by its own path or by that of one of its two files."""
    path = Path(place)
    return path.parent if path.name in (WEIGHTS_NAME, CONFIG_NAME) and path.is_file() else path


def is_checkpoint(place: str | Path) -> bool:
    """Whether a checkpoint is at this path; False for a name that no path can have."""
    return os.path.isfile(checkpoint_folder(place) / CONFIG_NAME)  # noqa: PTH113  Path would raise


def read_config(directory: str | Path) -> dict[str, Any]:
    """The checked `config.json` of a checkpoint directory; ZooError if it is missing, damaged, or of another format."""
    path = Path(directory) / CONFIG_NAME
    if not path.is_file():
        raise ZooError(f"{directory} is not a checkpoint: it has no {CONFIG_NAME}. Pass a folder written by training.")
    with as_zoo_error(f"{path} is damaged: invalid JSON ({{}}). Train or download it again."):
        config = json.loads(path.read_text())
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
        options = config["model_args"]
        invalid = [p.name for p in fields(DCPConfig) if type(options.get(p.name)) not in (get_args(p.type) or [p.type])]
    elif not invalid and config["dcp"].get("head") not in OTHER_HEADS:
        invalid = ["head"]
    invalid = invalid or [
        name for name in ("descriptions", "template", "rest", "method") if not _is_text(name, config["dcp"])
    ]
    if not invalid and not (config["label_names"] and all(isinstance(name, str) for name in config["label_names"])):
        invalid = ["label_names"]
    if invalid:
        raise ZooError(
            f"{path} is damaged, or not from a DCP checkpoint: {', '.join(invalid)} missing or of the wrong type. "
            "Train or download it again."
        )
    return config


def rejection_note(info: dict[str, Any], reject: float = True) -> str:
    """What a head with this `info` lets through if this share of its classes' images may be refused; "" if unknown."""
    rate, passing = REFUSED if reject is True else reject, info.get("text_probe", {}).get("others_accepted")
    others = passing.get(f"{rate:g}") if isinstance(passing, dict) else None
    if others is None:
        return ""
    return (
        f"{100 * rate:g} % of the images of the head's classes are refused, and about {others:.0f} % of those of other "
        "things let through, as measured by leaving classes out."
    )


def _is_text(name: str, block: dict[str, Any]) -> bool:
    """Whether a field of the `dcp` block is missing, sentences of each class, or texts without any braces but {}."""
    value = block.get(name)
    if isinstance(value, list) and name == "template":
        return bool(value) and all(_is_text(name, {name: text or None}) for text in value)
    if not isinstance(value, dict) or name == "method":
        return value is None or (isinstance(value, str) and not set("{}") & set(value.replace("{}", "")))
    return all(isinstance(texts, list) and all(isinstance(text, str) for text in texts) for texts in value.values())


def _invalid_fields(values: Any, types: Mapping[str, type]) -> list[str]:
    """The names in `types` that are missing in `values` or have another type (True is not an int here)."""
    return [name for name, kind in types.items() if not isinstance(values, dict) or type(values.get(name)) is not kind]


MINI_WEIGHTS = Path(__file__).parents[1] / "weights" / "dcp_mini" / "clip.safetensors"
# The miniature's stem scales pixels to (x - 127) / 128; mean and std are equivalent for a [0, 1] tensor.
MINI_CFG: dict[str, Any] = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 192, "patch_size": 32, "width": 256, "layers": 6, "head_width": 64, "mlp_ratio": 2},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 6, "mlp_ratio": 2},
    "quick_gelu": True,
    "image_size": 192,
    "mean": (127 / 255,) * 3,
    "std": (128 / 255,) * 3,
}
