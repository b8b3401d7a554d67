"""Label photographs in a real Label Studio with the backend beside this file, and check what it predicts.

    python -m venv studio && studio/bin/pip install label-studio
    pip install '.[serve]' && python hub/label_studio/check.py --label-studio studio/bin/label-studio

starts both on this machine, in a temporary folder, and makes a project of 60 photographs: of the folder
--photos, which has one folder per class, or parts of the sample photographs. It fails unless

- every photograph has the prediction and the score that this package gives, before and after ten
  annotations,
- these make the predictions of the other photographs more accurate,
- the photograph that comes next is the one with the lowest score.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import httpx
import numpy as np
import typer
from PIL import Image

from dcp_zoo import FewShotClassifier, list_labelled_images
from dcp_zoo.data import load_image
from dcp_zoo.data.packaged import sample_images
from dcp_zoo.serve import listen

BACKEND = Path(__file__).with_name("backend.py")
ALBUMS = ("Minka", "breakfast", "zoo", "falconry", "holiday", "garden")  # of the sample photographs; names say little
PHOTOS = 60
ANNOTATIONS = 10
TOLERANCE = 1e-3
START_SECONDS = 900  # Label Studio first makes its database
LOWEST = {"ordering": ["tasks:predictions_score"]}
LOGIN = {"username": "user@example.org", "password": "label-studio"}
LOCAL = {  # a Label Studio that calls this machine, and nobody else; README.md explains the flag
    "ML_BLOCK_LOCAL_IP": "false",
    "SSRF_PROTECTION_ENABLED": "false",
    "ff_front_dev_1682_model_version_dropdown_070622_short": "true",
    **dict.fromkeys(("COLLECT_ANALYTICS", "LATEST_VERSION_CHECK"), "false"),
    **dict.fromkeys(("SENTRY_DSN", "FRONTEND_SENTRY_DSN"), ""),
}


def main(
    label_studio: Annotated[Path, typer.Option(help="The program of Label Studio.")],
    photos: Annotated[Path | None, typer.Option(help="A folder with one folder per class.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Take a screenshot, in Chromium.")] = None,
) -> None:
    """Run the check, and print what was found."""
    with TemporaryDirectory() as temporary:
        folder = photos or write_parts(Path(temporary, "photos"))
        with studio(label_studio, Path(temporary, "studio")) as client, backend(client) as address:
            project = Project(client, folder)
            project.connect(address)
            before = project.check_predictions({})
            annotated = project.annotate()
            after = project.check_predictions(annotated)
            project.check_order()
            release = client.get("/api/version").json()["release"]
            if picture:
                take_picture(client, project, picture)
    others = [task for task in after if task not in annotated]
    first, then = (np.mean([answers[task] == project.truth[task] for task in others]) for answers in (before, after))
    print(
        f"Label Studio {release}, {PHOTOS} photographs of {len(project.classes)} classes: predictions and scores are "
        f"this package's, and the lowest score comes next. Of {len(others)} photographs, {first:.1%} were right by the "
        f"names alone, {then:.1%} after annotations of the other {ANNOTATIONS}."
    )
    if then <= first < 1:
        raise SystemExit("The annotations made the predictions no better.")


def write_parts(folder: Path) -> Path:
    """Ten parts of each sample photograph, in one folder per class."""
    for name, path in zip(ALBUMS, sample_images(), strict=True):
        (folder / name).mkdir(parents=True)
        photo = load_image(path)
        for i in range(PHOTOS // len(ALBUMS)):
            side = int(min(photo.size) * (0.45 + 0.05 * i))
            left = (photo.width - side) * i // 9
            top = (photo.height - side) * (i % 3) // 2
            photo.crop((left, top, left + side, top + side)).save(folder / name / f"{i}.jpg")
    return folder


def free_port() -> int:
    with listen("127.0.0.1", 0) as listening:
        return listening.getsockname()[1]


@contextmanager
def running(command: Sequence[object], health: str, settings: Mapping[str, str], log: Path) -> Iterator[None]:
    """A server, from when its health is well until the context ends; if it fails to start, the end of its
    log."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            list(map(str, command)), env=os.environ | settings, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        end = time.monotonic() + START_SECONDS
        while not is_well(health):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{command[0]} did not start:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(1)
        yield
    finally:
        process.terminate()
        process.wait()


def is_well(health: str) -> bool:
    try:
        return httpx.get(health).is_success
    except httpx.HTTPError:
        return False


@contextmanager
def studio(program: Path, folder: Path) -> Iterator[httpx.Client]:
    """A client of a new Label Studio, whose database is in a folder."""
    port = free_port()
    token = "0123456789abcdef"
    address = f"http://127.0.0.1:{port}"
    folder.mkdir()
    command = [
        program,
        "start",
        "--no-browser",
        "--data-dir",
        folder,
        "--internal-host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    for name, value in LOGIN.items():
        command += [f"--{name}", value]
    command += ["--user-token", token, "--enable-legacy-api-token"]
    with running(command, f"{address}/health", LOCAL, folder / "log"):
        headers = {"Authorization": f"Token {token}"}
        with httpx.Client(
            base_url=address, headers=headers, timeout=300, event_hooks={"response": [refused]}
        ) as client:
            yield client


def refused(response: httpx.Response) -> None:
    """Stop at any error, with what Label Studio says."""
    if response.is_error:
        raise SystemExit(f"{response.request.url}: {response.status_code} {response.read().decode()[:1000]}")


@contextmanager
def backend(client: httpx.Client) -> Iterator[str]:
    """The address of a backend, with a personal access token as users have."""
    port = free_port()
    token = client.post("/api/token/").json()["token"]
    command = [sys.executable, BACKEND, str(client.base_url), "--port", str(port)]
    address = f"http://127.0.0.1:{port}"
    settings = {"LABEL_STUDIO_API_KEY": token}
    with TemporaryDirectory() as folder, running(command, f"{address}/health", settings, Path(folder, "log")):
        yield address


class Project:
    """A project in Label Studio: photographs whose classes are known."""

    def __init__(self, client: httpx.Client, folder: Path) -> None:
        paths, labels = list_labelled_images(folder)
        chosen = np.linspace(0, len(paths) - 1, PHOTOS).astype(int).tolist()
        self.client = client
        self.classes = sorted({labels[i] for i in chosen})
        choices = "".join(f'<Choice value="{name}"/>' for name in self.classes)
        config = f'<View><Choices name="class" toName="image" showInline="true">{choices}</Choices>'
        config += '<Image name="image" value="$image"/></View>'
        made = {"title": "Photographs", "label_config": config, "show_collab_predictions": True}
        self.number = client.post("/api/projects", json=made).json()["id"]
        files = {str(i): (f"{i}{Path(paths[i]).suffix}", Path(paths[i]).read_bytes()) for i in chosen}
        client.post(f"/api/projects/{self.number}/import", files=files)
        self.images = {task["id"]: task["data"]["image"] for task in self.tasks()}
        position = {task: int(re.findall(r"\d+", image)[-1]) for task, image in self.images.items()}
        self.paths = {task: paths[i] for task, i in position.items()}
        self.truth = {task: labels[i] for task, i in position.items()}

    def tasks(self, **view: Any) -> list[dict[str, Any]]:
        params = {"project": self.number, "fields": "all", "page_size": PHOTOS, "query": json.dumps(view)}
        return self.client.get("/api/tasks", params=params).json()["tasks"]

    def act(self, action: str, **body: Any) -> dict[str, Any]:
        """An action of Label Studio's data manager."""
        return self.client.post("/api/dm/actions", params={"id": action, "project": self.number}, json=body).json()

    def connect(self, address: str) -> None:
        """Add the backend, as in the project's settings."""
        self.client.post("/api/ml", json={"url": address, "project": self.number, "title": "dcp_zoo"})

    def annotate(self) -> dict[int, str]:
        """Give the tasks with the lowest scores their classes; returns these by task."""
        waiting = [task["id"] for task in self.tasks(**LOWEST) if not task["is_labeled"]][:ANNOTATIONS]
        for task in waiting:
            self.submit(task)
        return {task: self.truth[task] for task in waiting}

    def submit(self, task: int) -> None:
        """Annotate a task with its class."""
        chosen = {"type": "choices", "value": {"choices": [self.truth[task]]}}
        result = [chosen | {"from_name": "class", "to_name": "image"}]
        self.client.post(f"/api/tasks/{task}/annotations", json={"result": result, "lead_time": 1})

    def retrieve(self) -> None:
        """Have Label Studio ask for predictions of all tasks."""
        self.act("retrieve_tasks_predictions", selectedItems={"all": True, "excluded": []})

    def check_predictions(self, annotated: Mapping[int, str]) -> dict[int, str]:
        """The predictions of all tasks, which Label Studio retrieves now; they must be this package's."""
        self.retrieve()
        answers = {}
        expected = dict(zip(self.paths, self.expected(annotated), strict=True))
        for task in self.tasks():
            newest = max(task["predictions"], key=lambda prediction: prediction["id"])
            answer = newest["result"][0]["value"]["choices"][0]
            row = expected[task["id"]]
            version = newest["model_version"]
            if not version.startswith(f"annotations: {len(annotated)},"):
                raise SystemExit(
                    f"Task {task['id']} has a prediction of {version}, not of {len(annotated)} annotations."
                )
            if answer != self.classes[row.argmax()] or abs(newest["score"] - row.max()) > TOLERANCE:
                raise SystemExit(f"Task {task['id']}: {answer} with {newest['score']}, not {row.round(4)}.")
            answers[task["id"]] = answer
        return answers

    def expected(self, annotated: Mapping[int, str]) -> np.ndarray:
        """This package's probabilities (n, C) for all photographs."""
        photos = list(self.paths.values())
        if not annotated:
            blank = [Image.new("RGB", (8, 8))] * len(self.classes)
            return FewShotClassifier(method="zero-shot", verbose=False).fit(blank, self.classes).predict_proba(photos)
        order = sorted(annotated, key=lambda task: self.images[task])
        classifier = FewShotClassifier(verbose=False)
        classifier.fit([self.paths[task] for task in order], [annotated[task] for task in order])
        classifier.model_.set_classnames(self.classes)
        return classifier.predict_proba(photos)

    def check_order(self) -> None:
        """The task that comes next has the lowest score of those that wait."""
        scores = {task["id"]: task["predictions_score"] for task in self.tasks() if not task["is_labeled"]}
        following = self.act("next_task", **LOWEST)["id"]
        if scores[following] > min(scores.values()):
            raise SystemExit(f"Task {following} comes next, with {scores[following]}, not {min(scores.values())}.")


def take_picture(client: httpx.Client, project: Project, output: Path) -> None:
    """A screenshot of the first photograph without an annotation, as it is shown to be labelled, in 256
    colours."""
    from playwright.sync_api import sync_playwright

    project.submit(project.act("next_task", **LOWEST)["id"])  # which was reserved, and would be shown first
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 640}, color_scheme="light")
        page.set_default_timeout(120_000)
        page.goto(f"{client.base_url}/user/login")
        page.fill("input[name=email]", LOGIN["username"])
        page.fill("input[name=password]", LOGIN["password"])
        page.click("button[type=submit]")
        page.wait_for_url("**/")
        page.goto(f"{client.base_url}/projects/{project.number}/data")
        page.get_by_text("Label All Tasks").click()
        page.get_by_text("Submit").wait_for()
        page.wait_for_timeout(5000)  # for the photograph
        screenshot = Image.open(io.BytesIO(page.screenshot())).crop((0, 0, 960, 640))
        browser.close()
    screenshot.convert("RGB").quantize(256).save(output, optimize=True)


if __name__ == "__main__":
    typer.run(main)
