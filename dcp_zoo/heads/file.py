"""Reading and writing the folder of a head: `model.safetensors` with the trained tensors, and a
`config.json` that timm can read and that has the hash of these tensors. Nothing here needs a head.

The tensors are the prompts and CMPA under their names in the model, `context` (K, M, Dv) if the head has
stored statistics, and those of its text probe, if it has one: `classifier.weight` and `.means` (C, F),
`.bias` (C,), the scalars `.text_scale`, `.threshold` and `.spread`, the `.gate` (3,), if it has one, and, if
it was given images of no class, `.examples` (M, F') of them with the scalar `.margin`. A head with a layer
of `reset_classifier` also has `fc.weight` (C, F) and `fc.bias` (C,) for its classes; the other tensors are
then for the classes that `config.json` calls `named`. CLIP's are never included.
"""

import json
from collections.abc import Mapping, Set
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from dcp_zoo.errors import ZooError, attempted, shorten, writing_to
from dcp_zoo.fields import Values, check, problems
from dcp_zoo.files import alone_in, check_regular, write_file
from dcp_zoo.heads.config import CONFIG_NAME, WEIGHTS_NAME, HeadConfig, is_checkpoint, read_config, waiting_file
from dcp_zoo.probe.model import PREFIX

IN_FILE = {"stored_stats": "context", PREFIX: "classifier."}  # how names of tensors begin in the model, and in a file
IN_MODEL = {in_file: in_model for in_model, in_file in IN_FILE.items()}
LARGEST = 1e15  # of a trained number: sums of its squares are float32 numbers
SAVE_SECONDS = 60.0  # that a save waits for others in the same folder
# tensors of the text probe that stay in float32, as logits depend on them
EXACT = {f"{PREFIX}{name}" for name in "weight bias text_scale threshold spread margin gate".split()}


def write(
    directory: Path,
    config: Values,
    tensors: Mapping[str, Tensor],
    *,
    overwrite: bool = False,
    known: Set[str] = frozenset(),
) -> str:
    """Write a head as a whole, and return the hash of its weights, which is added to its `config`. At any
    moment the folder has the old head or the new one: new weights wait beside the old ones until
    `config.json` names them, and are read there until they are in their place.

    Args:
        overwrite: whether another head may be replaced; the same one is where weights have had one of the
            hashes `known`, and the classes are the same.
    """
    stored = {renamed(name, IN_FILE): _stored(name, tensor) for name, tensor in tensors.items()}
    check_finite(stored, "Not saved")
    weights = safetensors.save(stored, metadata={"format": "pt"})
    weights_sha256 = sha256(weights).hexdigest()
    config = config | {"weights_sha256": weights_sha256}
    check(directory / CONFIG_NAME, problems(config, HeadConfig), "Not saved.")
    advice = "choose another directory"
    with alone_in(directory, SAVE_SECONDS), writing_to(directory, advice):
        if not overwrite and is_checkpoint(directory):
            _check_same(directory, config, known)
        write_file(waiting_file(directory, weights_sha256), weights, advice)
        write_file(directory / CONFIG_NAME, json.dumps(config, indent=1) + "\n", advice)
        write_file(directory / WEIGHTS_NAME, weights, advice)
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            for leftover in directory.glob(f".*{name}.*"):  # of this process, or one that was killed
                leftover.unlink()
    return weights_sha256


def _check_same(directory: Path, config: Values, known: Set[str]) -> None:
    """ZooError if the folder holds another head, or this one with other classes."""
    existing = attempted(read_config, directory)
    if isinstance(existing, ZooError):
        description = "which cannot be read"
    else:
        names = existing["label_names"]
        is_own = existing["weights_sha256"] in {*known, config["weights_sha256"]}
        if is_own and sorted(names) == sorted(config["label_names"]):
            return
        description = f"of {len(names)} classes ({shorten(names, 3)})"
    advice = "choose another directory, or replace it: model.save_pretrained(directory, overwrite=True)"
    raise ZooError(f"{directory} already holds another head, {description}: {advice}.")


def _stored(name: str, tensor: Tensor) -> Tensor:
    """A tensor as it is stored: in float16 if logits then stay the same, else in float32."""
    is_exact = name.startswith(PREFIX) or torch.equal(tensor.half().float(), tensor.float())
    dtype = torch.float16 if is_exact and name not in EXACT else torch.float32
    return tensor.to("cpu", dtype).contiguous()


def read(directory: str | Path) -> tuple[HeadConfig, dict[str, Tensor]]:
    """The checked `config.json` of a folder and its tensors by their names in the model, in float32.
    ZooError if one is missing or damaged, or not of the other."""
    config = read_config(directory)
    expected = config["weights_sha256"]
    path = Path(directory) / WEIGHTS_NAME
    try:
        content = _waiting_or_saved(directory, expected)
        if sha256(content).hexdigest() != expected:
            problem = f"{path} is damaged, or of another head than {CONFIG_NAME} beside it."
            raise ZooError(f"{problem} Train or download the head again; if another process is saving it, try again.")
        tensors = safetensors.load(content)
    except FileNotFoundError as error:
        raise ZooError(f"{directory} has no {WEIGHTS_NAME}: not a checkpoint, or not fully downloaded.") from error
    except (SafetensorError, OSError) as error:
        raise ZooError(f"{path} is damaged ({error}). Train or download the checkpoint again.") from error
    state = {name: tensor.float() for name, tensor in tensors.items()}
    return config, {renamed(name, IN_MODEL): tensor for name, tensor in state.items()}


def _waiting_or_saved(directory: str | Path, expected: str) -> bytes:
    """The content of the file with the weights: where a save was killed or is going on, of the one that
    waits."""
    try:
        return waiting_file(directory, expected).read_bytes()
    except (OSError, ValueError):  # as usual: there is none
        path = Path(directory) / WEIGHTS_NAME
        check_regular(path)
        return path.read_bytes()


def renamed(name: str, beginnings: Mapping[str, str]) -> str:
    """The name of a tensor with another beginning, if it has one of these."""
    for old, new in beginnings.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def check_finite(state: Mapping[str, Tensor], consequence: str) -> None:
    """Raise ZooError, naming the tensors, if any contains NaN or infinity, or numbers whose products are."""
    bad = sorted(name for name, tensor in state.items() if not (tensor.float().abs() <= LARGEST).all())
    if bad:
        raise ZooError(f"{consequence}: NaN or infinity in {shorten(bad, 4)}, or numbers beyond {LARGEST:g}.")
