"""The users of serving.py, for locust; imports little, because locust's clock runs from its start."""

import random
from pathlib import Path

from locust import FastHttpUser, constant, events, task


@events.init_command_line_parser.add_listener
def add_arguments(parser):
    parser.add_argument("--photographs", help="folder of JPEGs")


@events.init.add_listener
def read(environment, **kwargs):
    User.photographs = [path.read_bytes() for path in Path(environment.parsed_options.photographs).iterdir()]


class User(FastHttpUser):
    wait_time = constant(0)

    @task
    def predict(self):
        self.client.post("/predict", data=random.choice(self.photographs))  # another status than 200 is a failure
