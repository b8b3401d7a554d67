"""`dcp-zoo export`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dcp_zoo.cli import options as opt
from dcp_zoo.cli.console import output
from dcp_zoo.cli.evaluate import trained_on
from dcp_zoo.errors import ZooError, check_choice

if TYPE_CHECKING:
    from dcp_zoo.deploy.quantize import Calibration
    from dcp_zoo.model.dcp import DCP


@dataclass(frozen=True)
class ExportOptions:
    """The options of `dcp-zoo export`."""

    head: opt.HeadName
    file: Path | None = opt.option(None, "The file, or for web the folder. Default: named after the head.", "--output")
    format: str | None = opt.option(None, "onnx, torch-export, safetensors or web. Default: by --output, or onnx.")
    classes: opt.Classes = None
    preprocessing: str | None = opt.option(
        None,
        "Of ONNX files: outside (normalised images in, logits out; the default) or inside (RGB in, probabilities out).",
    )
    precision: str | None = opt.option(None, "Of ONNX files: float32, float16 (the default for web) or int8.")
    dataset: str | None = opt.option(None, "For int8: a dataset to calibrate with. Default: the head's own.")
    data_root: opt.DataRoot = None
    max_drop: float = opt.option(1.0, "For int8: points of top-1 that may be lost, or nothing is written.", min=0)


@opt.takes_options
def export(options: ExportOptions) -> None:
    """Export a head to a file, or a web page, that works without this package, and verify it against the model.

    [dim]dcp-zoo export --head dcp_mini.caltech101-16shot --output caltech101.onnx[/]
    [dim]dcp-zoo predict photo.jpg --onnx caltech101.onnx[/]
    [dim]dcp-zoo export --head dcp_mini.caltech101-16shot --format web --output my_page[/]
    [dim]dcp-zoo export --head dcp_mini.caltech101-16shot --precision int8 --data-root DATA[/]
    """
    from dcp_zoo.deploy import export as files
    from dcp_zoo.deploy.web import check_empty, export_web
    from dcp_zoo.zoo.factory import create_model

    name, names = opt.head_name(options.head), opt.class_list(options.classes)
    chosen = export_format(options.file, options.format, {**files.EXPORT_SUFFIXES, "web": ""})
    web = chosen == "web"
    format = "onnx" if web else chosen
    precision = options.precision or ("float16" if web else "float32")
    preprocessing = options.preprocessing or ("inside" if web else "outside")
    files.check_export(format, preprocessing, precision)
    if web and preprocessing == "outside":
        raise ZooError("The page needs the preprocessing inside its file: omit --preprocessing.")
    file = options.file or Path(file_stem(name) + ("-web" if web else files.EXPORT_SUFFIXES[format]))
    opt.check_output(file.parent)
    if web:
        check_empty(file)
    model = create_model(name, True, classnames=names).eval()
    data = calibration_images(model, options) if precision == "int8" else None
    if web:
        path = export_web(model, file, precision=precision, calibration=data, title=Path(options.head).name)
        output.print(f"Wrote {path}, {model.num_classes} classes. Try it: python -m http.server -d {path}")
        return
    path = files.export(model, file, format, preprocessing=preprocessing, precision=precision, calibration=data)
    megabytes = path.stat().st_size / 1e6
    output.print(f"Wrote {path} ({megabytes:.0f} MB, {model.num_classes} classes), verified against the model.")
    if precision == "int8":
        show_int8(path)


def calibration_images(model: "DCP", options: ExportOptions) -> "Calibration":
    """The images for int8: those the head was trained on, or of another dataset with the same classes."""
    from dcp_zoo.data import load_labelled, training_split
    from dcp_zoo.deploy.quantize import calibration

    opt.data_source(None, options.dataset, options.data_root)
    images = load_labelled(options.dataset or trained_on(options.head, model, options.data_root), options.data_root)
    split = training_split(images, model.info.get("test_share"))
    if split.classnames != model.classnames:
        raise ZooError(
            "int8 is calibrated and checked with images of the head's own classes: omit --classes, or pass a --dataset "
            "with the same classes in the same order."
        )
    return calibration(model, split, options.max_drop)


def show_int8(path: Path) -> None:
    from dcp_zoo.deploy.onnx_classifier import OnnxClassifier

    q = OnnxClassifier(path).info["quantization"]
    output.print(
        f"int8 on {q['images']} {q['part']} images: top-1 {q['top1_int8']:.1f} % (float32 {q['top1_float32']:.1f} %), "
        f"{q['same_answer']:.1f} % of the answers are the same, {q['speedup']:.1f} x as fast on this machine.",
        highlight=False,
    )


def export_format(file: Path | None, format: str | None, suffixes: Mapping[str, str]) -> str:
    """The format of an export: --format, otherwise the one of the file's suffix, otherwise onnx."""
    suffix = file.suffix if file else ""
    by_suffix = next((name for name, known in suffixes.items() if suffix and known == suffix), None)
    if format is None:
        if suffix and by_suffix is None:
            valid = ", ".join(filter(None, suffixes.values()))
            raise ZooError(f"No format has the suffix {suffix}: choose {valid}, or pass --format.")
        return by_suffix or "onnx"
    check_choice("format", format, tuple(suffixes))
    if by_suffix not in (None, format):
        raise ZooError(f"--format {format} contradicts {file}, which is named like {by_suffix}: omit one of them.")
    return format


def file_stem(name: str) -> str:
    """The name of a head for a file: that of its folder, of its Hub repo, or its own."""
    kind, _, place = name.partition(":")
    return Path(place).resolve().name if kind == "local-dir" else name.rpartition("/")[2]
