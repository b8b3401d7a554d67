"""`dcp-zoo explain`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from dcp_zoo.cli.console import output
from dcp_zoo.cli.options import HeadName, check_output, head_name
from dcp_zoo.errors import ZooError, import_extra
from dcp_zoo.files import write_file

if TYPE_CHECKING:
    import torch

    from dcp_zoo.api.explain import Words


def explain(
    head: HeadName,
    top_k: Annotated[int, typer.Option(min=1, help="Words per text prompt.")] = 5,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output", help="Folder for words.csv, coupling.csv and coupling.png; created if needed."),
    ] = None,
) -> None:
    """Show what a head has learnt: the words nearest to its text prompts, and how far coupling moves its prompts.

    [dim]dcp-zoo explain --head dcp_mini.caltech101-16shot[/]
    [dim]dcp-zoo explain --head my_head --top-k 3 --output explained[/]
    """
    name = head_name(head)
    if output_dir is not None:
        check_output(output_dir)
        for module in ("matplotlib", "pandas"):
            import_extra(module, "plots")
    from dcp_zoo.api.explain import coupling_moves, nearest_words
    from dcp_zoo.zoo.factory import create_model

    model = create_model(name, True).eval()
    if model.method != "dcp":
        raise ZooError(f"explain shows DCP's prompts, and {head} was made by {model.method}, which has none.")
    words, moves = nearest_words(model, top_k), coupling_moves(model)
    output.print(words_table(words))
    output.print(
        f"[dim]A random vector has a cosine of {words.chance:.2f} with its nearest word: words at or below that have "
        "no meaning. Length 1 is the median of the vocabulary.[/]\n"
    )
    output.print(moves_table(moves))
    if output_dir is not None:
        write_explanation(output_dir, words, moves, title=f"{head}: how far CMPA moves the prompts")
        output.print(f"Wrote words.csv, coupling.csv and coupling.png to {output_dir}.", highlight=False)


def words_table(words: "Words") -> Table:
    """One row per text prompt."""
    table = Table("prompt", "length", "nearest words (cosine)", title="Text prompts")
    for i, (row, length) in enumerate(zip(words.nearest, words.lengths.tolist(), strict=True), 1):
        listed = ", ".join(f"{escape(word)} [dim]{cosine:.2f}[/]" for word, cosine in row)
        table.add_row(str(i), f"{length:.2f}", listed)
    return table


def moves_table(moves: "dict[str, torch.Tensor]") -> Table:
    """One row per coupled block: the mean, minimum and maximum over prompts."""
    table = Table(
        "before block", *moves, title="How far CMPA moves the prompts: |new - old| / |old|, mean (min to max)"
    )
    for k, rows in enumerate(zip(*moves.values(), strict=True), 1):
        table.add_row(str(k), *(f"{row.mean():.2f} ({row.min():.2f} to {row.max():.2f})" for row in rows))
    return table


def write_explanation(folder: Path, words: "Words", moves: "dict[str, torch.Tensor]", title: str) -> None:
    """Write the two tables as CSV, and the figure."""
    import pandas as pd

    from dcp_zoo.api.explain import draw

    nearest = [(i, rank, *pair) for i, row in enumerate(words.nearest, 1) for rank, pair in enumerate(row, 1)]
    changes = [
        (k, tower, i, change)
        for tower, rows in moves.items()
        for k, row in enumerate(rows.tolist(), 1)
        for i, change in enumerate(row, 1)
    ]
    tables = {
        "words.csv": pd.DataFrame(nearest, columns=["prompt", "rank", "word", "cosine"]),
        "coupling.csv": pd.DataFrame(changes, columns=["block", "tower", "prompt", "relative_change"]),
    }
    write_file(folder / "coupling.png", lambda path: draw(moves, path, title))
    for name, table in tables.items():
        write_file(folder / name, table.to_csv(index=False, float_format="%.4f"))
