"""A checkpoint of the DCP authors' released code (CMPA), `MultiModalPromptLearner/model.pth.tar-N`, to a
checkpoint folder, see `python hub/convert.py --help`; in Python by `convert_cmpa_checkpoint`.

They are pickles, read with `weights_only=True`: that builds tensors and plain values, and executes nothing.
A file holds the prompts, CMPA, the complete frozen CLIP, and states of optimizer and schedule. CLIP is
compared with the model's, as prompts do not work on another. CMPA's text half, which never reaches the
release's logits, is dropped.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn
from typer import Argument, Option, Typer

from dcp_zoo.backbone._torch import skip_init
from dcp_zoo.cli import main
from dcp_zoo.cli.console import output, progress_bar
from dcp_zoo.cli.options import Command, Device, Overwrite
from dcp_zoo.data import Item
from dcp_zoo.data.find import find_images
from dcp_zoo.data.readers import read_classnames
from dcp_zoo.errors import ZooError
from dcp_zoo.features.device import pick_device
from dcp_zoo.features.extract import FeatureExtractor
from dcp_zoo.features.loader import ImageLoader
from dcp_zoo.features.photos import Photos
from dcp_zoo.fields import Values
from dcp_zoo.heads.config import PHRASE
from dcp_zoo.heads.dcp import DCP
from dcp_zoo.heads.file import check_finite
from dcp_zoo.training.folder import check_free
from dcp_zoo.training.methods.dcp import round_and_store_stats
from dcp_zoo.zoo.factory import create_model

# the release's names -> ours; CLIP's parts are prefixed with their tower
NAMES = {
    r"prompt_learner\.prompts_text": "prompts.text",
    r"prompt_learner\.prompts_visual": "prompts.vision",
    r"encoder\.resblocks\.(\d+)\.prompt_attn\.proj_t2v\.(.+)": r"block.\1.query.\2",
    r"encoder\.resblocks\.(\d+)\.prompt_attn\.ln_pa_(\d)_visual\.(.+)": r"block.\1.norm\2.\3",
    r"encoder\.resblocks\.(\d+)\.prompt_attn\.promt_attention_visual\.(.+)": r"block.\1.attn.\2",
    r"encoder\.resblocks\.(\d+)\.prompt_attn\.mlp_pa_visual\.(.+)": r"block.\1.mlp.\2",
    r"encoder\.resblocks\.(\d+)\.visual_attn\.(.+)": r"visual.transformer.resblocks.\1.\2",
    r"encoder\.resblocks\.(\d+)\.text_attn\.(.+)": r"text.transformer.resblocks.\1.\2",
    r"encoder\.(class_embedding|positional_embedding|proj)_visual": r"visual.\1",
    r"encoder\.(conv1|ln_pre|ln_post)_visual\.(.+)": r"visual.\1.\2",
    r"encoder\.(positional_embedding|text_projection|ln_final\..+)": r"text.\1",
    r"logit_scale": "logit_scale",
    r"prompt_learner\.token_suffix": "token_suffix",
}
DROPPED = r"prompt_learner\.token_prefix|.*\.prompt_attn\.(proj_v2t|ln_pa_\d_text|promt_attention_text|mlp_pa_text)\..+"

# Dassl stores its warm-up schedule with the schedule that follows, an object, and the optimizer in that.
# Empty classes take their place: torch compares names, so that nothing of theirs is called. It fills dicts,
# but no defaultdict.
STAND_INS: list[Any] = [
    type("SGD", (), {"__module__": "torch.optim.sgd"}),
    type("CosineAnnealingLR", (), {"__module__": "torch.optim.lr_scheduler"}),
    type("defaultdict", (), {"__module__": "collections", "__new__": lambda cls, default: {}}),
    dict,
]


def convert_cmpa_checkpoint(
    path: str | Path,
    *,
    classnames: Sequence[str],
    model: str | None = None,
    clip: nn.Module | None = None,
    depth: int = 9,
    pooling: str = "mean",
) -> DCP:
    """A model in eval mode with the weights of a checkpoint of the authors' code,
    `coupling="text_to_vision"`.

    It has no stored statistics: call `model.store_stats(images)` with the images the checkpoint was trained
    on.

    Args:
        path: `model.pth.tar-N`.
        classnames: the classes it was trained for, in label order; they are compared with those in the file.
        model: the zoo's model whose CLIP it was trained on, such as "dcp_vitb16"; its weights are
            downloaded.
        clip: instead of `model`, that CLIP itself.
        depth, pooling: what it was trained with; not stored in the file. The defaults are the release's, as
            is the phrase whose first words up to four prompts start from.

    Raises:
        ZooError: no such checkpoint, a different CLIP or class names, or tensors of another shape or not
            finite.
    """
    if (model is None) == (clip is None):
        raise ZooError('Give either a model, such as model="dcp_vitb16", or a clip.')
    tensors = renamed(read_pickle(path), path)
    # a CMPA that all blocks share is stored under every block
    queries = [tensor for name, tensor in tensors.items() if re.fullmatch(r"block\.\d+\.query\.weight", name)]
    args: Values = {
        "coupling": "text_to_vision",
        "n_ctx": len(tensors["prompts.text"]),
        "depth": depth,
        "pooling": pooling,
        "share_cmpa": all(torch.equal(tensor, queries[0]) for tensor in queries),
        "ctx_init": PHRASE,
    }
    with skip_init():  # all weights are loaded below, none drawn
        if clip is not None:
            dcp = DCP(clip, classnames, **args)
        else:
            dcp = create_model(str(model), "clip", classnames=classnames, **args)
    tensors = {name: tensor.to(dcp.device) for name, tensor in tensors.items()}
    check_clip(dcp, tensors, path)
    check_classes(dcp, tensors, path)
    load_trained(dcp, tensors, path)
    dcp.info = {"converted_from": Path(path).name}
    return dcp.eval()


def read_pickle(path: str | Path) -> dict[str, torch.Tensor]:
    """The `state_dict` in a checkpoint of the release; no code in the file is executed."""
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals(STAND_INS)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ZooError(f"There is no checkpoint {path}. Name a file such as model.pth.tar-20.") from error
    except Exception as error:  # torch raises many types for damaged and for hostile files
        reason = str(error).strip().split("\n")[0]
        raise ZooError(
            f"{path} was not read: it is damaged, or holds something other than tensors, possibly harmful code "
            f"({reason}). Nothing in it was executed. Only checkpoints of tensors and plain values are accepted."
        ) from error
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise ZooError(f"{path} is not a checkpoint of the release: it has no state_dict of tensors.")
    return state


def renamed(state: dict[str, torch.Tensor], path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors under our names, without `DROPPED`; ZooError lists unknown and missing ones."""
    renamed = {}
    unknown = []
    for name, tensor in state.items():
        ours = next((re.sub(old, new, name) for old, new in NAMES.items() if re.fullmatch(old, name)), None)
        if ours is not None:
            renamed[ours] = tensor
        elif not re.fullmatch(DROPPED, name):
            unknown.append(name)
    needed = {"prompts.text": 2, "prompts.vision": 2, "token_suffix": 3}
    missing = [name for name, ndim in needed.items() if name not in renamed or renamed[name].ndim != ndim]
    if unknown or missing:
        problem = f"it has no {', '.join(missing)}" if missing else f"it has unknown tensors {unknown[:4]}"
        raise ZooError(f"{path} is not a checkpoint of the authors' CMPA code: {problem}.")
    return renamed


def check_clip(model: DCP, tensors: dict[str, torch.Tensor], path: str | Path) -> None:
    """Raise ZooError unless the frozen CLIP among `tensors` is the model's, up to float16."""
    clip = model.encoder
    own = {f"visual.{name}": p for name, p in clip.visual.named_parameters()} | {"logit_scale": clip.clip.logit_scale}
    for name, p in clip.text.named_parameters():
        if not name.startswith(("visual.", "token_embedding.", "logit_")):
            own[f"text.{name}"] = p
    found = {name: t for name, t in tensors.items() if name.startswith(("visual.", "text.", "logit_scale"))}
    other = sorted(name for name in own.keys() | found.keys() if not _agree(own.get(name), found.get(name)))
    if other:
        problem = f"The CLIP in {path} is not the model's: {len(other)} of {len(own)} tensors differ, first {other[0]}."
        raise ZooError(f"{problem} Prompts work only on the CLIP they were trained on: pass that one.")


def _agree(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether two tensors are equal up to rounding to float16."""
    if a is None or b is None or a.shape != b.shape:
        return False
    return torch.allclose(a.detach().float(), b.float(), rtol=1e-3, atol=1e-6)


def check_classes(model: DCP, tensors: dict[str, torch.Tensor], path: str | Path) -> None:
    """Raise ZooError unless the class names match the token embeddings in the file."""
    suffix = tensors["token_suffix"]  # (C, 77 - 1 - M, Dt): name, full stop, end token, padding
    if len(suffix) != model.num_classes:
        raise ZooError(f"{path} was trained for {len(suffix)} classes, but {model.num_classes} class names are given.")
    ids = model.encoder.tokenize([model.template.format(name.replace("_", " ")) for name in model.classnames])
    for name, row, expected in zip(model.classnames, ids, suffix, strict=True):
        embedded = model.encoder.text.token_embedding(row[1 : 1 + len(expected)])
        if not _agree(embedded, expected):
            raise ZooError(f"{path} was trained for another class in place of {name!r}: pass its class names in order.")


def load_trained(model: DCP, tensors: dict[str, torch.Tensor], path: str | Path) -> None:
    """Load the trained tensors into the model: the prompts, and the CMPA before each coupled block."""
    state = {name: tensors[name] for name in ("prompts.text", "prompts.vision")}
    for k in range(len(model.cmpa)):
        prefix = f"block.{k + 1}."  # module k acts before block k + 1
        found = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        state |= {f"cmpa.{k}.to_vision.{name}": t for name, t in found.items()}
    state = {name: t.float() for name, t in state.items()}
    check_finite(state, f"{path} is damaged")
    model.load_trained(state, path)  # the frozen CLIP is compared, not loaded


app = Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.command(cls=Command)
def convert(
    path: Annotated[Path, Argument(metavar="FILE", help="A file model.pth.tar-N of the authors' code (CMPA).")],
    output_dir: Annotated[Path, Option("--output", help="Folder for the new checkpoint; created if needed.")],
    model: Annotated[str, Option(help="The model whose CLIP it was trained on, such as dcp_vitb16.")],
    classnames: Annotated[Path, Option(help="Names in label order: one per line, `wnid name` lines or a JSON list.")],
    images: Annotated[
        Path | None, Option(help="Folder of the training images, for the stored prompt statistics.")
    ] = None,
    depth: Annotated[int, Option(help="Coupled blocks it was trained with; not stored in the file.")] = 9,
    pooling: Annotated[str, Option(help="Pooling it was trained with: mean, max or first.")] = "mean",
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Convert a checkpoint of the DCP authors' released code (CMPA). No code in the file is executed.

    [dim]python hub/convert.py model.pth.tar-20 --model dcp_vitb16 --classnames names.txt --output my_head[/]
    """
    check_free(output_dir, overwrite)
    names = read_classnames(classnames)
    dcp = convert_cmpa_checkpoint(path, classnames=names, model=model, depth=depth, pooling=pooling)
    dcp.to(pick_device(device))
    if images is not None:
        items = [Item(image, image, 0) for image in find_images([str(images)])]
        round_and_store_stats(dcp, ImageLoader(Photos(items), FeatureExtractor(dcp.encoder, progress=progress_bar)))
    dcp.save_pretrained(output_dir, overwrite=overwrite)
    hint = "" if images else " It has no stored statistics: logits depend on the batch. Pass --images to store them."
    output.print(f"Saved in {output_dir}.{hint}")


if __name__ == "__main__":
    main(app)
