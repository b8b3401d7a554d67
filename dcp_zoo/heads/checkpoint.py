"""A head on disk: `model.safetensors` with the trained tensors, and a `config.json` that timm can read, and that names
these tensors by their hash: one head replaces another at the moment when its `config.json` does.

The tensors are the prompts and CMPA under their names in the model, `context` (K, M, Dv) if the head has stored
statistics, and those of its text probe, if it has one: `classifier.weight` and `.means` (C, F), `.bias` (C,),
`.evidence` (K,), the scalars `.text_scale`, `.threshold` and `.spread`, and, if it was given images of no class,
`.examples` (M, F') of them with the scalar `.margin`. A head with a layer of `reset_classifier` also has `fc.weight`
(C, F) and `fc.bias` (C,) for its classes; the other tensors are then for the classes that `config.json` calls `named`.
CLIP's are never included.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors
from torch import Tensor

from dcp_zoo.backbone.classes import NO_CLASSES, names_of, read_of, saved_texts
from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.errors import ZooError, shorten, warn, writing_to
from dcp_zoo.fields import Values, check, problems
from dcp_zoo.files import check_regular, write_file
from dcp_zoo.heads.config import (
    ACCEPTED,
    CONFIG_NAME,
    FORMAT_VERSION,
    NEW_WEIGHTS,
    WEIGHTS_NAME,
    HeadConfig,
    HeadInfo,
    alone_in,
    read_config,
    settle,
)
from dcp_zoo.probe.model import PREFIX

if TYPE_CHECKING:
    from dcp_zoo.heads.head import Head

H = TypeVar("H", bound="Head")
FILE_PREFIX = "classifier."  # of the text probe's tensors in a file
IN_FILE = {"stored_stats": "context", PREFIX: FILE_PREFIX}  # how names of tensors begin in the model and in a file
IN_MODEL = {stored: own for own, stored in IN_FILE.items()}
LARGEST = 1e15  # of a trained number: sums of its squares are float32 numbers
SAVE_SECONDS = 60.0  # that a save waits for others in the same folder
MEASURED = ("metrics", "test_images", "balanced_top1")  # what `info` says of the test
# of the text probe, which stay in float32, as logits depend on them
EXACT = {f"{PREFIX}{name}" for name in ("weight", "bias", "evidence", "text_scale", "threshold", "spread", "margin")}


def save(head: "Head", directory: Path, dtype: torch.dtype | None, info: Values) -> Path:
    """See `Head.save_pretrained`."""
    if not head.classes:
        raise ZooError(NO_CLASSES)
    state = {name: tensor.to("cpu", _stored(name, tensor, dtype)) for name, tensor in head.to_state().items()}
    return write(directory, state, head_config(head, _valid(head, info)))


def _stored(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """In what a tensor is stored: as asked for, or in float16 if logits then stay the same, else in float32."""
    if name in EXACT:
        return torch.float32
    same = name.startswith(PREFIX) or torch.equal(tensor.half().float(), tensor.float())
    return dtype or (torch.float16 if same else torch.float32)


def _valid(head: "Head", info: Values) -> Values:
    """`info` without thresholds that no longer hold, and without why there was no accuracy before there was one."""
    if head.cannot_reject and "thresholds" in (fitted := info.get("text_probe", {})):
        measured = ("thresholds", *ACCEPTED)
        info = info | {"text_probe": {name: value for name, value in fitted.items() if name not in measured}}
    return {name: value for name, value in info.items() if name != "not_measured" or not info.get("metrics")}


def note_class(info: Values, names: Sequence[str], at: int, new: str = "") -> None:
    """Change what `info` says of the class at this position: its name is `new`, or it is no class any more."""
    for key in ("class_images", "labels"):  # the labels, of a `FewShotClassifier`, are pairs, whose names may repeat
        stored = info.get(key) or {}
        pairs = [*(stored.items() if isinstance(stored, dict) else stored)]
        known = [name for name, _ in pairs]
        if known == names or names.count(names[at]) == known.count(names[at]) == 1:  # else it is not known which one
            i = at if known == names else known.index(names[at])
            pairs[i : i + 1] = [[new, pairs[i][1]]] if new else []
            info[key] = dict(pairs) if isinstance(stored, dict) else pairs


def head_config(head: "Head", info: Values) -> Values:
    """The `config.json`: outside the `dcp` block what timm reads, inside `info`. Nothing is stored twice."""
    options, block = head.method_config()
    names, named, read = names_of(head.classes), names_of(head.named), read_of(head.named)
    read_beside = head.image_encoders if head.text_probe is not None else ()
    encoders = [{"name": each.source, "fingerprint": each.fingerprint()} for each in read_beside]
    return {
        "architecture": head.encoder.architecture,
        "num_classes": len(names),
        "pretrained_cfg": head.encoder.pretrained_cfg,
        "model_args": options,
        "label_names": names,
        "dcp": {
            "format_version": FORMAT_VERSION,
            "clip": head.encoder.source,
            **({"clip_fingerprint": fingerprint} if (fingerprint := head.frozen.fingerprint()) else {}),
            "method": head.method,
            "abilities": head.abilities.as_dict(),
            **({"encoders": encoders} if encoders else {}),
            **info,
            **block,
            "texts": saved_texts(read, head.texts),
            **({} if read == named else {"read": read}),
            **({} if head.fc is None else {"named": named}),
            "versions": library_versions(),
        },
    }


def load_head(head: H, directory: str | Path, config: HeadConfig | None = None) -> H:
    """Load the trained tensors of a checkpoint directory into a head of the same architecture, strictly, and what it
    says of how it was made. `config` is its `config.json`, if it has been read. ZooError for a missing or damaged file,
    tensors that do not fit, or another CLIP than it was trained on; the head then stays as it was."""
    config = config or read_config(directory)
    # nothing large is read before it is known to fit
    check_fits(head, tensor_shapes(directory), Path(directory) / WEIGHTS_NAME, config)
    check_clip(head.frozen, config["dcp"], directory)
    head.from_state(read_tensors(directory, config["weights_sha256"]), config)
    return head


def check_clip(clip: FrozenCLIP, block: HeadInfo, directory: str | Path) -> None:
    """ZooError if the weights of this CLIP are not those that a head was trained on; a warning where nobody knows."""
    before, now, weights = block.get("clip_fingerprint"), clip.fingerprint(), f"the {clip.source!r} weights of CLIP"
    if not before or not now:
        unknown = "the head is older than fingerprints of CLIP" if now else "this CLIP was not loaded in float32"
        advice = f"Save the head again to store it: head.save_pretrained({str(directory)!r})."
        text = f"Whether {weights} are those that the head in {directory} was trained on is unknown: {unknown}."
        warn(f"{text} {advice if now else ''}".rstrip())
    elif before != now:
        raise ZooError(
            f"The head in {directory} was trained on other weights than these: its CLIP has the fingerprint {before}, "
            f"and {weights} here, of {clip.architecture}, have {now}. Load CLIP as it was, from the same revision of "
            "its Hub repo or the same file (a damaged download: hf cache rm), or train the head again."
        )


def check_fits(head: "Head", shapes: Mapping[str, Tensor], path: str | Path, config: HeadConfig | None = None) -> None:
    """Raise ZooError, naming the tensors, unless those of a file are exactly this head's, with this `config.json`."""
    options = ", ".join(f"{name}={value!r}" for name, value in head.method_config()[0].items())
    model = f"{head.encoder.architecture} with {options}" if options else head.encoder.architecture
    check_shapes(shapes, head.expected_state(shapes, config), path, model)


def library_versions() -> dict[str, str]:
    """Versions of the libraries that affect results."""
    return {name: version(name) for name in ("torch", "timm", "open_clip_torch")}


def write(directory: Path, state: Mapping[str, Tensor], config: Values) -> Path:
    """Write both files, see `Head.save_pretrained`. A process that is killed leaves the old head or the new one."""
    stored = {_renamed(name, IN_FILE): t.contiguous() for name, t in state.items()}
    check_finite(stored, "Not saved")
    weights, advice = safetensors.save(stored, metadata={"format": "pt"}), "choose another directory"
    config = config | {"weights_sha256": sha256(weights).hexdigest()}
    check(directory / CONFIG_NAME, problems(config, HeadConfig), "Not saved.")
    with alone_in(directory, SAVE_SECONDS), writing_to(directory, advice):
        for name in (NEW_WEIGHTS, CONFIG_NAME):
            for left in directory.glob(f".{name}.*"):  # by a process that was killed
                left.unlink()
        try:
            write_file(directory / NEW_WEIGHTS, weights, advice)
            if (directory / WEIGHTS_NAME).exists():
                shutil.copymode(directory / WEIGHTS_NAME, directory / NEW_WEIGHTS)
            write_file(directory / CONFIG_NAME, json.dumps(config, indent=1) + "\n", advice)
        finally:
            settle(directory)
    return directory


def tensor_shapes(directory: str | Path) -> dict[str, Tensor]:
    """Empty tensors with the names and shapes of a checkpoint's; ZooError if the file is missing or damaged."""
    with _weights(directory) as path, safe_open(path, framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return {_renamed(name, IN_MODEL): torch.empty(shape, device="meta") for name, shape in shapes.items()}


def read_tensors(directory: str | Path, expected: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, in float32; ZooError if the file is missing or damaged, or does not have the
    hash that its `config.json` names."""
    with _weights(directory) as path:
        content = path.read_bytes()  # once: another process may replace the file
        if sha256(content).hexdigest() != expected:
            problem = f"{path} is damaged, or of another head than {CONFIG_NAME} beside it."
            raise ZooError(f"{problem} Train or download the head again; if another process is saving it, try again.")
        state = {name: t.float() for name, t in safetensors.load(content).items()}
    damaged = f"{path} is damaged"
    check_finite(state, damaged)
    name = f"{FILE_PREFIX}text_scale"
    if (scale := state.get(name)) is not None and not (scale >= 0).all():
        raise ZooError(f"{damaged}: {name} is {scale.min():g}, but must be at least 0.")
    return {_renamed(name, IN_MODEL): t for name, t in state.items()}


def _renamed(name: str, beginnings: Mapping[str, str]) -> str:
    """A tensor's name in a file or in the model, by `IN_FILE` or `IN_MODEL`."""
    own = next((beginning for beginning in beginnings if name.startswith(beginning)), "")
    return beginnings.get(own, "") + name.removeprefix(own)


@contextmanager
def _weights(directory: str | Path) -> Iterator[Path]:
    path = Path(directory) / WEIGHTS_NAME
    try:
        check_regular(path)
        yield path
    except FileNotFoundError as error:
        raise ZooError(f"{directory} has no {WEIGHTS_NAME}: not a checkpoint, or not fully downloaded.") from error
    except (SafetensorError, OSError) as error:
        raise ZooError(f"{path} is damaged ({error}). Train or download the checkpoint again.") from error


def check_shapes(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: str | Path, model: str) -> None:
    """ZooError, naming tensors and model, unless a file's tensors have exactly the names and shapes of the model's."""
    found, expected = (
        {_renamed(name, IN_FILE): tuple(t.shape) for name, t in tensors.items()} for tensors in (state, wanted)
    )
    common = sorted(found.keys() & expected)
    wrong = [f"{name} {found[name]} instead of {expected[name]}" for name in common if found[name] != expected[name]]
    problems = {
        "missing": sorted(expected.keys() - found),
        "not expected": sorted(found.keys() - expected),
        "of another shape": wrong,
    }
    listed = [f"{what}: {shorten(names, 4)}" for what, names in problems.items() if names]
    if listed:
        raise ZooError(f"{path} does not fit {model}. Tensors {'; '.join(listed)}. Create the one it was trained with.")


def check_finite(state: Mapping[str, Tensor], consequence: str) -> None:
    """Raise ZooError, naming the tensors, if any contains NaN or infinity, or numbers whose products are."""
    limits = {f"{FILE_PREFIX}threshold": torch.finfo(torch.float32).max}  # which may reject nothing
    bad = sorted(name for name, t in state.items() if not (t.float().abs() <= limits.get(name, LARGEST)).all())
    if bad:
        raise ZooError(f"{consequence}: NaN or infinity in {shorten(bad, 4)}, or numbers beyond {LARGEST:g}.")
