"""A machine learning backend for Label Studio: it labels the photographs of a project, and learns from the
annotations.

    pip install '.[serve]'
    LABEL_STUDIO_API_KEY=TOKEN python hub/label_studio/backend.py http://127.0.0.1:8080 --model small

For projects in which one class is chosen for each image. Until images of two classes are annotated, CLIP
reads the names of the classes; from then on a text probe is fitted to all annotations, before the first
prediction after each change. README.md says more.
"""

import json
import logging
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple
from xml.etree import ElementTree

import httpx
import numpy as np
import typer
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from PIL import Image
from starlette.middleware.trustedhost import TrustedHostMiddleware

from dcp_zoo import FewShotClassifier, ZooError
from dcp_zoo.data import load_image
from dcp_zoo.data.images import in_threads
from dcp_zoo.errors import as_zoo_error
from dcp_zoo.files import MAX_BYTES, write_file
from dcp_zoo.serve import allowed_hosts, listen, server

PAGE = 100  # tasks
GRACE = 2  # seconds for requests in progress, when the server is stopped
ANNOTATED = {"filter": "filter:tasks:total_annotations", "operator": "greater", "type": "Number", "value": 0}
log = logging.getLogger("label_studio")


class Question(NamedTuple):
    """What a project asks about each image: the `Choices` of its labeling configuration."""

    name: str
    image: str  # the name of the `Image` that it is about
    field: str  # of a task's data, with the image's address
    names: dict[str, str]  # by answer, what CLIP reads

    @classmethod
    def of(cls, config: str) -> "Question":
        """ZooError for a configuration without a choice of one of several classes for an image."""
        with as_zoo_error("The labeling configuration is no XML: {}.", ElementTree.ParseError):
            root = ElementTree.fromstring(config)
        images = {tag.get("name", ""): tag.get("value", "").lstrip("$") for tag in root.iter("Image")}
        for tag in root.iter("Choices"):
            choices = [choice.attrib for choice in tag.iter("Choice") if choice.get("value")]
            names = {choice.get("alias", choice["value"]): choice["value"] for choice in choices}
            image = tag.get("toName", "")
            one = tag.get("choice", "single") != "multiple"
            if image in images and one and len(names) > 1:
                return cls(tag.get("name", ""), image, images[image], names)
        raise ZooError(
            "The labeling configuration has no choice of one class for an image. Add at least two: "
            '<Image name="image" value="$image"/> <Choices name="class" toName="image"> <Choice value="cat"/> '
            '<Choice value="dog"/> </Choices>'
        )

    def result(self, answer: str, probability: float) -> dict[str, Any]:
        """A prediction in Label Studio's format."""
        chosen = {"from_name": self.name, "to_name": self.image, "type": "choices", "value": {"choices": [answer]}}
        return {"result": [chosen | {"score": probability}], "score": probability}

    def answer(self, task: Mapping[str, Any]) -> str | None:
        """The answer of a task's latest annotation; None if there is none among the classes."""
        latest = sorted(task["annotations"], key=lambda annotation: annotation["updated_at"])
        values = [
            part["value"]["choices"][0]
            for annotation in latest
            for part in annotation["result"]
            if not annotation["was_cancelled"] and part.get("from_name") == self.name and part["value"]["choices"]
        ]
        return values[-1] if values and values[-1] in self.names else None


class PersonalToken(httpx.Auth):
    """Access to Label Studio with a personal access token, which buys a token for some minutes."""

    requires_response_body = True

    def __init__(self, studio: str, token: str) -> None:
        self.refresh = f"{studio}/api/token/refresh"
        self.token = token
        self.access = ""

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        if self.access:
            request.headers["Authorization"] = f"Bearer {self.access}"
            response = yield request
            if response.status_code != 401:
                return
        answer = yield httpx.Request("POST", self.refresh, json={"refresh": self.token})
        if answer.status_code != 200:
            raise ZooError(
                f"Label Studio refuses LABEL_STUDIO_API_KEY ({answer.status_code}): create a Personal Access Token on "
                "your account's page there."
            )
        self.access = answer.json()["access"]
        request.headers["Authorization"] = f"Bearer {self.access}"
        yield request


class LabelStudio:
    """The images and annotations of a Label Studio at this address; images are kept in `folder`."""

    def __init__(self, address: str, token: str, folder: str) -> None:
        self.address = address.rstrip("/")
        self.folder = Path(folder)
        self.client = httpx.Client(base_url=self.address, auth=PersonalToken(self.address, token), timeout=30)

    def annotations(self, project: str, question: Question) -> dict[str, str]:
        """The answers of a project's annotated tasks, by the image's address."""
        query = json.dumps({"filters": {"conjunction": "and", "items": [ANNOTATED]}})
        params: dict[str, Any] = {"project": project, "fields": "all", "query": query, "page_size": PAGE}
        found = dict[str, str]()
        for page in count(1):
            response = self.client.get("/api/tasks", params=params | {"page": page})
            tasks = response.raise_for_status().json()["tasks"]
            answers = {task["data"].get(question.field): question.answer(task) for task in tasks}
            found |= {image: answer for image, answer in answers.items() if image and answer}
            if len(tasks) < PAGE:
                break
        return found

    def images(self, addresses: Sequence[str | None]) -> dict[str, str]:
        """The files of images by their addresses; the log says why one is missing."""
        chosen = list(dict.fromkeys(filter(None, addresses)))
        return {image: path for image, path in zip(chosen, in_threads(self._image, chosen), strict=True) if path}

    def _image(self, address: str) -> str | None:
        path = self.folder / sha256(address.encode()).hexdigest()
        try:
            if not path.exists():
                write_file(path, self._download(address))
                load_image(str(path))
            return str(path)
        except (ZooError, httpx.HTTPError) as error:
            path.unlink(missing_ok=True)
            log.warning("%s has no prediction: %s", address, error)
            return None

    def _download(self, address: str) -> bytes:
        place = address.removeprefix(self.address)
        if not place.startswith("/") or place.startswith("//"):
            raise ZooError("it is elsewhere. Upload the images to Label Studio, or let it serve them as local files.")
        content = bytearray()
        with self.client.stream("GET", place) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > MAX_BYTES:
                    raise ZooError(f"it has more than {MAX_BYTES:,} bytes.")
        return bytes(content)


class Project:
    """The classifier of a project, and the answers that it is fitted to."""

    def __init__(self, number: str, config: str, studio: LabelStudio, model: str) -> None:
        self.number = number
        self.config = config
        self.studio = studio
        self.model = model
        self.question = Question.of(config)
        self.changed = True
        self.answers = dict[str, str]()
        self.fitted = ""

    def version(self) -> str:
        """What Label Studio calls the classifier for the annotations of now."""
        if self.changed:
            self.changed = False  # first, as the next annotation may come while these are read
            try:
                self.answers = self.studio.annotations(self.number, self.question)
            except BaseException:
                self.changed = True
                raise
        digest = sha256(json.dumps(self.answers, sort_keys=True).encode()).hexdigest()
        return f"annotations: {len(self.answers)}, {digest[:8]}"

    def predict(self, tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A prediction for each task, which for an image that cannot be read is empty."""
        version = self.version()
        if version != self.fitted:
            self.classifier = self._fit(self.answers)
            self.fitted = version
            log.info("Project %s, %s.", self.number, version)
        addresses = [task["data"].get(self.question.field) for task in tasks]
        files = self.studio.images(addresses)
        rows = self.classifier.predict_proba(list(files.values())) if files else np.empty((0, 0))
        found = {
            address: self.question.result(str(self.classifier.classes_[row.argmax()]), round(float(row.max()), 4))
            | {"model_version": version}
            for address, row in zip(files, rows, strict=True)
        }
        return [found.get(address, {}) for address in addresses]

    def _fit(self, answers: Mapping[str, str]) -> FewShotClassifier:
        """A classifier for all classes; CLIP reads the names of those that have no image."""
        files = self.studio.images(sorted(answers))
        names = self.question.names
        chosen = [answers[address] for address in files]
        if len(set(chosen)) < 2:  # zero-shot looks at no image
            blank = [Image.new("RGB", (8, 8))] * len(names)
            return FewShotClassifier(self.model, "zero-shot", classnames=names, verbose=False).fit(blank, list(names))
        classifier = FewShotClassifier(self.model, classnames=names, verbose=False)
        classifier.fit(list(files.values()), chosen)
        classifier.model_.set_classnames(list(names.values()))
        classifier.classes_ = np.array(list(names))
        return classifier


class Backend:
    """The projects by number."""

    def __init__(self, studio: LabelStudio, model: str) -> None:
        self.studio = studio
        self.model = model
        self.projects = dict[str, Project]()
        self.worker = ThreadPoolExecutor(1)  # fits and predicts

    def project(self, number: str, config: str) -> Project:
        """The project, begun anew if its labeling configuration has changed."""
        found = self.projects.get(number)
        if not found or found.config != config:
            found = self.projects[number] = Project(number, config, self.studio, self.model)
        return found

    def version(self, number: str, config: str) -> str:
        return self.project(number, config).version()

    def predict(self, number: str, config: str, tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return self.worker.submit(self.project(number, config).predict, tasks).result()

    def changed(self, number: str) -> None:
        """The project's annotations have changed."""
        if number in self.projects:
            self.projects[number].changed = True


def app_of(backend: Backend, hosts: list[str]) -> FastAPI:
    """Label Studio's protocol: it asks for the version by /setup, then for predictions of the tasks that
    have none of this version, and reports changes to /webhook."""
    app = FastAPI()
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)

    def number_of(project: str) -> str:
        return project.partition(".")[0]  # a time follows

    @app.exception_handler(ZooError)
    @app.exception_handler(httpx.HTTPError)
    def refuse(request: Request, error: Exception) -> JSONResponse:
        log.error(error)  # Label Studio shows no more than the status
        return JSONResponse({"detail": str(error)}, 422)

    @app.get("/")
    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "UP", "model_class": backend.model}

    @app.post("/setup")
    def setup(body: dict[str, Any]) -> dict[str, str]:
        return {"model_version": backend.version(number_of(body["project"]), body["schema"])}

    @app.post("/predict")
    def predict(body: dict[str, Any]) -> dict[str, Any]:
        return {"results": backend.predict(number_of(body["project"]), body["label_config"], body["tasks"])}

    @app.post("/webhook", status_code=201)
    def webhook(body: dict[str, Any]) -> dict[str, str]:
        if "ANNOTATION" in body["action"] or body["action"] == "START_TRAINING":
            backend.changed(str(body["project"]["id"]))
        return {"status": "ok"}

    return app


def main(
    studio: Annotated[str, typer.Argument(help="Label Studio's address.")],
    token: Annotated[str, typer.Option(envvar="LABEL_STUDIO_API_KEY", help="A personal access token.")],
    model: Annotated[str, typer.Option(help="A model of the zoo.")] = "dcp_mini",
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: int = 9090,
    allow_hosts: Annotated[list[str], typer.Option(help="Another name by which Label Studio calls.")] = [],  # noqa: B006
) -> None:
    """Serve until stopped."""
    logging.basicConfig(level=logging.WARNING)
    log.setLevel(logging.INFO)
    with TemporaryDirectory() as folder, listen(host, port) as listening:
        backend = Backend(LabelStudio(studio, token, folder), model)
        server(app_of(backend, allowed_hosts(host, allow_hosts)), GRACE).run([listening])


if __name__ == "__main__":
    typer.run(main)
