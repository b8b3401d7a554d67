"""A head on disk: `model.safetensors` with the trained tensors, and a `config.json` that timm can read.

The tensors are the prompts and CMPA under their names in the model, `context` (K, M, Dv) if the head has stored
statistics, and those of its classifier stage, if it has one, as `classifier.weight` (C, E), `classifier.bias` (C,),
`classifier.mean_weight` (E,), the upper triangle of `classifier.precision` (E (E + 1) / 2,), and the scalars
`classifier.mean_bias`, `.alpha`, `.temperature` and `.threshold`. CLIP's weights are never included. Loading is strict:
exactly the model's tensors, with their shapes.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dcp_zoo.errors import ZooError, cannot_write
from dcp_zoo.files import write_atomically
from dcp_zoo.model.classifier import PREFIX, GaussianClassifier, from_upper_triangle, upper_triangle
from dcp_zoo.model.config import CONFIG_NAME, WEIGHTS_NAME
from dcp_zoo.model.config_file import FORMAT_VERSION, PLAIN_VERSION, read_config
from dcp_zoo.model.names import NAME, sentences_of

if TYPE_CHECKING:
    from dcp_zoo.model.dcp import DCP
    from dcp_zoo.model.linear_head import LinearHead

STATS_TENSOR = "context"  # the stored statistics
PRECISION = f"{PREFIX}precision"  # the only tensor that a file holds in another form
ORIGIN = ("tag", "file", "hf_hub_id", "source", "license")  # of the head from which a model was loaded


def head_state(model: "DCP | LinearHead") -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint: what the method trained, DCP's stored statistics if there is one, and the
    classifier stage if there is one, with the rows of the model's classes."""
    state = model.head_state()
    stats: torch.Tensor | None = getattr(model, "stored_stats", None)
    if stats is not None:
        state[STATS_TENSOR] = stats
    if model.stage is not None:
        state |= model.stage.tensors(model.classnames)
    return state


def head_config(model: "DCP | LinearHead", info: dict[str, Any]) -> dict[str, Any]:
    """The `config.json` of a model. What timm reads is outside the `dcp` block; `info` (dataset, shots, seed, recipe,
    metrics, ...) is inside, and the descriptions of the classes, if there are any. Nothing is stored twice."""
    omitted = (*ORIGIN, "architecture", "num_classes", "label_names")
    texts: Any = model.descriptions if model.config else model.template
    described = bool(texts) and not isinstance(texts, str)
    if described:
        texts = sentences_of(model.classnames, texts)
    return {
        "architecture": model.architecture,
        "num_classes": model.num_classes,
        "pretrained_cfg": {k: v for k, v in model.pretrained_cfg.items() if k not in omitted},
        "model_args": {} if model.config is None else model.config.as_dict(),
        "label_names": model.classnames,
        "dcp": {
            "format_version": FORMAT_VERSION if described else PLAIN_VERSION,
            "clip": model.clip_source,
            **info,
            **({"descriptions": texts} if model.config and described else {}),
            **({} if model.config else {"method": model.method, "template": texts}),
            "versions": library_versions(),
        },
    }


def library_versions() -> dict[str, str]:
    """Versions of the libraries that affect results."""
    return {name: version(name) for name in ("torch", "timm", "open_clip_torch")}


def save_pretrained(
    model: "DCP | LinearHead", directory: str | Path, dtype: torch.dtype = torch.float16, **info: Any
) -> Path:
    """Write the head to `directory`, each file atomically.

    Args:
        directory: created if needed; files with the same names are replaced.
        dtype: of DCP's tensors. Those of classifiers stay in float32: scores are small differences of large numbers.
        **info: values for the `dcp` block of config.json, such as dataset, shots, seed, recipe, metrics. Default: those
            the model was loaded with.

    Returns:
        The directory.

    Raises:
        ZooError: a trained tensor is not finite, or the directory is not writable.
    """
    directory = Path(directory)
    state = {
        name: t.to("cpu", torch.float32 if model.config is None or name.startswith(PREFIX) else dtype).contiguous()
        for name, t in head_state(model).items()
    }
    if PRECISION in state:
        state[PRECISION] = upper_triangle(state[PRECISION])
    check_finite(state, "Not saved")
    config = json.dumps(head_config(model, info or model.info), indent=1)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / WEIGHTS_NAME, lambda path: save_file(state, path, metadata={"format": "pt"}))
        write_atomically(directory / CONFIG_NAME, lambda path: Path(path).write_text(config + "\n"))
    except (OSError, SafetensorError) as error:
        raise cannot_write(directory, error, "choose another directory") from error
    return directory


def load_head(model: "DCP", directory: str | Path) -> "DCP":
    """Load the trained tensors of a checkpoint directory into a model of the same architecture, strictly; and its
    descriptions of the classes, if it has some and the model was given none.

    Raises:
        ZooError: a missing or damaged file, or tensors that are missing, unknown, of another shape or not finite.
    """
    shapes = tensor_shapes(directory)  # nothing large is read before it is known to fit
    stage = empty_stage(directory, shapes, model)
    expected = model.head_state()
    if STATS_TENSOR in shapes:
        vision = model.prompts["vision"]
        expected[STATS_TENSOR] = vision.new_empty(model.num_coupled, *vision.shape)
    check_shapes(shapes, expected | (stage.tensors() if stage else {}), Path(directory) / WEIGHTS_NAME, model)
    state = read_tensors(directory)
    if STATS_TENSOR in state:
        state["stored_stats"] = state.pop(STATS_TENSOR)
    given, stored = getattr(model, "descriptions", None), read_config(directory)["dcp"].get("descriptions")
    if stored and given is None:
        model.set_classnames(model.classnames, stored)
    model.classifier = stage
    model.load_state_dict(state, strict=False)  # the frozen CLIP is not included; names are checked above
    model.rely_on_texts(given or stored or NAME, stored or NAME)
    return model


def tensor_shapes(directory: str | Path) -> dict[str, torch.Tensor]:
    """Empty tensors with the names and shapes of a checkpoint's; ZooError if the file is missing or damaged."""
    with _opened(directory) as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return _unpacked({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})


def read_tensors(directory: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name, in float32; ZooError if the file is missing or damaged."""
    with _opened(directory) as file:
        state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    check_finite(state, f"{Path(directory) / WEIGHTS_NAME} is damaged")
    return _unpacked(state)


def _unpacked(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return state | ({PRECISION: from_upper_triangle(state[PRECISION])} if PRECISION in state else {})


@contextmanager
def _opened(directory: str | Path) -> Iterator[Any]:
    path = Path(directory) / WEIGHTS_NAME
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise ZooError(f"{directory} has no {WEIGHTS_NAME}: not a checkpoint, or not fully downloaded.") from error
    except (SafetensorError, OSError) as error:
        raise ZooError(f"{path} is damaged ({error}). Train or download the checkpoint again.") from error


def empty_stage(directory: str | Path, state: dict[str, torch.Tensor], model: Any) -> GaussianClassifier | None:
    """The classifier stage to load the tensors of a checkpoint into, if it has one."""
    if not any(name.startswith(PREFIX) for name in state):
        return None
    return GaussianClassifier(read_config(directory)["label_names"], model.num_features).to(model.device)


def check_shapes(
    state: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], path: str | Path, model: Any
) -> None:
    """Raise ZooError, naming the tensors, unless a file's tensors have exactly the names and shapes of the model's."""
    found, expected = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (state, wanted))
    wrong = [
        f"{n} {found[n]} instead of {expected[n]}" for n in sorted(found.keys() & expected) if found[n] != expected[n]
    ]
    problems = {
        "missing": sorted(expected.keys() - found),
        "not expected": sorted(found.keys() - expected),
        "of another shape": wrong,
    }
    options = f" with {', '.join(f'{k}={v!r}' for k, v in model.config.as_dict().items())}" if model.config else ""
    listed = [f"{what}: {_shorten(names)}" for what, names in problems.items() if names]
    if listed:
        raise ZooError(
            f"{path} does not fit {model.architecture}{options}. Tensors {'; '.join(listed)}. Create the model the "
            "checkpoint was trained with."
        )


def _shorten(names: list[str], n: int = 4) -> str:
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def check_finite(state: dict[str, torch.Tensor], consequence: str) -> None:
    """Raise ZooError, naming the tensors, if any contains NaN or infinity."""
    bad = sorted(name for name, t in state.items() if not t.isfinite().all())
    if bad:
        raise ZooError(f"{consequence}: NaN or infinity in {_shorten(bad)}.")
