"""The users of serving.py, for locust; imports little, because locust's clock runs from its start."""

import random
from pathlib import Path

from locust import FastHttpUser, constant, events, task


@events.init_command_line_parser.add_listener
def add_arguments(parser):
    parser.add_argument("--photographs", help="folder of JPEGs")
    parser.add_argument("--bad", type=float, default=0, help="share of bad requests")


@events.init.add_listener
def read(environment, **kwargs):
    User.photographs = [path.read_bytes() for path in Path(environment.parsed_options.photographs).iterdir()]
    User.bad = {b"": 400, b"hello": 415, User.photographs[0][:5000]: 422, b"x" * 20_000_001: 413}


class User(FastHttpUser):
    wait_time = constant(0)

    @task
    def predict(self):
        bad = random.random() < self.environment.parsed_options.bad
        body, expected = random.choice(list(self.bad.items())) if bad else (random.choice(self.photographs), 200)
        with self.client.post("/predict", data=body, catch_response=True) as response:
            if response.status_code == expected:
                response.success()
            else:
                response.failure(f"{response.status_code}, not {expected}")
