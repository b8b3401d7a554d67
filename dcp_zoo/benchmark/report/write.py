"""The files of a report: `report.md` with its figures next to it, and `report.html`, a self-contained page."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dcp_zoo.benchmark.report import figures, paired, tables
from dcp_zoo.benchmark.report.page import render, write_text
from dcp_zoo.benchmark.report.state import read_state
from dcp_zoo.errors import cannot_write
from dcp_zoo.files import file_name, write_atomically

SECTIONS = {  # protocol: (heading, tables)
    "few-shot": ("Few-shot classification", lambda results: [*tables.few_shot(results), *paired.against(results)]),
    "base-to-new": ("Base-to-new generalisation", tables.base_to_new),
    "cross-dataset": ("Cross-dataset transfer", lambda results: tables.by_target(results, "cross-dataset")),
    "domain-shift": ("Domain shift", lambda results: tables.by_target(results, "domain-shift")),
}


def write_report(folders: Sequence[str | Path], output: str | Path) -> list[Path]:
    """Read the results of sweeps and write the report.

    Args:
        folders: output folders of sweeps.
        output: folder for the report; created if needed.

    Returns:
        The paths of `report.html`, `report.md`, and the figures shown in the latter.

    Raises:
        ZooError: folders without results, a file that is not a result, or an output folder that is not writable.
    """
    state = read_state(folders)
    files = {"report.html": "", "report.md": ""}
    sections = [_section(group, files) for _, group in tables.labelled(state.results).groupby(["model", "weights"])]
    for name in ("report.html", "report.md"):
        files[name] = render(name, sections=sections, state=state, folders=[str(folder) for folder in folders])
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_atomically(Path(output) / name, partial(write_text, text))
    except OSError as error:
        raise cannot_write(output, error) from error
    return [Path(output) / name for name in files]


def _section(results: Any, files: dict[str, str]) -> dict[str, Any]:
    """The content for one model; its figure is added to `files`."""
    model, weights = results.model.iloc[0], results.weights.iloc[0]
    section: dict[str, Any] = {"model": model, "weights": weights, "protocols": [], "panels": []}
    for protocol, (heading, make) in SECTIONS.items():
        if (results.protocol == protocol).any():
            section["protocols"].append((heading, make(results)))
    section["ece"], section["nll"] = (tables.few_shot(results, value) for value in ("ece", "nll"))
    section["options"] = tables.options_against_default(results)
    section["runs"] = tables.runs(results)
    found = figures.panels(results)
    if found:
        section |= _curves(found, results)
        section["figure"] = file_name(f"learning-curves-{model}-{weights}.svg")
        files[section["figure"]] = figures.figure_svg(found, figures.styles(list(section["legend"])))
    return section


def _curves(found: dict[str, Any], results: Any) -> dict[str, Any]:
    """The panels and legend of the page."""
    labels = [label for label in results.label.unique() if any((rows.label == label).any() for rows in found.values())]
    style = figures.styles(labels)
    untrained = set(results.label) - set(results.label[results.shots > 0])
    return {
        "legend": {label: figures.swatch_svg(style[label], label in untrained) for label in labels},
        "panels": [
            (title, figures.describe(title, rows), figures.panel_svg(title, rows, style))
            for title, rows in found.items()
        ],
    }
