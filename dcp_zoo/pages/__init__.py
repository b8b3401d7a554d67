"""Pages for people, from templates."""

from pathlib import Path
from typing import Any

from dcp_zoo.files import printable_lines


def templates(package: str) -> Any:
    """The page templates of a package and the shared ones; HTML is escaped, names shown as by
    `printable`."""
    import jinja2  # here, as most commands make no page

    def shown(value: object) -> object:
        return printable_lines(value) if type(value) is str else value  # not HTML, whose parts have been here

    here = Path(__file__).parent
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([here.parent.joinpath(*package.split(".")[1:]), here]),
        autoescape=jinja2.select_autoescape(["html", "html.jinja"]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=shown,
    )
