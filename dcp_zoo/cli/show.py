"""`dcp-zoo list` and `dcp-zoo info`."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.markup import escape
from rich.table import Table
from typer import Argument, Option

from dcp_zoo.backbone import MINI_WEIGHTS
from dcp_zoo.cli.console import output, plain_table, rejection_note
from dcp_zoo.cli.options import AsJson, as_text
from dcp_zoo.data import DATASETS
from dcp_zoo.errors import ZooError, shorten
from dcp_zoo.fields import Values
from dcp_zoo.heads.config import CONFIG_NAME, accuracy_text, alone_and_probed, read_config, weights_file
from dcp_zoo.promises import trust_note
from dcp_zoo.tables import quoted
from dcp_zoo.training.recipes import default_recipe
from dcp_zoo.zoo import registry
from dcp_zoo.zoo.resolve import local_heads, parse_name, trained_here
from dcp_zoo.zoo.specs import MODELS, SIZES, ModelSpec, get_spec

PEOPLE = (  # what they ask of a model or a head: what it is, how good, of what and when
    "head,status,method,model,CLIP,weights,CLIP weights,classes,texts,accuracy,dataset,images,trained,rejection,trust,"
    "licence,size,input,parameters,image tower,zero-shot,default head,trained heads,Hub repo,train it"
).split(",")


def list_(
    filter: str = Argument("", metavar="FILTER", help="Wildcard, such as 'dcp_vitb16*' or '*-16shot'."),
    hub: bool = Option(False, "--hub", help="Search the Hub for heads of all owners instead."),
) -> None:
    """List the models, the heads that can be loaded, and the number of planned heads.

    Heads are bundled, published on the Hub, or local: planned ones that were trained in this folder. A
    filter with a dot lists planned ones, too.

    [dim]dcp-zoo list 'dcp_mini*'[/]
    [dim]dcp-zoo list 'dcp_vitb16.dtd*'[/]
    [dim]dcp-zoo list '*flowers*' --hub[/]
    """
    if hub:
        list_found(filter)
        return
    known = registry.known_heads()
    for head in local_heads():
        metrics = read_config(head.name)["dcp"].get("metrics", {})
        known[head.name] = replace(head, status="local", metrics=metrics)
    found = [known[name] for name in registry.matching(known, filter)]
    models = {*registry.list_models(filter), *(head.model for head in found)}
    if not models:
        raise ZooError(f"No model or head matches {filter!r}. All: dcp-zoo list.")
    show_models([spec for spec in MODELS.values() if spec.name in models])
    planned = [head for head in found if head.status == "planned"]
    show_heads([head for head in found if "." in filter or head.status != "planned"])
    if planned:
        output.print(
            f"{len(planned):,} heads are planned and not trained yet. How to train one: dcp-zoo info {planned[0].name}",
            style="dim",
            markup=False,
        )


def show_models(specs: Sequence[ModelSpec]) -> None:
    """Print a table of models."""
    rows = [(spec.name, spec.license or "see Hub", spec.download or "bundled", *spec.accuracies) for spec in specs]
    output.print(plain_table(("model", "licence", "size", "10 sets", "ImageNet"), rows))
    sizes = ", ".join(f"--model {size} is {name}" for size, name in SIZES.items())
    output.print(
        "10 sets, ImageNet: zero-shot top-1 in percent, as published by others; not measured here. The mean over "
        "ten of the paper's 11 datasets, and ImageNet alone; empty without a published figure. In this release "
        f"{sizes}.",
        "",
        style="dim",
    )


def show_heads(heads: Sequence[registry.HeadEntry]) -> None:
    """Print a table of heads, if there are any."""
    if not heads:
        return
    rows = []
    for head in heads:
        top1 = ["" if value is None else f"{value:5.1f} %" for value in alone_and_probed(head.metrics)]
        rows.append((head.name, head.status, *top1))
    output.print(plain_table(("head", "status", "method alone", "with text probe"), rows))
    notes = dict.fromkeys(DATASETS[head.dataset].part_note for head in heads if head.dataset in DATASETS)
    output.print(
        "Top-1 on the test images: of the method alone, and of the head as it is loaded, with the text probe "
        "that this package adds.",
        *filter(None, notes),
        "",
        sep="\n",
        style="dim",
    )


def list_found(filter: str) -> None:
    """Print the heads of all owners that the Hub's search finds."""
    rows = []
    for found in registry.list_heads(filter, hub=True):
        top1 = "" if found.top1 is None else f"{found.top1:.1f} %"
        rows.append([found.owner, found.head, found.dataset, top1, found.commit])
    if not rows:
        raise ZooError(f"The Hub's search finds no head that matches {filter or '*'}. All: dcp-zoo list --hub.")
    output.print(plain_table(("owner", "head", "dataset", "claimed top-1", "commit"), rows))
    note = "Owners describe their heads: nothing of this was checked. Load one: --head hf-hub:OWNER/HEAD@COMMIT."
    output.print(note, style="dim", markup=False)


def info(
    name: str = Argument(metavar="NAME", help="A model, head, checkpoint, hf-hub:ORG/REPO or open_clip:ARCH/TAG."),
    as_json: AsJson = False,
) -> None:
    """Show what a model or a head is, how good, of what and when. All details, such as the recipe: --json.

    [dim]dcp-zoo info dcp_vitb16.imagenet-16shot[/]
    [dim]dcp-zoo info my_head[/]
    """
    details = describe(name)
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
    """The details of a model, head or checkpoint by its name."""
    kind, place, tag = parse_name(name)
    if kind == "local-dir":
        return describe_checkpoint(place, Path(place))
    if kind == "hf-hub":
        from dcp_zoo.hub import download_file

        return describe_checkpoint(name, download_file(place, CONFIG_NAME, tag or None).parent)
    if kind == "open_clip":
        return describe_model(get_spec(name))
    if tag in ("", registry.CLIP_TAG):
        return describe_model(get_spec(place))
    head = registry.get_head(f"{place}.{tag}")
    folder = trained_here(head)
    if folder:
        return describe_checkpoint(head.name, folder)
    if head.status == "planned":
        head = registry.known_heads().get(head.name, head)
    return describe_head(head)


def describe_checkpoint(name: str, folder: Path) -> Values:
    config = read_config(folder)
    info = config["dcp"]
    omitted = ("format_version", "clip", "head", "recipe", "image_hashes")
    facts = {key: value for key, value in info.items() if key not in omitted and value not in (None, "")}
    texts = info["texts"]
    if isinstance(texts, dict):
        facts["texts"] = f"{sum(map(len, texts.values()))} sentences"
    if "labels" in info:
        facts["labels"] = dict(info["labels"])
    weights = weights_file(folder)
    return {
        "head": name,
        "model": config["architecture"],
        "CLIP weights": info["clip"],
        "size": f"{weights.stat().st_size / 1e6:.1f} MB" if weights.exists() else "not downloaded",
        "classes": config["label_names"],
        **facts,
        "recipe": config["model_args"] | dict(info.get("recipe", {})),
    }


def describe_model(spec: ModelSpec) -> Values:
    if spec.clip:
        clip = f"open_clip {spec.clip}"
        weights = f"{spec.clip_pretrained} ({spec.clip_repo or spec.clip})"
        size = spec.download and f"{spec.download} in float32"  # its file may be smaller
    else:
        clip = "miniature, for trying things out"
        weights = "bundled"
        size = f"{MINI_WEIGHTS.stat().st_size / 1e6:.0f} MB on disk"
    measures = zip(spec.accuracies, ("mean of ten datasets", "ImageNet"), strict=True)
    published = [f"{percent} % ({what})" for percent, what in measures if percent]
    return {
        "model": spec.name,
        "CLIP": clip,
        "weights": weights,
        "size": size,
        "licence": spec.license or f"see {spec.clip_repo or 'its source'}",
        "input": f"{spec.image_size} x {spec.image_size} px",
        "parameters": spec.parameters and f"{spec.parameters} million",
        "image tower": spec.gflops and f"{spec.gflops:.0f} GFLOPs per image",
        "zero-shot": published and f"{', '.join(published)}, published: {spec.accuracy_source}",
        "default head": spec.default_tag,
        "recipe": default_recipe(spec.name).as_dict(),
        "trained heads": registry.list_pretrained(spec.name, f"*.{registry.CLIP_TAG}"),
    }


def describe_head(head: registry.HeadEntry) -> Values:
    details: Values = {"status": head.status, "licence": head.license, "train it": head.train_command}
    if head.status == "bundled":
        return describe_checkpoint(head.name, head.bundled_dir) | details
    repo_id, revision, _ = head.place
    details |= {
        "head": head.name,
        "dataset": head.dataset,
        "shots": head.shots,
        "seed": head.seed,
        "size": f"about {get_spec(head.model).head_mb:.0f} MB",
        "Hub repo": repo_id,
        "revision": revision,
        "metrics": head.metrics,
    }
    spec = DATASETS.get(head.dataset)  # a later release may have more
    if spec:
        details["recipe"] = default_recipe(head.model, head.dataset).as_dict()
        if head.metrics and spec.counts:
            details["test_images"] = spec.counts[2]
    return details


def for_people(details: Values) -> Values:
    """The details by names in `PEOPLE`, in its order."""
    shown = details | {
        "accuracy": accuracy_text(details),
        "rejection": rejection_note(details),
        "trust": trust_note(details),
    }
    dataset = DATASETS.get(str(details.get("dataset")))
    if dataset and dataset.part_note:
        shown["dataset"] = dataset.part_note
    class_images = details.get("class_images")
    if class_images:
        shown["dataset"] = "your own images"
        shown["images"] = shorten([f"{count} of {quoted(name)}" for name, count in class_images.items()])
        if "groups" in details:
            shown["images"] += f", in {details['groups']:,} groups that were taken together"
    elif "shots" in details:
        shown["images"] = f"{details['shots']} per class"
    return {name: shown[name] for name in PEOPLE if shown.get(name)}
