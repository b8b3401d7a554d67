"""`dcp-zoo list` and `dcp-zoo info`."""

import json
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from dcp_zoo.cli.console import output
from dcp_zoo.model.checkpoint import WEIGHTS_NAME, read_config
from dcp_zoo.model.cmpa import CMPA
from dcp_zoo.model.mini import MINI_CFG
from dcp_zoo.train.run import default_recipe
from dcp_zoo.zoo.registry import MODELS, Head, ModelSpec, all_heads, get_head, get_spec, list_models, list_pretrained


def list_(
    filter: Annotated[str, typer.Argument(help="Wildcard, such as 'dcp_vitb16*' or '*-16shot'.")] = "",
    trained: Annotated[bool, typer.Option("--trained", help="Only heads that can be loaded now.")] = False,
) -> None:
    """List the models and their heads, trained and planned.

    [dim]dcp-zoo list '*-16shot' --trained[/]
    """
    models = Table("model", "CLIP", "weights", "input", title="Models")
    for name in list_models(filter.split(".")[0]):
        spec = MODELS[name]
        models.add_row(name, *_clip_of(spec), f"{spec.image_size} px")
    if models.rows:
        output.print(models)
    heads = Table("head", "status", "top-1 (calibrated)", "top-1 (batch)", title="Heads")
    for name in list_pretrained(filter, published=True if trained else None):
        head = all_heads()[name]
        heads.add_row(name, head.status, *(_percent(head.metrics.get(f"top1_{c}")) for c in ("calibrated", "batch")))
    output.print(heads if heads.rows else f"No head matches {filter!r}.")
    output.print("[dim]planned: nobody has trained it yet; `dcp-zoo info HEAD` shows the command that does.[/]")


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
        text = "\n".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        table.add_row(key, text)
    output.print(table)


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
        "trained heads": ", ".join(list_pretrained(f"{spec.name}.*", published=True)) or "none yet",
    }


def describe_head(head: Head) -> dict[str, Any]:
    """What `info` shows of a head."""
    facts: dict[str, Any] = {"head": head.name, "status": head.status, "dataset": head.dataset, "shots": head.shots}
    recipe = default_recipe(head.model, head.dataset).as_dict()
    if head.status == "bundled":
        facts["size"] = f"{(head.bundled_dir / WEIGHTS_NAME).stat().st_size / 1e6:.1f} MB"
        recipe = read_config(head.bundled_dir)["dcp"]["recipe"]
    else:
        facts["size"] = f"about {expected_bytes(get_spec(head.model), recipe) / 1e6:.0f} MB"
        facts |= {"Hub repo": head.repo_id, "revision": head.pin[0] or "not pinned: not published yet"}
    return facts | {
        "seed": head.seed,
        "licence": head.license or "none yet: not trained",
        "metrics": head.metrics or "none: not measured",
        "recipe": recipe,
        "train it": head.train_command,
    }


def expected_bytes(spec: ModelSpec, recipe: dict[str, Any]) -> int:
    """Size in float16 of a head with this recipe: its prompts, CMPA and calibrated context."""
    if spec.clip is None:
        cfg = MINI_CFG
    else:
        import open_clip  # slow, and only this needs it

        cfg = open_clip.get_model_config(spec.clip)
    (dv, vision_blocks), (dt, text_blocks) = (
        (cfg[tower]["width"], cfg[tower]["layers"]) for tower in ("vision_cfg", "text_cfg")
    )
    coupled = min(recipe["depth"], vision_blocks - 1, text_blocks - 1)
    with torch.device("meta"):
        cmpa = CMPA(dv, dt, recipe["coupling"] == "bidirectional")
    parameters = sum(p.numel() for p in cmpa.parameters()) * (1 if recipe["shared"] else coupled)
    return 2 * (parameters + recipe["n_ctx"] * (dv + dt + coupled * dv))


def _clip_of(spec: ModelSpec) -> tuple[str, str]:
    if spec.clip is None:
        return "miniature, for trying things out", "bundled"
    return f"open_clip {spec.clip}", f"{spec.clip_pretrained} ({spec.clip_repo})"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} %"
