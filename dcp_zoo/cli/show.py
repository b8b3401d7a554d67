"""`dcp-zoo list` and `dcp-zoo info`."""

import fnmatch
import json
from dataclasses import replace
from pathlib import Path

from rich.markup import escape
from rich.table import Table
from typer import Argument

from dcp_zoo.backbone import MINI_WEIGHTS
from dcp_zoo.cli.console import output, plain_table, rejection_note
from dcp_zoo.cli.options import AsJson, as_text, head_name
from dcp_zoo.data import DATASETS
from dcp_zoo.data.splits import shorten
from dcp_zoo.errors import ZooError, nearest_hint
from dcp_zoo.fields import Values
from dcp_zoo.heads.config import CONFIG_NAME, WEIGHTS_NAME, Accuracy, alone_and_probed, is_checkpoint, read_config
from dcp_zoo.tables import quoted
from dcp_zoo.training.recipes import default_recipe
from dcp_zoo.zoo import registry
from dcp_zoo.zoo.registry import MODELS, SIZES, HeadEntry, ModelSpec, all_heads, get_head, get_spec
from dcp_zoo.zoo.resolve import local_heads, parse_name, trained_here

PEOPLE = (  # what they ask of a model or a head: what it is, how good, of what and when
    "head,status,method,model,CLIP,weights,CLIP weights,classes,texts,accuracy,dataset,images,trained,rejection,"
    "licence,size,input,parameters,image tower,zero-shot,default head,trained heads,Hub repo,train it"
).split(",")
ACCURACY_NOTE = (
    "10 sets, ImageNet: zero-shot top-1 in percent, as published by others; not measured here. The mean over ten of "
    "the paper's 11 datasets, and ImageNet alone; empty without a published figure. In this release "
    f"{', '.join(f'--model {size} is {name}' for size, name in SIZES.items())}."
)

HEADS_NOTE = (
    "Top-1 on the test images: of the method alone, and of the head as it is loaded, with the text probe that this "
    "package adds."
)


def list_(
    filter: str = Argument("", metavar="FILTER", help="Wildcard, such as 'dcp_vitb16*' or '*-16shot'."),
) -> None:
    """List the models, the heads that can be loaded, and the number of planned heads.

    Heads are bundled, published on the Hub, or local: planned ones that were trained in this folder.

    [dim]dcp-zoo list 'dcp_mini*'[/]
    """
    not_trained = [name for name in registry.list_heads(filter, "planned") if not is_checkpoint(name)]
    heads = [registry.loadable_heads()[name] for name in registry.list_pretrained(filter)]
    for name in fnmatch.filter(local_heads(), filter or "*"):
        metrics = read_config(name)["dcp"].get("metrics", {})
        heads.append(replace(get_head(name), status="local", metrics=metrics))
    shown = {*registry.list_models(filter), *(head.model for head in heads)}
    shown |= {name.split(".")[0] for name in not_trained}
    if not shown:
        hint = nearest_hint(filter.strip("*"), [*MODELS, *all_heads()])
        raise ZooError(f"No model or head matches {filter!r}.{hint} All: dcp-zoo list.")
    specs = [spec for spec in MODELS.values() if spec.name in shown]
    models = [(s.name, s.license or "see Hub", s.download or "bundled", *s.accuracies) for s in specs]
    output.print(plain_table(("model", "licence", "size", "10 sets", "ImageNet"), models))
    output.print(ACCURACY_NOTE, "", style="dim")
    if heads:
        order, rows = list(MODELS), []
        for head in sorted(heads, key=lambda head: (order.index(head.model), head.dataset, head.shots, head.seed)):
            top1 = ("" if value is None else f"{value:5.1f} %" for value in alone_and_probed(head.metrics))
            rows.append((head.name, head.status, *top1))
        output.print(plain_table(("head", "status", "method alone", "with text probe"), rows))
        notes = dict.fromkeys(DATASETS[head.dataset].part_note for head in heads if head.dataset in DATASETS)
        output.print(HEADS_NOTE, *[note for note in notes if note], "", sep="\n", style="dim")
    if not_trained:
        shots = sorted({all_heads()[name].shots for name in not_trained})
        text = f"{len(not_trained):,} heads for {', '.join(map(str, shots))} images per class are planned"
        text += f" and not trained yet. How to train one: dcp-zoo info {not_trained[0]}"
        output.print(text, style="dim", markup=False)


def info(
    name: str = Argument(metavar="NAME", help="A model, head, checkpoint, hf-hub:ORG/REPO or open_clip:ARCH/TAG."),
    as_json: AsJson = False,
) -> None:
    """Show what a model or a head is, how good, of what and when. All details, such as the recipe: --json.

    [dim]dcp-zoo info dcp_vitb16.imagenet-16shot[/]
    [dim]dcp-zoo info my_head[/]
    """
    details = describe(head_name(name))
    if as_json:
        print(json.dumps(details, indent=1))
        return
    table = Table(show_header=False, title=name)
    for key, value in for_people(details).items():
        text = str(value)
        if isinstance(value, list):
            text = f"{len(value)}: {shorten([quoted(as_text(part)) for part in value])}"
        table.add_row(key, escape(text))
    output.print(table)
    output.print(f"The recipe and all else: dcp-zoo info {name} --json", style="dim", markup=False, soft_wrap=True)


def describe(name: str) -> Values:
    kind, place, tag = parse_name(name)
    if kind == "local-dir":
        return describe_checkpoint(place, Path(place))
    if kind == "hf-hub":
        from dcp_zoo.hub import download_file

        return describe_checkpoint(name, download_file(place, CONFIG_NAME, tag or None, None).parent)
    if kind == "zoo" and tag:
        head = get_head(f"{place}.{tag}")
        folder = trained_here(head)
        return describe_checkpoint(name, folder) if folder else describe_head(registry.newest(head))
    return describe_model(get_spec(name))


def describe_checkpoint(name: str, folder: Path) -> Values:
    config = read_config(folder)
    block, omitted = config["dcp"], ("format_version", "clip", "head", "recipe", "image_hashes")
    facts = {key: value for key, value in block.items() if key not in omitted and value not in (None, "")}
    if isinstance(texts := block["texts"], dict):
        facts["texts"] = f"{sum(map(len, texts.values()))} sentences"
    if "labels" in block:
        facts["labels"] = dict(block["labels"])
    weights = folder / WEIGHTS_NAME
    return {
        "head": name,
        "model": config["architecture"],
        "CLIP weights": block["clip"],
        "size": f"{weights.stat().st_size / 1e6:.1f} MB" if weights.exists() else "not downloaded",
        "classes": config["label_names"],
        **facts,
        "recipe": config["model_args"] | dict(block.get("recipe", {})),
    }


def describe_model(spec: ModelSpec) -> Values:
    clip, weights = "miniature, for trying things out", "bundled"
    size = f"{MINI_WEIGHTS.stat().st_size / 1e6:.0f} MB on disk"
    if spec.clip:
        clip, weights = f"open_clip {spec.clip}", f"{spec.clip_pretrained} ({spec.clip_repo or spec.clip})"
        size = spec.download and f"{spec.download} in float32"  # its file may be smaller
    page = f"https://huggingface.co/{spec.clip_repo}" if spec.clip_repo else "its source"
    accuracies = zip(spec.accuracies, ("mean of ten datasets", "ImageNet"), strict=True)
    published = ", ".join(f"{value} % ({what})" for value, what in accuracies if value)
    details = {
        "model": spec.name,
        "CLIP": clip,
        "weights": weights,
        "licence": spec.license or f"see {page}",
        "size": size,
        "input": f"{spec.image_size} x {spec.image_size} px",
        "parameters": f"{spec.parameters} million" if spec.parameters else "",
        "image tower": f"{spec.gflops:.0f} GFLOPs per image" if spec.gflops else "",
        "zero-shot": f"{published}, published: {spec.accuracy_source}" if published else "no published figure",
        "default head": spec.default_tag,
        "recipe": default_recipe(spec.name).as_dict(),
        "trained heads": ", ".join(registry.list_pretrained(f"{spec.name}.*")) or "none yet",
    }
    return {name: value for name, value in details.items() if value != ""}


def describe_head(head: HeadEntry) -> Values:
    details = {
        "status": head.status,
        "licence": head.license or "none yet: not trained",
        "train it": head.train_command,
    }
    if head.status == "bundled":
        return describe_checkpoint(head.name, head.bundled_dir) | details
    spec = DATASETS.get(head.dataset)  # a later release may have more
    return {
        "head": head.name,
        "dataset": head.dataset,
        "shots": head.shots,
        "seed": head.seed,
        "size": f"about {get_spec(head.model).head_mb:.0f} MB",
        "Hub repo": head.repo_id,
        "revision": head.pin[0] or "not pinned: not published yet",
        "metrics": head.metrics or "none: not measured",
        **({"test_images": spec.counts[2]} if head.metrics and spec and spec.counts else {}),
        **({"recipe": default_recipe(head.model, head.dataset).as_dict()} if spec else {}),
        **details,
    }


def for_people(details: Values) -> Values:
    """The details by names in `PEOPLE`, in its order."""
    images, metrics, per_class = (details.get(name) for name in ("test_images", "metrics", "class_images"))
    shown = details | {"accuracy": metrics, "rejection": rejection_note(details)}
    if isinstance(metrics, dict):
        top1 = metrics.get("top1_stored", next(iter(metrics.values())))
        independent = details.get("independent_images")
        accuracy = str(Accuracy("", round(top1 * images / 100), images, independent)) if images else f"{top1:.1f} %"
        alone, probed = alone_and_probed(metrics)
        shown["accuracy"] = accuracy + (f" with the text probe; {alone:.1f} % without" if probed else "")
    spec = DATASETS.get(str(details.get("dataset")))
    if spec and spec.part_note:
        shown["dataset"] = spec.part_note
    if per_class:
        counts = shorten([f"{count} of {quoted(name)}" for name, count in per_class.items()])
        groups = f", in {details['groups']:,} groups that were taken together" if "groups" in details else ""
        shown |= {"images": counts + groups, "dataset": "your own images"}
    elif "shots" in details:
        shown["images"] = f"{details['shots']} per class"
    return {name: shown[name] for name in PEOPLE if shown.get(name)}
