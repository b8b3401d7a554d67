"""`dcp-zoo list` and `dcp-zoo info`."""

import json
from collections.abc import Collection, Sequence
from typing import Annotated, Any

import typer
from rich.table import Table

from dcp_zoo.cli.console import log, output
from dcp_zoo.cli.options import as_text, nearest_hint
from dcp_zoo.cli.size import head_bytes
from dcp_zoo.errors import ZooError
from dcp_zoo.model.config import CONFIG_NAME, WEIGHTS_NAME
from dcp_zoo.training.recipes import default_recipe
from dcp_zoo.zoo.registry import (
    MODELS,
    Head,
    ModelSpec,
    all_heads,
    get_head,
    get_spec,
    list_heads,
    list_models,
    list_pretrained,
)


def list_(
    filter: Annotated[str, typer.Argument(help="Wildcard, such as 'dcp_vitb16*' or '*-16shot'.")] = "",
    planned: Annotated[bool, typer.Option("--planned", help="Name the heads that nobody has trained yet.")] = False,
) -> None:
    """List the models and their heads: those that can be loaded, and how many are planned.

    [dim]dcp-zoo list 'dcp_mini*'[/]
    [dim]dcp-zoo list --planned '*.dtd-*'[/]
    """
    not_trained = list_heads(filter, "planned")
    if planned:
        _check_found("planned head", filter, not_trained, list_heads(status="planned"))
        print("\n".join(not_trained))
        log("The command that trains one of them: dcp-zoo info HEAD")
        return
    loadable = list_pretrained(filter)
    found = {*list_models(filter), *(name.split(".")[0] for name in (*loadable, *not_trained))}
    _check_found("model or head", filter, found, [*MODELS, *all_heads()])
    tables = (
        models_table([spec for spec in MODELS.values() if spec.name in found]),
        heads_table([all_heads()[name] for name in loadable]),
        planned_table([all_heads()[name] for name in not_trained]),
    )
    for table in tables:
        if table.rows:
            output.print(table, "")
    if not_trained:
        pattern = filter or "dcp_vitb16*"
        output.print(
            f"Planned: not trained yet. Their names: dcp-zoo list --planned '{pattern}'", style="dim", markup=False
        )


def info(
    name: Annotated[str, typer.Argument(help="A model or a head, such as dcp_mini.caltech101-16shot.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show all that is known of a model or a head: status, size, licence, metrics, recipe, command to train.

    [dim]dcp-zoo info dcp_vitb16.imagenet-16shot[/]
    """
    facts = describe_head(get_head(name)) if "." in name else describe_model(get_spec(name))
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    table = Table(show_header=False, title=name)
    for key, value in facts.items():
        inner = value.items() if isinstance(value, dict) else ()
        table.add_row(key, "\n".join(f"{name}: {as_text(part)}" for name, part in inner) or str(value))
    output.print(table)


# --------------------------------------------------------------------------------------------------------------- tables


def models_table(specs: Sequence[ModelSpec]) -> Table:
    table = Table("model", "CLIP", "weights", "input", box=None, pad_edge=False)
    for spec in specs:
        clip, _ = _clip_of(spec)
        table.add_row(spec.name, clip, spec.clip_pretrained, f"{spec.image_size} px")
    return table


def heads_table(heads: Sequence[Head]) -> Table:
    """Heads that exist, with their accuracy on the test images."""
    table = Table("head", "status", box=None, pad_edge=False)
    contexts = ("calibrated", "batch")
    for context in contexts:
        table.add_column(f"top-1 ({context})", justify="right")
    models = list(MODELS)
    for head in sorted(heads, key=lambda head: (models.index(head.model), head.dataset, head.shots, head.seed)):
        table.add_row(head.name, head.status, *(_percent(head.metrics.get(f"top1_{context}")) for context in contexts))
    return table


def planned_table(heads: Sequence[Head]) -> Table:
    """One row per model."""
    table = Table("planned for", box=None, pad_edge=False)
    table.add_column("heads", justify="right")
    table.add_column("datasets", justify="right")
    table.add_column("images per class")
    for model in dict.fromkeys(head.model for head in heads):
        group = [head for head in heads if head.model == model]
        shots = ", ".join(map(str, sorted({head.shots for head in group})))
        table.add_row(model, str(len(group)), str(len({head.dataset for head in group})), shots)
    return table


def _check_found(what: str, filter: str, found: Collection[str], names: Sequence[str]) -> None:
    """ZooError where a filter has found nothing."""
    if not found:
        hint = nearest_hint(filter.strip("*"), names)
        raise ZooError(f"No {what} matches {filter!r}.{hint} All: dcp-zoo list, and dcp-zoo list --planned.")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} %"


# ---------------------------------------------------------------------------------------------------------------- facts


def describe_model(spec: ModelSpec) -> dict[str, Any]:
    """What `info` shows of a model."""
    clip, weights = _clip_of(spec)
    return {
        "model": spec.name,
        "CLIP": clip,
        "weights": weights,
        "input": f"{spec.image_size} x {spec.image_size} px",
        "default head": spec.default_tag,
        "recipe": default_recipe(spec.name).as_dict(),
        "trained heads": ", ".join(list_pretrained(f"{spec.name}.*")) or "none yet",
    }


def describe_head(head: Head) -> dict[str, Any]:
    """What `info` shows of a head."""
    facts: dict[str, Any] = {"head": head.name, "status": head.status, "dataset": head.dataset, "shots": head.shots}
    if head.status == "bundled":
        facts["size"] = f"{(head.bundled_dir / WEIGHTS_NAME).stat().st_size / 1e6:.1f} MB"
        config = json.loads((head.bundled_dir / CONFIG_NAME).read_text())
        recipe = config["model_args"] | config["dcp"]["recipe"]
    else:
        planned = default_recipe(head.model, head.dataset)
        facts["size"] = f"about {head_bytes(get_spec(head.model), planned.config) / 1e6:.0f} MB"
        facts |= {"Hub repo": head.repo_id, "revision": head.pin[0] or "not pinned: not published yet"}
        recipe = planned.as_dict()
    return facts | {
        "seed": head.seed,
        "licence": head.license or "none yet: not trained",
        "metrics": head.metrics or "none: not measured",
        "recipe": recipe,
        "train it": head.train_command,
    }


def _clip_of(spec: ModelSpec) -> tuple[str, str]:
    """A model's CLIP, and where its weights are from."""
    if spec.clip is None:
        return "miniature, for trying things out", "bundled"
    return f"open_clip {spec.clip}", f"{spec.clip_pretrained} ({spec.clip_repo})"
