"""A head on disk: `model.safetensors` with the trained tensors, and a `config.json` that timm can read, and that names
these tensors by their hash.

The tensors are the prompts and CMPA under their names in the model, `context` (K, M, Dv) if the head has stored
statistics, and those of its text probe, if it has one: `classifier.weight` and `.means` (C, F), `.bias` (C,), the
scalars `.text_scale`, `.threshold` and `.spread`, the `.gate` (3,), if it has one, and, if it was given images of no
class, `.examples` (M, F') of them with the scalar `.margin`. A head with a layer of `reset_classifier` also has
`fc.weight` (C, F) and `fc.bias` (C,) for its classes; the other tensors are then for the classes that `config.json`
calls `named`. CLIP's are never included.
"""

import json
from collections.abc import Mapping
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from dcp_zoo.backbone.classes import NO_CLASSES, sentences_of
from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.errors import ZooError, shorten, warn, writing_to
from dcp_zoo.fields import Values, check, problems
from dcp_zoo.files import alone_in, check_regular, write_file
from dcp_zoo.heads.config import ACCEPTED, CONFIG_NAME, FORMAT_VERSION, WEIGHTS_NAME, HeadConfig, HeadInfo, read_config
from dcp_zoo.probe.model import PREFIX

if TYPE_CHECKING:
    from dcp_zoo.heads.head import Head

H = TypeVar("H", bound="Head")
FILE_PREFIX = "classifier."  # of the text probe's tensors in a file
IN_FILE = {"stored_stats": "context", PREFIX: FILE_PREFIX}  # how names of tensors begin in the model and in a file
IN_MODEL = {in_file: in_model for in_model, in_file in IN_FILE.items()}
LARGEST = 1e15  # of a trained number: sums of its squares are float32 numbers
SAVE_SECONDS = 60.0  # that a save waits for others in the same folder
MEASURED = ("metrics", "test_images", "independent_images", "balanced_top1", "refused")  # what `info` says of the test
# of the text probe, which stay in float32, as logits depend on them
EXACT = {f"{PREFIX}{name}" for name in "weight bias text_scale threshold spread margin gate".split()}


def save(head: "Head", directory: Path, dtype: torch.dtype | None, info: Values) -> Path:
    """See `Head.save_pretrained`. Each of the two files is replaced as a whole."""
    if not head.classes:
        raise ZooError(NO_CLASSES)
    state = {
        _renamed(name, IN_FILE): tensor.to("cpu", _stored(name, tensor, dtype)).contiguous()
        for name, tensor in head.to_state().items()
    }
    check_finite(state, "Not saved")
    weights, advice = safetensors.save(state, metadata={"format": "pt"}), "choose another directory"
    config = head_config(head, info) | {"weights_sha256": sha256(weights).hexdigest()}
    check(directory / CONFIG_NAME, problems(config, HeadConfig), "Not saved.")
    with alone_in(directory, SAVE_SECONDS), writing_to(directory, advice):
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            for left in directory.glob(f".{name}.*"):  # by a process that was killed
                left.unlink()
        write_file(directory / WEIGHTS_NAME, weights, advice)
        write_file(directory / CONFIG_NAME, json.dumps(config, indent=1) + "\n", advice)
    return directory


def _stored(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """In what a tensor is stored: as asked for, or in float16 if logits then stay the same, else in float32."""
    if name in EXACT:
        return torch.float32
    same = name.startswith(PREFIX) or torch.equal(tensor.half().float(), tensor.float())
    return dtype or (torch.float16 if same else torch.float32)


def head_config(head: "Head", info: Values) -> Values:
    """The `config.json`: outside the `dcp` block what timm reads, inside `info`. Nothing is stored twice."""
    if head.cannot_reject and (fitted := info.get("text_probe")):  # its thresholds no longer hold
        kept = {name: value for name, value in fitted.items() if name not in ("thresholds", *ACCEPTED)}
        info = info | {"text_probe": kept}
    (options, block), texts = head.method_config(), head.texts
    read_beside = head.image_encoders if head.text_probe is not None else ()
    reads = [[*reading.parts] for reading in head.reads]
    encoders = [{"name": each.source, "fingerprint": each.fingerprint()} for each in read_beside]
    return {
        "architecture": head.encoder.architecture,
        "num_classes": head.num_classes,
        "pretrained_cfg": head.encoder.pretrained_cfg,
        "model_args": options,
        "label_names": head.classes,
        "dcp": {
            "format_version": FORMAT_VERSION,
            "clip": head.encoder.source,
            **({"clip_fingerprint": fingerprint} if (fingerprint := head.frozen.fingerprint()) else {}),
            "method": head.method,
            "abilities": head.abilities.as_dict(),
            **({"encoders": encoders} if encoders else {}),
            **({} if head.text_probe is None else {"reads": reads}),
            **info,
            **block,
            "texts": sentences_of(head.named, texts) if isinstance(texts, Mapping) else texts,
            **({} if head.fc is None else {"named": head.named}),
            "versions": library_versions(),
        },
    }


def load_head(head: H, directory: str | Path) -> H:
    """Load the trained tensors of a checkpoint directory into a head of the same architecture, strictly, and what it
    says of how it was made. ZooError for a missing or damaged file, tensors that do not fit, or another CLIP than it
    was trained on; the head then stays as it was."""
    config = read_config(directory)
    return load(head, directory, config, read_tensors(directory, config["weights_sha256"]))


def load(head: H, directory: str | Path, config: HeadConfig, state: dict[str, Tensor]) -> H:
    """`load_head` of what has been read there."""
    check_fits(head, state, Path(directory) / WEIGHTS_NAME, config)
    check_clip(head.frozen, config["dcp"], directory)
    head.from_state(state, config)
    return head


def check_clip(clip: FrozenCLIP, block: HeadInfo, directory: str | Path) -> None:
    """ZooError if the weights of this CLIP are not those that a head was trained on; a warning where nobody knows."""
    before, now, weights = block.get("clip_fingerprint"), clip.fingerprint(), f"the {clip.source!r} weights of CLIP"
    if not before or not now:
        problem = f"Whether {weights} are those that the head in {directory} was trained on is unknown"
        warn(f"{problem}: CLIP was not loaded in float32, here or there.")
    elif before != now:
        raise ZooError(
            f"The head in {directory} was trained on other weights than these: its CLIP has the fingerprint {before}, "
            f"and {weights} here, of {clip.architecture}, have {now}. Load CLIP as it was, from the same revision of "
            "its Hub repo or the same file (a damaged download: hf cache rm), or train the head again."
        )


def check_fits(head: "Head", state: Mapping[str, Tensor], path: str | Path, config: HeadConfig | None = None) -> None:
    """Raise ZooError, naming the tensors, unless those of a file are exactly this head's, with this `config.json`."""
    given, expected = (
        {_renamed(name, IN_FILE): tuple(t.shape) for name, t in tensors.items()}
        for tensors in (state, head.expected_state(state, config))
    )
    common = sorted(given.keys() & expected)
    problems = {
        "missing": sorted(expected.keys() - given),
        "not expected": sorted(given.keys() - expected),
        "of another shape": [f"{n} {given[n]} instead of {expected[n]}" for n in common if given[n] != expected[n]],
    }
    if listed := [f"{what}: {shorten(names, 4)}" for what, names in problems.items() if names]:
        options = ", ".join(f"{name}={value!r}" for name, value in head.method_config()[0].items())
        model = f"{head.encoder.architecture} with {options}" if options else head.encoder.architecture
        problem = f"{path} does not fit {model}. Tensors {'; '.join(listed)}"
        raise ZooError(f"{problem}. Create the one it was trained with.")


def library_versions() -> dict[str, str]:
    """Versions of the libraries that affect results."""
    return {name: version(name) for name in ("torch", "timm", "open_clip_torch")}


def read_tensors(directory: str | Path, expected: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, in float32; ZooError if the file is missing or damaged, or does not have the
    hash that its `config.json` names."""
    path = Path(directory) / WEIGHTS_NAME
    try:
        check_regular(path)
        content = path.read_bytes()  # once: another process may replace the file
        if sha256(content).hexdigest() != expected:
            problem = f"{path} is damaged, or of another head than {CONFIG_NAME} beside it."
            raise ZooError(f"{problem} Train or download the head again; if another process is saving it, try again.")
        state = {name: t.float() for name, t in safetensors.load(content).items()}
    except FileNotFoundError as error:
        raise ZooError(f"{directory} has no {WEIGHTS_NAME}: not a checkpoint, or not fully downloaded.") from error
    except (SafetensorError, OSError) as error:
        raise ZooError(f"{path} is damaged ({error}). Train or download the checkpoint again.") from error
    state.pop(f"{FILE_PREFIX}evidence", None)  # which nothing read, in heads of earlier versions
    check_finite(state, f"{path} is damaged")
    name = f"{FILE_PREFIX}text_scale"
    if (scale := state.get(name)) is not None and not (scale >= 0).all():
        raise ZooError(f"{path} is damaged: {name} is {scale.min():g}, but must be at least 0.")
    return {_renamed(name, IN_MODEL): t for name, t in state.items()}


def _renamed(name: str, beginnings: Mapping[str, str]) -> str:
    """A tensor's name in a file or in the model, by `IN_FILE` or `IN_MODEL`."""
    for here, there in beginnings.items():
        if name.startswith(here):
            return there + name.removeprefix(here)
    return name


def check_finite(state: Mapping[str, Tensor], consequence: str) -> None:
    """Raise ZooError, naming the tensors, if any contains NaN or infinity, or numbers whose products are."""
    limits = {f"{FILE_PREFIX}threshold": torch.finfo(torch.float32).max}  # which may reject nothing
    bad = sorted(name for name, t in state.items() if not (t.float().abs() <= limits.get(name, LARGEST)).all())
    if bad:
        raise ZooError(f"{consequence}: NaN or infinity in {shorten(bad, 4)}, or numbers beyond {LARGEST:g}.")
