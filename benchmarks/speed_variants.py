"""The variants compared by `speed.py`: the method as in its release, this package's implementations, and CLIP alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

INFERENCE = ("plain", "unfused", "fused", "encode_image", "onnxruntime")
TRAINING = ("plain", "ours", "ours-bfloat16", "ours-low-memory")
FILES = {
    "fused": "fused.pt",
    "onnxruntime": "fused.onnx",
    "encode_image": "visual.pt",
}


class Case(NamedTuple):
    task: str  # "inference" or "training"
    model: str
    classes: int
    batches: tuple[int, ...]  # ascending, as a process's peak memory is that of its largest batch so far
    variants: tuple[str, ...]


def build_model(case: Case) -> Any:
    """The same random model in every process."""
    import open_clip
    import torch

    from dcp_zoo import create_model
    from dcp_zoo.data import classnames
    from dcp_zoo.zoo.registry import get_spec

    torch.manual_seed(0)
    names = classnames("imagenet") if case.classes == 1000 else classnames("caltech101")[: case.classes]
    config = open_clip.get_model_config(get_spec(case.model).clip or "") or {"text_cfg": {}}
    tokenizer = letters if "hf_tokenizer_name" in config["text_cfg"] else None  # its own must be downloaded
    return create_model(case.model, classnames=names, tokenizer=tokenizer).eval()


def letters(texts: list[str], context_length: int = 64) -> Any:
    """A tokenizer whose tokens are letters, the first of a text: some towers have little room."""
    import torch

    rows = [[2 + ord(letter) % 1000 for letter in text[:8]] for text in texts]
    return torch.tensor([row + [1] * (context_length - len(row)) for row in rows])


def make_images(case: Case, batch: int) -> Any:
    """(batch, 3, H, W): one random image repeated, so that the context is the same for every batch size."""
    import torch

    from dcp_zoo import get_pretrained_cfg

    size = get_pretrained_cfg(case.model)["input_size"]
    return torch.randn(1, *size, generator=torch.Generator().manual_seed(1)).repeat(batch, 1, 1, 1)


def prepare(case: Case, folder: Path) -> None:
    """Write the files of the deployed variants. The model is calibrated on the images, so that all contexts agree."""
    import torch

    from dcp_zoo.onnx.export import export

    model = build_model(case)
    model.store_stats(make_images(case, 1))
    fused = model.fuse()
    torch.save(fused, folder / FILES["fused"])
    torch.save(model.encoder.visual, folder / FILES["encode_image"])
    if "onnxruntime" in case.variants:
        export(fused, folder / FILES["onnxruntime"])


ANY = "0" * 40  # the revision of a repo that is not pinned


def cache_clip(cache: Path, name: str) -> None:
    """Write random weights of this CLIP model to a cache like that of the Hub's client."""
    from safetensors.torch import save_file

    from dcp_zoo import create_model
    from dcp_zoo.zoo.registry import get_spec

    weights = create_model(name).encoder.clip.state_dict()
    spec = get_spec(name)
    file = snapshot(cache, spec.clip_repo, spec.clip_revision or ANY) / "open_clip_model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file)


def snapshot(cache: Path, repo_id: str, revision: str = ANY) -> Path:
    """Create the folder of a repo's only revision in a cache of the Hub's client."""
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    folder = repo / "snapshots" / revision
    folder.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(revision)
    return folder


Call = Callable[[Any], Any]  # images -> logits or features


def inference(case: Case, variant: str, folder: Path) -> Call:
    import reference
    import torch

    from dcp_zoo.prediction.onnx import OnnxClassifier

    if variant in ("fused", "encode_image"):
        return torch.load(folder / FILES[variant], weights_only=False, mmap=True).eval()
    if variant == "onnxruntime":
        session = OnnxClassifier(folder / FILES[variant], threads=torch.get_num_threads())
        return lambda images: torch.from_numpy(session(images.numpy()))
    model = build_model(case)
    if variant == "plain":
        return lambda images: reference.forward(model, images)
    model.store_stats(make_images(case, 1))
    return model


def training(case: Case, variant: str, folder: Path) -> Call:
    """A complete training step with a learning rate of 0: the same work, and all variants keep equal weights."""
    import reference
    import torch
    from torch.nn import functional as F

    from dcp_zoo.training.device import autocast, cast_frozen

    model = build_model(case).train()
    model.set_grad_checkpointing(variant == "ours-low-memory")
    precision = "bfloat16" if variant == "ours-bfloat16" else "float32"
    cast_frozen(model, precision)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.0, momentum=0.9)

    def step(images: Any) -> Any:
        with autocast(torch.device("cpu"), precision):
            logits = reference.forward(model, images) if variant == "plain" else model(images)
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), torch.arange(len(images)) % case.classes).backward()
        optimizer.step()
        return logits.detach()

    return step
