"""Compare the answers of other clients of the Hub with this package's, on photographs.

    python hub/clients/check.py PHOTOS --python PYTHON --node FOLDER

exports the bundled 16-shot head of Caltech-101 with `--format hub` and classifies the images in PHOTOS, at
any depth, with this package, with transformers and optimum in the interpreter PYTHON, and with
transformers.js, which is installed in FOLDER/node_modules. It fails unless all most probable classes are the
same and probabilities differ by less than 1e-3. To install the clients:

    python -m venv clients && clients/bin/pip install 'optimum[onnxruntime]' pillow
    npm install --ignore-scripts --prefix FOLDER @huggingface/transformers
"""

import json
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import typer

from dcp_zoo import create_model, predict
from dcp_zoo.data.find import find_images
from dcp_zoo.release import export_hub

HERE = Path(__file__).parent
HEAD = "dcp_mini.caltech101-16shot"
IMAGES = 50
TOLERANCE = 1e-3


def main(
    photos: Path,
    python: Annotated[Path, typer.Option(help="An interpreter that has optimum and transformers.")],
    node: Annotated[Path, typer.Option(help="The folder of node_modules.")],
) -> None:
    """Run the clients, and fail if an answer differs."""
    found = find_images([str(photos)])
    chosen = found[:: max(1, len(found) // IMAGES)][:IMAGES]
    model = create_model(HEAD, True).eval()
    expected = table(
        [{name: share for name, share, _ in row} for row in predict(model, chosen, top_k=model.num_classes)],
        model.classnames,
    )
    with TemporaryDirectory() as temporary:
        repo = export_hub(model, Path(temporary, "repo"))
        script = Path(temporary, "pipeline.mjs")  # which finds node_modules beside it
        script.write_bytes((HERE / "pipeline.mjs").read_bytes())
        script.with_name("node_modules").symlink_to((node / "node_modules").resolve())
        for name, command in (("optimum", [python, HERE / "pipeline.py"]), ("transformers.js", ["node", script])):
            answers = subprocess.run([*command, repo, *chosen], check=True, capture_output=True, text=True).stdout
            *_, versions, rows = answers.splitlines()
            client = table(json.loads(rows), model.classnames)
            same = int((client.argmax(1) == expected.argmax(1)).sum())
            error = float(np.abs(client - expected).max())
            print(
                f"{name} ({versions}): {same} of {len(chosen)} answers are the same, probabilities within {error:.1g}"
            )
            if same < len(chosen) or error > TOLERANCE:
                raise typer.Exit(1)


def table(rows: list[dict[str, float]], names: list[str]) -> np.ndarray:
    """Probabilities (n, C) of {class: probability}."""
    return np.array([[row[name] for name in names] for row in rows])


if __name__ == "__main__":
    typer.run(main)
