"""`dcp-zoo list` and `dcp-zoo info`."""

import fnmatch
import json
import time
from dataclasses import replace
from pathlib import Path

from rich.markup import escape
from rich.table import Table
from typer import Argument, Option

from dcp_zoo.backbone import MINI_WEIGHTS
from dcp_zoo.cli.console import advise, log, output, plain_table, rejection_note
from dcp_zoo.cli.options import AsJson, as_text, head_name
from dcp_zoo.data import DATASETS, find_spec, load_image
from dcp_zoo.data.packaged import SAMPLE_CLASSES, sample_images
from dcp_zoo.data.splits import shorten
from dcp_zoo.errors import ZooError, nearest_hint
from dcp_zoo.fields import Values
from dcp_zoo.files import format_duration
from dcp_zoo.heads.config import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Accuracy,
    alone_and_probed,
    is_checkpoint,
    made,
    read_config,
)
from dcp_zoo.tables import quoted
from dcp_zoo.threads import available_cores
from dcp_zoo.training.recipes import default_recipe
from dcp_zoo.zoo import registry
from dcp_zoo.zoo.registry import (
    MODELS,
    OPEN_LICENSES,
    SIZES,
    HeadEntry,
    ModelSpec,
    all_heads,
    frontier,
    get_head,
    get_spec,
)
from dcp_zoo.zoo.resolve import local_heads, parse_name, trained_here

PEOPLE = (  # what they ask of a model or a head: what it is, how good, of what and when
    "head,status,method,model,CLIP,weights,CLIP weights,classes,texts,accuracy,dataset,images,trained,rejection,"
    "licence,size,input,parameters,image tower,zero-shot,default head,trained heads,Hub repo,train it"
).split(",")
ACCURACIES = ("10 sets", "ImageNet")
ENOUGH = 4  # of the six sample photographs: guesses among their twelve names are as many once in 1,600 times
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
    recommend: bool = Option(
        False, "--recommend", help="Compare models to choose one for your own images, and encoders to read beside it."
    ),
) -> None:
    """List the models, the heads that can be loaded, and the number of planned heads.

    Heads are bundled, published on the Hub, or local: planned ones that were trained in this folder.

    [dim]dcp-zoo list 'dcp_mini*'[/]
    [dim]dcp-zoo list --recommend[/]
    """
    if recommend:
        if filter:
            raise ZooError("--recommend compares models: omit FILTER.")
        show_recommended()
        return
    not_trained = [name for name in registry.list_heads(filter, "planned") if not is_checkpoint(name)]
    heads = [all_heads()[name] for name in registry.list_models(filter, pretrained=True)]
    heads += [replace(get_head(name), status="local") for name in fnmatch.filter(local_heads(), filter or "*")]
    found = {*registry.list_models(filter), *(head.model for head in heads)}
    found |= {name.split(".")[0] for name in not_trained}
    if not found:
        hint = nearest_hint(filter.strip("*"), [*MODELS, *all_heads()])
        raise ZooError(f"No model or head matches {filter!r}.{hint} All: dcp-zoo list.")
    specs = [spec for spec in MODELS.values() if spec.name in found]
    models = [(s.name, f"{s.clip}/{s.clip_pretrained}" if s.clip else "miniature", *s.accuracies) for s in specs]
    output.print(plain_table(("model", "CLIP", *ACCURACIES), models))
    output.print(ACCURACY_NOTE, "", style="dim")
    if heads:
        order, rows = list(MODELS), []
        for head in sorted(heads, key=lambda head: (order.index(head.model), head.dataset, head.shots, head.seed)):
            metrics = head.metrics or made(read_config(Path(head.name))).get("metrics") or {}
            top1 = ("" if value is None else f"{value:5.1f} %" for value in alone_and_probed(metrics))
            rows.append((head.name, head.status, *top1))
        output.print(plain_table(("head", "status", "method alone", "with text probe"), rows))
        parts = [note for note in dict.fromkeys(find_spec(head.dataset).part_note for head in heads) if note]
        output.print(HEADS_NOTE, *parts, "", sep="\n", style="dim")
    if not_trained:
        shots = sorted({all_heads()[name].shots for name in not_trained})
        text = f"{len(not_trained):,} heads for {', '.join(map(str, shots))} images per class are planned"
        text += f" and not trained yet. How to train one: dcp-zoo info {not_trained[0]}"
        output.print(text, style="dim", markup=False)


def show_recommended() -> None:
    """The models that no cheaper one beats, of all licences or open ones, by either accuracy; the cheapest first; and
    encoders to read beside them."""
    from dcp_zoo.zoo.build import list_encoders

    best = {s.name for f in ("zero_shot", "imagenet") for ls in ((), OPEN_LICENSES) for s in frontier(f, ls)}
    specs = [spec for spec in MODELS.values() if spec.core_ms and (not spec.clip or spec.name in best)]
    specs.sort(key=lambda spec: spec.gflops or 0)
    rows = [(s.name, s.license or "see Hub", s.download or "bundled", *costs(s), *s.accuracies) for s in specs]
    output.print(plain_table(("model", "licence", "size", "memory", "time", *ACCURACIES), rows))
    output.print(ACCURACY_NOTE, style="dim")
    cores, others = available_cores(), [s.name for s in MODELS.values() if s.language != "English"]
    text = f"Size: to download once. Time: of 100 images, estimated from an AMD EPYC for {cores} of its cores;"
    output.print(text, "a GPU is faster. dcp-zoo train measures the accuracy on your images.", style="dim")
    output.print(f"Class names are English; in many languages: {', '.join(others)}.", "", style="dim", sep="\n")
    encoders = [(row.name, f"{row.parameters:.0f} M", str(row.features), row.license) for row in list_encoders()]
    output.print(plain_table(("encoder", "parameters", "features", "licence"), encoders))
    text = "Any other pretrained image model of timm works, too: timm.list_models(pretrained=True)."
    output.print(f"Encoders are read beside CLIP: dcp-zoo train --encoder. {text}", style="dim")


def costs(spec: ModelSpec, images: int = 100) -> tuple[str, str]:
    """Memory, and the time for these images on the cores of this process, of a model that was measured."""
    assert spec.core_ms
    assert spec.memory_mb
    seconds = spec.core_ms / 1000 * images / available_cores()
    return f"{spec.memory_mb / 1000:.1f} GB", format_duration(seconds)


def say_model(model: str) -> None:
    """Say which CLIP a command works with, unless it is the miniature."""
    spec = get_spec(model)
    if spec.clip:
        licence = spec.license or f"see https://huggingface.co/{spec.clip_repo}"
        weights = f"open_clip's {spec.clip} with the weights {spec.clip_pretrained}"
        log(f"Model: {spec.name}, {weights}, licence: {licence}.")


def advise_larger(model: str) -> None:
    """Say what a real CLIP costs in place of the miniature."""
    if not get_spec(model).clip:
        real = get_spec("small")
        memory, time = costs(real, 200)  # each image, and its mirror image
        advise(
            f"This was {model}, a miniature for trying things out. For real use pass --model small: {real.name}, "
            f"{real.download} to download once, {memory} of memory and about {time} for 100 images without a GPU. "
            "Others: dcp-zoo list --recommend."
        )


def info(
    name: str = Argument(metavar="NAME", help="A model, head, checkpoint, hf-hub:ORG/REPO or open_clip:ARCH/TAG."),
    check: bool = Option(False, "--check", help="Download a model, test it on six photographs, time it here."),
    as_json: AsJson = False,
) -> None:
    """Show what a model or a head is, how good, of what and when. All details, such as the recipe: --json.

    [dim]dcp-zoo info dcp_vitb16.imagenet-16shot[/]
    [dim]dcp-zoo info my_head[/]
    [dim]dcp-zoo info small --check[/]
    """
    details = describe(head_name(name))
    if check:
        kind, _, tag = parse_name(name)
        if kind not in ("zoo", "open_clip") or tag:
            raise ZooError(f"--check tests a model: for a head use dcp-zoo predict --sample --head {name}.")
        details |= check_model(name)
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


def check_model(name: str) -> Values:
    """What a model makes of the sample photographs without training, and costs here; it is downloaded if needed.
    ZooError if it recognises so few that it cannot be the model it is called."""
    import torch

    from dcp_zoo.training.device import pick_device
    from dcp_zoo.zoo.build import plain_clip
    from dcp_zoo.zoo.factory import create_transform

    clip = plain_clip(name).to(pick_device())
    transform = create_transform(clip)
    images = torch.stack([transform(load_image(path)) for path in sample_images()]).to(clip.device)
    with torch.inference_mode():
        classifier = clip.zero_shot_classifier(SAMPLE_CLASSES)
        clip.encode_image(images)  # warms up
        started = time.perf_counter()
        answers = clip.logits(clip.encode_image(images), classifier).argmax(1).tolist()
    seconds = (time.perf_counter() - started) / len(images)
    right = sum(answer == label for label, answer in enumerate(answers))
    if right < ENOUGH:
        given = ", ".join(f"{SAMPLE_CLASSES[label]}: {SAMPLE_CLASSES[answer]}" for label, answer in enumerate(answers))
        again = f"hf cache rm model/{get_spec(name).clip_repo or name}, and try again"
        raise ZooError(
            f"{name} recognises {right} of {len(images)} sample photographs ({given}). Unless it is a CLIP of another "
            f"field, its weights, tokenizer or preprocessing are not what they should be: {again}."
        )
    return {
        "sample photographs": f"{right} of {len(images)} recognised among {len(SAMPLE_CLASSES)} names, untrained",
        "time here": f"{1000 * seconds:.0f} ms per image on {clip.device.type} with {available_cores()} cores",
        "training here": f"about {format_duration(200 * seconds)} to read 100 photographs and their mirror images; a "
        "text probe then fits in seconds",
    }


def describe(name: str) -> Values:
    kind, place, tag = parse_name(name)
    if kind == "local-dir":
        return describe_checkpoint(place, Path(place))
    if kind == "hf-hub":
        from dcp_zoo.hub import download_file

        return describe_checkpoint(name, download_file(place, CONFIG_NAME, tag or None, None).parent)
    if kind == "zoo" and tag:
        folder = trained_here(get_head(name))
        return describe_checkpoint(name, folder) if folder else describe_head(get_head(name))
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
        "trained heads": ", ".join(registry.list_models(f"{spec.name}.*", pretrained=True)) or "none yet",
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
    counts = find_spec(head.dataset).counts
    return {
        "head": head.name,
        "dataset": head.dataset,
        "shots": head.shots,
        "seed": head.seed,
        "size": f"about {get_spec(head.model).head_mb:.0f} MB",
        "Hub repo": head.repo_id,
        "revision": head.pin[0] or "not pinned: not published yet",
        "metrics": head.metrics or "none: not measured",
        **({"test_images": counts[2]} if head.metrics and counts else {}),
        "recipe": default_recipe(head.model, head.dataset).as_dict(),
        **details,
    }


def for_people(details: Values) -> Values:
    """The details by names in `PEOPLE`, in its order."""
    images, metrics, per_class = (details.get(name) for name in ("test_images", "metrics", "class_images"))
    shown = details | {"accuracy": metrics, "rejection": rejection_note(details)}
    if isinstance(metrics, dict):
        top1 = metrics.get("top1_stored", next(iter(metrics.values())))
        accuracy = str(Accuracy("", round(top1 * images / 100), images)) if images else f"{top1:.1f} %"
        alone, probed = alone_and_probed(metrics)
        shown["accuracy"] = accuracy + (f" with the text probe; {alone:.1f} % without" if probed else "")
    spec = DATASETS.get(str(details.get("dataset")))
    if spec and spec.part_note:
        shown["dataset"] = spec.part_note
    if per_class:
        counts = shorten([f"{count} of {quoted(name)}" for name, count in per_class.items()])
        shown |= {"images": counts, "dataset": "your own images"}
    elif "shots" in details:
        shown["images"] = f"{details['shots']} per class"
    return {name: shown[name] for name in PEOPLE if shown.get(name)}
