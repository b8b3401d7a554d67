"""The files of a report: `report.md` with its figures next to it, and `report.html`, a self-contained page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dcp_zoo.benchmark import store
from dcp_zoo.benchmark.report import paired, tables
from dcp_zoo.benchmark.report.figures import LearningCurves
from dcp_zoo.errors import ZooError
from dcp_zoo.files import file_name, templates, write_file

SECTIONS = {  # protocol: (heading, tables)
    "few-shot": ("Few-shot classification", lambda rows: [*tables.few_shot_tables(rows), *paired.against(rows)]),
    "base-to-new": ("Base-to-new generalisation", tables.base_to_new_tables),
    "cross-dataset": ("Cross-dataset transfer", lambda rows: tables.target_tables(rows, "cross-dataset")),
    "domain-shift": ("Domain shift", lambda rows: tables.target_tables(rows, "domain-shift")),
}


def write_report(folders: Sequence[str | Path], output: str | Path) -> list[Path]:
    """Read the results of sweeps and write the report. Needs the extra `plots`.

    Args:
        folders: output folders of sweeps.
        output: folder for the report; created if needed.

    Returns:
        The paths of `report.html`, `report.md`, and the figures shown in the latter.

    Raises:
        ZooError: folders without results, a file that is not a result, or an output folder that is not writable.
    """
    paths = [Path(folder) for folder in folders]
    results = store.gather(paths)
    if results.empty:
        raise ZooError(
            f"There is no result in {', '.join(map(str, paths))}: pass the --output folder of `dcp-zoo benchmark`."
        )
    done = {key for path in paths for key in store.done(path)}
    failed = {key: reason for path in paths for key, reason in store.failures(path).items() if key not in done}
    planned = {key for path in paths for key in store.planned(path)}
    files = {"report.html": "", "report.md": ""}
    content = {
        "folders": [str(path) for path in paths],
        "accuracies": len(results),
        "failed": failed,
        "missing": sorted(planned - done - failed.keys()),
        "sections": [_section(group, files) for _, group in tables.with_labels(results).groupby(["model", "weights"])],
    }
    pages = templates(__package__)
    pages.filters["cell"] = lambda text: str(text).replace("|", "\\|")
    for name in ("report.html", "report.md"):
        files[name] = pages.get_template(f"{name}.jinja").render(content)
    for name, text in files.items():
        write_file(Path(output) / name, text)
    return [Path(output) / name for name in files]


def _section(results: Any, files: dict[str, str]) -> dict[str, Any]:
    """The content for one model; its figure is added to `files`."""
    model, weights = results.model.iloc[0], results.weights.iloc[0]
    section: dict[str, Any] = {"model": model, "weights": weights, "curves": ""}
    section["protocols"] = [
        (heading, make(results)) for name, (heading, make) in SECTIONS.items() if (results.protocol == name).any()
    ]
    section["ece"], section["nll"] = (tables.few_shot_tables(results, value) for value in ("ece", "nll"))
    section["options"] = paired.options_against_default(results)
    section["runs"] = tables.all_settings(results)
    curves = LearningCurves(results)
    if curves.panels:
        name = file_name(f"learning-curves-{model}-{weights}.svg")
        files[name] = curves.file()
        section |= {"curves": files[name], "description": curves.text(), "figure": name}
    return section
