"""A backend for Label Studio: classes of images before anybody has annotated, and better ones after each annotation.

    pip install 'dcp_zoo[serve]' label-studio-sdk
    python hub/label_studio/backend.py --label-studio http://localhost:8080 --token TOKEN --model dcp_vitb16

Until every class has an annotated image, CLIP answers by the class names alone; from then on a text probe answers. It
is fitted to all annotated images, again after each annotation. Each fit sends new predictions for the tasks without an
annotation to Label Studio, whose uncertainty sampling shows the least certain image next. It serves projects whose
labelling interface has one <Choices> for one <Image>.
"""

import threading
from typing import Annotated, Any

import typer
import uvicorn
from fastapi import FastAPI
from label_studio_sdk import LabelStudio
from label_studio_sdk._extensions.label_studio_tools.core.utils.io import get_local_path
from label_studio_sdk.label_interface import LabelInterface
from PIL import Image

from dcp_zoo import FewShotClassifier

REFITTED = ("ANNOTATION_CREATED", "ANNOTATION_UPDATED", "ANNOTATIONS_DELETED", "START_TRAINING")


class Project:
    """A project of Label Studio, and the classifier for its images."""

    def __init__(self, client: LabelStudio, address: str, token: str, number: int, model: str) -> None:
        self.client, self.number, self.model = client, number, model
        self.place = {"hostname": address, "access_token": token}
        interface = LabelInterface(client.projects.get(number).label_config)
        self.choices, self.image, self.field = interface.get_first_tag_occurence("Choices", "Image")
        self.names = list(interface.get_control(self.choices).labels)
        self.lock, self.waiting = threading.Lock(), threading.Event()
        self.use(FewShotClassifier(model, "zero-shot", classifier="none"), [blank() for _ in self.names], self.names)

    def use(self, classifier: FewShotClassifier, images: list[Any], labels: list[str]) -> None:
        self.classifier = classifier.fit(images, labels)
        self.version = f"{self.model}, {len(images)} annotations" if classifier.method != "zero-shot" else self.model

    def file(self, task: dict[str, Any]) -> str:
        """The image of a task, downloaded once."""
        path: str = get_local_path(task["data"][self.field], task_id=task["id"], **self.place)
        return path

    def label(self, task: dict[str, Any]) -> str | None:
        """The class that a task was annotated with last."""
        given = [part for annotation in task["annotations"] or () for part in annotation["result"] or ()]
        found = [part["value"]["choices"][0] for part in given if part["from_name"] == self.choices]
        return found[-1] if found and found[-1] in self.names else None

    def predict(self, tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Label Studio's predictions; the score is the probability."""
        if not tasks:
            return []
        probabilities = self.classifier.predict_proba([self.file(task) for task in tasks])
        rows = zip(
            self.classifier.classes_[probabilities.argmax(1)].tolist(), probabilities.max(1).tolist(), strict=True
        )
        part = {"from_name": self.choices, "to_name": self.image, "type": "choices"}
        return [
            {"result": [part | {"value": {"choices": [name]}}], "score": score, "model_version": self.version}
            for name, score in rows
        ]

    def refit(self) -> None:
        """Fit to all annotations, and predict the other tasks; one call at a time, which sees what came before it."""
        self.waiting.set()
        with self.lock:
            if not self.waiting.is_set():
                return
            self.waiting.clear()
            tasks = [task.model_dump() for task in self.client.tasks.list(project=self.number, fields="all")]
            labels = {task["id"]: label for task in tasks if (label := self.label(task))}
            if set(labels.values()) != set(self.names):
                return
            self.use(
                FewShotClassifier(self.model),
                [self.file(task) for task in tasks if task["id"] in labels],
                list(labels.values()),
            )
            others = [task for task in tasks if task["id"] not in labels]
            rows = [{"task": task["id"], **row} for task, row in zip(others, self.predict(others), strict=True)]
            if rows:
                self.client.projects.import_predictions(self.number, request=rows)
                self.client.projects.update(self.number, model_version=self.version)


def blank() -> Image.Image:
    """In place of the images that CLIP needs none of to classify by names."""
    return Image.new("RGB", (32, 32))


def application(address: str, token: str, model: str) -> FastAPI:
    """The backend's pages, as Label Studio calls them."""
    app, projects = FastAPI(), dict[int, Project]()
    client, opening = LabelStudio(base_url=address, api_key=token), threading.Lock()

    def project(number: Any) -> Project:
        number = int(str(number).partition(".")[0])  # Label Studio appends when it was made
        with opening:
            if number not in projects:
                projects[number] = Project(client, address, token, number, model)
            return projects[number]

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "UP"}

    @app.post("/setup")
    def setup(request: dict[str, Any]) -> dict[str, str]:
        projects.pop(int(str(request["project"]).partition(".")[0]), None)  # its interface may be another now
        return {"model_version": model}

    @app.post("/predict")
    def predict(request: dict[str, Any]) -> dict[str, Any]:
        return {"results": project(request["project"]).predict(request["tasks"])}

    @app.post("/webhook", status_code=201)
    def webhook(request: dict[str, Any]) -> None:
        if request["action"] in REFITTED:
            threading.Thread(target=project(request["project"]["id"]).refit).start()

    return app


def main(
    token: Annotated[str, typer.Option(help="Of a user of Label Studio: Account & Settings, Access Token.")],
    label_studio: Annotated[str, typer.Option(help="Its address.")] = "http://localhost:8080",
    model: Annotated[str, typer.Option(help="A model of the zoo; for real use dcp_vitb16.")] = "dcp_mini",
    host: str = "127.0.0.1",
    port: int = 9090,
) -> None:
    """Serve until it is stopped."""
    uvicorn.run(application(label_studio, token, model), host=host, port=port)


if __name__ == "__main__":
    typer.run(main)
