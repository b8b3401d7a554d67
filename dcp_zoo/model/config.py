"""DCP's options, file names, and the sizes of the miniature: plain values, without torch."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dcp_zoo.errors import ZooError, check_choice

COUPLINGS = ("bidirectional", "text_to_vision")
POOLINGS = ("mean", "max", "first")
STATS = ("batch", "stored", "per-image")
WEIGHTS_NAME, CONFIG_NAME = "model.safetensors", "config.json"  # the files of a checkpoint


def option(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field with a help text and optional valid choices."""
    return field(default=default, metadata={"help": help, "choices": choices})


COUNTS = frozenset(
    "n_ctx depth batch_size eval_batch_size epochs stop_epoch steps rank augment_epochs".split()
)  # options that are at least 1, or None


def check_options(config: Any) -> None:
    """Raise ZooError if a field of a dataclass of `option`s has a value outside its choices, or is a count below 1."""
    for part in fields(config):
        value = getattr(config, part.name)
        if part.metadata.get("choices"):
            check_choice(part.name, value, part.metadata["choices"])
        if part.name in COUNTS and value is not None and value < 1:
            raise ZooError(f"{part.name} must be at least 1, not {value}.")


@dataclass(frozen=True)
class DCPConfig:
    """The options of a DCP: the single source of their names, defaults, choices and help texts.

    Raises:
        ZooError: an unknown choice, or a number below 1.
    """

    n_ctx: int = option(16, "prompt tokens in each tower")
    depth: int = option(9, "coupled blocks; at most one less than the blocks of the shorter tower")
    pooling: str = option("mean", "how vision prompts are pooled over the batch", POOLINGS)
    share_cmpa: bool = option(True, "one CMPA for all coupled blocks instead of one per block")
    coupling: str = option("bidirectional", "the paper's, or what the authors' release computes", COUPLINGS)
    ctx_init: str | None = option(None, "phrase that initialises the text prompts if n_ctx is at most 4")

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

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


MINI_WEIGHTS = Path(__file__).parents[1] / "weights" / "dcp_mini" / "clip.safetensors"
# The stem scales pixels to (x - 127) / 128; mean and std are equivalent for a [0, 1] tensor.
MINI_CFG: dict[str, Any] = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 192, "patch_size": 32, "width": 256, "layers": 6, "head_width": 64, "mlp_ratio": 2},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 6, "mlp_ratio": 2},
    "quick_gelu": True,
    "image_size": 192,
    "mean": (127 / 255,) * 3,
    "std": (128 / 255,) * 3,
}
