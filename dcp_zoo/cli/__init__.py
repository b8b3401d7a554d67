"""The command `dcp-zoo`. Its modules import what is slow inside their functions, so that help and lists are
fast."""

import io
import sys
import warnings
from importlib.metadata import version
from typing import Any

from typer import Exit, Option, Typer

from dcp_zoo.cli import benchmark, deploy, heads, inspect, predict, show, train  # not the functions of these names
from dcp_zoo.cli.console import ERROR, log
from dcp_zoo.cli.options import Command
from dcp_zoo.errors import ZooError
from dcp_zoo.threads import wait_passively

app = Typer(name="dcp-zoo", no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False)


def print_version(requested: bool) -> None:
    if requested:
        print(f"dcp_zoo {version('dcp_zoo')}")
        raise Exit


@app.callback()
def dcp_zoo(
    version: bool = Option(False, "--version", callback=print_version, is_eager=True, metavar="", help="The version."),
) -> None:
    """A timm-style model zoo for DCP: image classifiers from 1 to 16 images per class, on a frozen CLIP.

    First steps: [bold]dcp-zoo predict --sample[/], then [bold]dcp-zoo train MY_PHOTOS --output my_head[/].
    """


COMMANDS: dict[str, Any] = {
    "list": show.list_,
    "info": show.info,
    "predict": predict.predict,
    "inspect": inspect.inspect,
    "search": inspect.search,
    "train": train.train,
    "eval": heads.evaluate,
    "benchmark": benchmark.benchmark,
    "report": benchmark.report,
    "export": deploy.export,
    "publish": deploy.publish,
    "serve": deploy.serve,
}
for name, command in COMMANDS.items():
    app.command(name, cls=Command)(command)
app.add_typer(benchmark.data, name="data")


def main(program: Typer = app) -> None:
    """Run the command line or a script; bad input ends with one message and exit code 2, Ctrl-C by Typer
    with 130."""
    wait_passively()  # before a command imports torch
    warnings.showwarning = lambda text, *_, **__: log(str(text), "[yellow]Note:[/] ")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a name that the terminal cannot show must not end the command
    try:
        program()
    except (ZooError, OSError) as error:
        log(str(error), ERROR)
        sys.exit(2)
