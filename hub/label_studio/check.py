"""Annotate photographs in a running Label Studio through its API, and see that the backend learns from it.

    label-studio start --no-browser --port 8080 --username me@example.org --password SECRET --user-token TOKEN
    python hub/label_studio/check.py --label-studio http://localhost:8080 --token TOKEN --photos PHOTOS

with LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN=true in the environment of the former. PHOTOS has a folder per class, of which
60 photographs are used; they and the backend are served from here. It prints how many predictions are right by class
names alone and, of the other tasks, after two annotations per class; and fails if those do not come within a minute.
`--keep` leaves the project in Label Studio.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Annotated, Any

import typer
from label_studio_sdk import LabelStudio

from dcp_zoo import list_labelled_images

PORT, IMAGES, ANNOTATED, PATIENCE = 9091, 60, 2, 60
INTERFACE = '<View><Image name="image" value="$image"/><Choices name="class" toName="image">{}</Choices></View>'


def main(
    token: Annotated[str, typer.Option()],
    photos: Annotated[Path, typer.Option()],
    label_studio: str = "http://localhost:8080",
    keep: bool = False,
    model: str = "dcp_mini",
) -> None:
    """Run the backend, and annotate."""
    paths, labels = list_labelled_images(photos)
    names = sorted(set(labels))
    per_class = IMAGES // len(names)
    chosen = [
        (p, name) for name in names for p in [q for q, n in zip(paths, labels, strict=True) if n == name][:per_class]
    ]
    handler = partial(SimpleHTTPRequestHandler, directory=str(photos))
    images = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=images.serve_forever, daemon=True).start()
    client = LabelStudio(base_url=label_studio, api_key=token)
    options = ["--label-studio", label_studio, "--token", token, "--port", str(PORT), "--model", model]
    backend = subprocess.Popen([sys.executable, Path(__file__).with_name("backend.py"), *options])
    choices = "".join(f'<Choice value="{name}"/>' for name in names)
    project = client.projects.create(title="dcp_zoo", label_config=INTERFACE.format(choices))
    try:
        client.projects.update(project.id, sampling="Uncertainty sampling", show_collab_predictions=True)
        address = f"http://127.0.0.1:{images.server_port}"
        places = [f"{address}/{os.path.relpath(path, photos)}" for path, _ in chosen]
        client.projects.import_tasks(project.id, request=[{"image": place} for place in places])
        url = f"http://127.0.0.1:{PORT}"
        wait_for(lambda: client.ml.create(url=url, project=project.id, title="dcp_zoo"))
        tasks = sorted(client.tasks.list(project=project.id, fields="all"), key=lambda task: task.id)
        truth = {task.id: name for task, (_, name) in zip(tasks, chosen, strict=True)}
        client.actions.create(project=project.id, id="retrieve_tasks_predictions", selected_items={"all": True})
        show("by names", wait_for(lambda: predictions(client, project.id, model, len(truth))), truth)
        count = 0
        for name in names:
            for number in [number for number, label in truth.items() if label == name][:ANNOTATED]:
                part = {"from_name": "class", "to_name": "image", "type": "choices", "value": {"choices": [name]}}
                client.annotations.create(number, result=[part])
                count += 1
        started, version = time.monotonic(), f"{model}, {count} annotations"
        found = wait_for(lambda: predictions(client, project.id, version, len(truth) - count))
        show(f"after {count} annotations, {time.monotonic() - started:.0f} s later", found, truth)
    finally:
        backend.terminate()
        if not keep:
            client.projects.delete(project.id)


def predictions(client: LabelStudio, project: int, version: str, count: int) -> dict[int, str]:
    """The classes of the tasks that have a prediction of this version; LookupError unless there are so many."""
    found = {}
    for task in client.tasks.list(project=project, fields="all"):
        for prediction in task.model_dump()["predictions"] or ():
            if prediction["model_version"] == version:
                found[task.id] = prediction["result"][0]["value"]["choices"][0]
    if len(found) < count:
        raise LookupError(f"{len(found)} of {count} tasks have a prediction of {version}.")
    return found


def wait_for(call: Callable[[], Any]) -> Any:
    """The result of `call` as soon as it does not fail."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return call()
        except Exception:
            if time.monotonic() > end:
                raise
            time.sleep(2)


def show(what: str, found: dict[int, str], truth: dict[int, str]) -> None:
    right = sum(truth[number] == name for number, name in found.items())
    print(f"{what}: {right} of {len(found)} predictions are right", flush=True)


if __name__ == "__main__":
    typer.run(main)
