"""A head on disk: `model.safetensors` with what trained, and `config.json` that timm can read.

CLIP's weights are never in it. Loading is strict: exactly the tensors that the model has, with their shapes.
"""

import json
from collections.abc import Iterable
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dcp_zoo.errors import ZooError
from dcp_zoo.files import write_atomically
from dcp_zoo.model.config import CONFIG_NAME, WEIGHTS_NAME, DCPConfig

if TYPE_CHECKING:
    from dcp_zoo.model.dcp import DCP

FORMAT_VERSION = 2
OPTIONS = tuple(part.name for part in fields(DCPConfig))
CONFIG_TYPES: dict[str, type] = {
    "architecture": str,
    "label_names": list,
    "pretrained_cfg": dict,
    "model_args": dict,
    "dcp": dict,
}
DCP_TYPES: dict[str, type] = {"format_version": int, "clip": str}
OPTION_TYPES: dict[str, type] = {"n_ctx": int, "depth": int, "fusing": str, "shared": bool, "coupling": str}
ORIGIN = ("tag", "file", "hf_hub_id", "source", "license")  # of the head that a model was loaded with


def head_state(model: "DCP") -> dict[str, torch.Tensor]:
    """What a checkpoint holds: every trainable tensor, and the calibrated context if there is one."""
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return state if model.calibrated is None else state | {"context": model.calibrated}


def head_config(model: "DCP", info: dict[str, Any]) -> dict[str, Any]:
    """The `config.json` of a model, format 2: each thing once, what timm reads outside of the `dcp` block, which
    `info` (dataset, shots, seed, recipe, metrics, ...) joins."""
    left_out = (*ORIGIN, "architecture", "num_classes", "label_names")
    return {
        "architecture": model.architecture,
        "num_classes": model.num_classes,
        "pretrained_cfg": {k: v for k, v in model.pretrained_cfg.items() if k not in left_out},
        "model_args": model.config.as_dict(),
        "label_names": model.classnames,
        "dcp": {"format_version": FORMAT_VERSION, "clip": model.clip_source, **info, "versions": library_versions()},
    }


def library_versions() -> dict[str, str]:
    """Versions of the libraries that figures depend on."""
    return {name: version(name) for name in ("torch", "timm", "open_clip_torch")}


def save_pretrained(model: "DCP", directory: str | Path, dtype: torch.dtype = torch.float16, **info: Any) -> Path:
    """Write the head into `directory`, each file atomically.

    Args:
        directory: made if needed; files of the same names are replaced.
        dtype: of the stored tensors.
        **info: facts for the `dcp` block of config.json, such as dataset, shots, seed, recipe, metrics. Default:
            what the model was loaded with.

    Returns:
        The directory.

    Raises:
        ZooError: a trained tensor that is not finite, or a directory that cannot be written.
    """
    directory = Path(directory)
    state = {name: t.to("cpu", dtype).contiguous() for name, t in head_state(model).items()}
    check_finite(state, "Not saved")
    config = json.dumps(head_config(model, info or model.info), indent=1)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / WEIGHTS_NAME, lambda path: save_file(state, path, metadata={"format": "pt"}))
        write_atomically(directory / CONFIG_NAME, lambda path: Path(path).write_text(config + "\n"))
    except (OSError, SafetensorError) as error:
        raise ZooError(f"Cannot write the checkpoint into {directory}: {error}. Choose another directory.") from error
    return directory


def read_config(directory: str | Path) -> dict[str, Any]:
    """The checked `config.json` of a checkpoint directory.

    Raises:
        ZooError: no such file, no JSON, not a DCP checkpoint, or one of a newer format.
    """
    path = Path(directory) / CONFIG_NAME
    if not path.is_file():
        raise ZooError(f"{directory} is not a checkpoint: it has no {CONFIG_NAME}. Name a folder that training wrote.")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ZooError(f"{path} is damaged: it is not JSON ({error}). Train or download it again.") from error
    config = _upgraded(config)
    wrong = _wrong_parts(config, CONFIG_TYPES)
    wrong = wrong or _wrong_parts(config["dcp"], DCP_TYPES) + _wrong_parts(config["model_args"], OPTION_TYPES)
    if not wrong and not (config["label_names"] and all(isinstance(name, str) for name in config["label_names"])):
        wrong = ["label_names"]
    if wrong:
        raise ZooError(
            f"{path} is damaged or not a DCP checkpoint's: {', '.join(wrong)} missing or of a wrong type. "
            "Train or download it again."
        )
    if config["dcp"]["format_version"] > FORMAT_VERSION:
        raise ZooError(
            f"{path} has format {config['dcp']['format_version']}, newer than this dcp_zoo reads: upgrade dcp_zoo."
        )
    return config


def _upgraded(config: Any) -> Any:
    """Format 1, which had the model's options in the `dcp` block and in its recipe too, as format 2."""
    facts = config.get("dcp") if isinstance(config, dict) else None
    if not isinstance(facts, dict) or facts.get("format_version") != 1:
        return config
    recipe: dict[str, Any] = facts["recipe"] if isinstance(facts.get("recipe"), dict) else {}
    options = {name: facts[name] for name in OPTIONS if name in facts} | {"ctx_init": recipe.get("ctx_init")}
    facts = {name: value for name, value in facts.items() if name not in OPTIONS} | {"format_version": FORMAT_VERSION}
    if recipe:
        facts["recipe"] = {name: value for name, value in recipe.items() if name not in OPTIONS}
    return config | {"model_args": options, "dcp": facts}


def _wrong_parts(facts: Any, types: dict[str, type]) -> list[str]:
    """The names in `types` that `facts` lacks or has as another type (True is no int here)."""
    return [name for name, kind in types.items() if not isinstance(facts, dict) or type(facts.get(name)) is not kind]


def load_head(model: "DCP", directory: str | Path) -> "DCP":
    """Load the trained tensors of a checkpoint directory into a model of the same architecture, strictly.

    Raises:
        ZooError: no or a damaged file, tensors that are missing, unknown, of another shape or not finite.
    """
    path = Path(directory) / WEIGHTS_NAME
    expected = {name: tuple(t.shape) for name, t in head_state(model).items()}
    context = (model.num_coupled, *model.prompts["vision"].shape)
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            check_shapes(found, expected | ({"context": context} if "context" in found else {}), path, model)
            state = {name: file.get_tensor(name).float() for name in found}
    except FileNotFoundError as error:
        raise ZooError(f"{directory} has no {WEIGHTS_NAME}: not a checkpoint, or not fully downloaded.") from error
    except (SafetensorError, OSError) as error:
        raise ZooError(f"{path} is damaged ({error}). Train or download the checkpoint again.") from error
    check_finite(state, f"{path} is damaged")
    if "context" in state:
        state["calibrated"] = state.pop("context")
    model.load_state_dict(state, strict=False)  # the frozen CLIP is not in it; names were checked above
    return model


def check_shapes(
    found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], path: str | Path, model: "DCP"
) -> None:
    """Raise ZooError, naming the tensors, unless those of a file have exactly the names and shapes of the model's."""
    wrong = [
        f"{n} {found[n]} instead of {expected[n]}" for n in sorted(found.keys() & expected) if found[n] != expected[n]
    ]
    problems = {
        "missing": sorted(expected.keys() - found),
        "not expected": sorted(found.keys() - expected),
        "of another shape": wrong,
    }
    config = model.config
    said = [f"{what}: {_some(names)}" for what, names in problems.items() if names]
    if said:
        raise ZooError(
            f"{path} does not fit {model.architecture} with coupling={config.coupling!r}, n_ctx={config.n_ctx}, "
            f"shared={config.shared}. Tensors {'; '.join(said)}. Create the model that the checkpoint was trained with."
        )


def _some(names: list[str], n: int = 4) -> str:
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def check_finite(state: dict[str, torch.Tensor], consequence: str) -> None:
    """Raise ZooError, naming the tensors, if any holds NaN or infinity."""
    bad: Iterable[str] = sorted(name for name, t in state.items() if not t.isfinite().all())
    if bad:
        raise ZooError(f"{consequence}: NaN or infinity in {_some(list(bad))}.")
