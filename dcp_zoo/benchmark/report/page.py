"""Pages made from the templates of this folder."""

from pathlib import Path
from typing import Any

import jinja2


def render(name: str, **values: Any) -> str:
    """The template `NAME.jinja` with these values; a missing one is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "."),
        autoescape=name.endswith("html"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|")
    return environment.get_template(f"{name}.jinja").render(**values)


def write_text(text: str, path: str) -> None:
    Path(path).write_text(text)
