"""`dcp-zoo explain`."""

from pathlib import Path
from typing import Annotated

import typer

from dcp_zoo.cli.console import output, plain_table
from dcp_zoo.cli.options import HeadName, check_output, head_name
from dcp_zoo.errors import ZooError, import_extra
from dcp_zoo.files import write_file


def explain(
    head: HeadName,
    top_k: Annotated[int, typer.Option(min=1, help="Words per text prompt.")] = 5,
    figure: Annotated[
        Path | None, typer.Option("--output", help="Plot the moves of the prompts to this file.", metavar="FILE.png")
    ] = None,
) -> None:
    """Show what a head has learnt: the words nearest to its text prompts, and how far coupling moves its prompts.

    [dim]dcp-zoo explain --head dcp_mini.caltech101-16shot[/]
    [dim]dcp-zoo explain --head my_head --top-k 3 --output coupling.png[/]
    """
    name = head_name(head)
    if figure:
        check_output(figure.parent)
        import_extra("matplotlib", "plots")
    from dcp_zoo.api.explain import coupling_moves, draw, nearest_words
    from dcp_zoo.zoo.factory import create_model

    model = create_model(name, True).eval()
    if model.method != "dcp":
        raise ZooError(f"explain shows DCP's prompts, and {head} was made by {model.method}, which has none.")
    words, moves = nearest_words(model, top_k), coupling_moves(model)
    per_prompt = [
        (str(i), f"{length:.2f}", ", ".join(f"{word} {cosine:.2f}" for word, cosine in row))
        for i, (row, length) in enumerate(zip(words.nearest, words.lengths.tolist(), strict=True), 1)
    ]
    output.print("[bold]Text prompts[/]", plain_table(("prompt", "length", "nearest words (cosine)"), per_prompt))
    output.print(
        f"[dim]A random vector has a cosine of {words.chance:.2f} with its nearest word: words at or below that have "
        "no meaning. Length 1 is the median of the vocabulary.[/]\n"
    )
    output.print("[bold]How far CMPA moves the prompts[/]: |new - old| / |old|, mean (min to max)")
    per_block = [
        (str(k), *(f"{row.mean():.2f} ({row.min():.2f} to {row.max():.2f})" for row in rows))
        for k, rows in enumerate(zip(*moves.values(), strict=True), 1)
    ]
    output.print(plain_table(("before block", *moves), per_block))
    if figure:
        write_file(figure, lambda path: draw(moves, path, f"{head}: how far CMPA moves the prompts"))
        output.print(f"Wrote {figure}.")
