"""`dcp-zoo predict`."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from dcp_zoo.cli.console import errors, output
from dcp_zoo.cli.options import Context, Device, class_list, head_name
from dcp_zoo.data import load_image
from dcp_zoo.errors import ZooError

if TYPE_CHECKING:
    from dcp_zoo.model.dcp import DCP

MINIATURE_NOTE = "dcp_mini is a miniature for trying things out: expect mistakes that CLIP itself would not make."


def predict(
    images: Annotated[list[str] | None, typer.Argument(help="Image files.")] = None,
    head: Annotated[
        str, typer.Option(help="A head (dcp_vitb16.imagenet-16shot), local-dir:FOLDER or hf-hub:ORG/REPO.")
    ] = "dcp_mini.caltech101-16shot",
    classes: Annotated[str | None, typer.Option(help="Other class names, with commas between them.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Answers per image.")] = 5,
    sample: Annotated[bool, typer.Option("--sample", help="Use the two photographs of scikit-learn.")] = False,
    context: Context = None,
    device: Device = "auto",
    onnx: Annotated[
        Path | None, typer.Option(help="A file of `dcp-zoo export`, run by ONNX Runtime; takes the place of --head.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Classify images.

    [dim]dcp-zoo predict --sample[/]
    [dim]dcp-zoo predict cat.jpg dog.jpg --classes "cat,dog,tea cup"[/]
    """
    paths = [*(images or []), *(sample_images() if sample else [])]
    if not paths:
        raise ZooError("Name at least one image file, or pass --sample for two photographs.")
    for folder in filter(os.path.isdir, paths):
        raise ZooError(f"{folder} is a folder: name its images, as in {Path(folder) / '*.jpg'}.")
    if onnx:
        if classes or context:
            raise ZooError("Classes and context are fixed in an exported file: export it again with --classes instead.")
        from dcp_zoo.deploy.onnx_classifier import OnnxClassifier

        exported = OnnxClassifier(onnx)
        architecture = exported.info["model"]
        results = {path: exported.classify(load_image(path), top_k) for path in paths}
    else:
        from dcp_zoo.training.loop import pick_device
        from dcp_zoo.zoo.factory import create_model

        model = (
            create_model(head_name(head), True, classnames=class_list(classes), context=context)
            .eval()
            .to(pick_device(device))
        )
        architecture = model.architecture
        results = {path: classify(model, path, top_k) for path in paths}
    if as_json:
        print(json.dumps([{"image": p, "predictions": r} for p, r in results.items()], indent=1))
        return
    for path, result in results.items():
        table = Table("class", "probability", title=Path(path).name, title_justify="left")
        for row in result:
            bar = "█" * round(20 * row["probability"])
            table.add_row(row["class"], f"{100 * row['probability']:5.1f} %  {bar}")
        output.print(table)
    if architecture == "dcp_mini":
        errors.print(MINIATURE_NOTE, style="dim", highlight=False)


def classify(model: "DCP", path: str, top_k: int) -> list[dict]:
    """The `top_k` classes of one image with their probabilities, best first."""
    import torch

    from dcp_zoo.zoo.factory import create_transform

    image = create_transform(model)(load_image(path))[None].to(model.device)
    with torch.inference_mode():
        values, indices = model(image).softmax(-1)[0].topk(min(top_k, model.num_classes))
    pairs = zip(indices.tolist(), values.tolist(), strict=True)
    return [{"class": model.classnames[i], "probability": round(p, 4)} for i, p in pairs]


def sample_images() -> list[str]:
    """Two real photographs that are on every machine with scikit-learn: a pagoda-roofed hall and a flower."""
    import sklearn.datasets

    folder = Path(sklearn.datasets.__file__).parent / "images"
    return [str(folder / "china.jpg"), str(folder / "flower.jpg")]
