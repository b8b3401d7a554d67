"""The backend for Label Studio, with a stand-in for it; hub/label_studio/check.py tries the real one."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from starlette.testclient import TestClient

from dcp_zoo.data.packaged import sample_images

backend = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "hub/label_studio/backend.py")))
CONFIG = (
    '<View><Image name="photo" value="$picture"/><Choices name="class" toName="photo">'
    '<Choice value="cat" alias="Minka"/><Choice value="bird of prey"/><Choice value="lake"/></Choices></View>'
)
CAT, COFFEE, OTTER, OSPREY, LAKE, FLOWERS = sample_images()


def annotation(answer: str, day: int = 1, cancelled: bool = False) -> dict:
    part = {"from_name": "class", "value": {"choices": [answer]}}
    return {"updated_at": f"2026-01-0{day}", "was_cancelled": cancelled, "result": [{"type": "relation"}, part]}


class FakeStudio:
    """Annotations by the address of an image, which is its path; those that are no files cannot be read."""

    def __init__(self) -> None:
        self.answers: dict[str, str] = {}
        self.asked = 0

    def annotations(self, project: str, question: object) -> dict[str, str]:
        self.asked += 1
        return dict(self.answers)

    def images(self, addresses: list) -> dict[str, str]:
        return {address: address for address in addresses if address and Path(address).is_file()}


@pytest.fixture
def studio() -> FakeStudio:
    return FakeStudio()


@pytest.fixture
def client(studio) -> TestClient:
    return TestClient(backend.app_of(backend.Backend(studio, "dcp_mini"), ["localhost"]), "http://localhost")


def setup(client: TestClient, config: str = CONFIG) -> str:
    response = client.post("/setup", json={"project": "7.1700000000", "schema": config})
    return response.json().get("model_version") or response.json()["detail"]


def predict(client: TestClient, *images: str | None) -> list[tuple]:
    """The version, answer and score of each image; () without a prediction."""
    tasks = [{"id": i, "data": {"picture": image}} for i, image in enumerate(images)]
    response = client.post("/predict", json={"project": "7.1700000000", "label_config": CONFIG, "tasks": tasks})
    rows = response.json()["results"]
    return [
        (row["model_version"], row["result"][0]["value"]["choices"][0], row["score"]) if row else () for row in rows
    ]


def test_it_learns_from_annotations(client, studio):
    version = setup(client)
    (before, answer, score), (_, bird, _), *unreadable = predict(client, CAT, OSPREY, "/missing.jpg", None)
    assert (answer, bird, unreadable) == ("Minka", "bird of prey", [(), ()])
    assert before == version
    assert version.startswith("annotations: 0, ")
    assert 1 / 3 < score <= 1

    studio.answers = {CAT: "bird of prey", OSPREY: "Minka", FLOWERS: "Minka", "/missing.jpg": "lake"}
    assert setup(client) == version, "nobody said that annotations have changed"
    client.post("/webhook", json={"action": "ANNOTATION_CREATED", "project": {"id": 7}})
    assert (after := setup(client)).startswith("annotations: 4, ")
    assert [row[:2] for row in predict(client, CAT, OSPREY, LAKE)] == [
        (after, "bird of prey"),
        (after, "Minka"),
        (after, "lake"),  # without an image that can be read, by its name
    ]
    assert studio.asked == 2


@pytest.mark.scripts
def test_the_latest_annotation_counts(client):
    assert setup(client, "<View>").startswith("The labeling configuration")
    question = backend.Question.of(CONFIG)
    assert (question.field, question.names["Minka"]) == ("picture", "cat")
    given = [annotation("Minka", 3), annotation("lake", 2), annotation("lake", 4, cancelled=True)]
    assert question.answer({"annotations": given}) == "Minka"
    assert question.answer({"annotations": [annotation("removed class")]}) is None
    assert question.answer({"annotations": []}) is None
