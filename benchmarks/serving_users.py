"""The users of serving.py, for locust."""

import random

from locust import FastHttpUser, constant, events, task
from serving import photographs

PHOTOGRAPHS = photographs()
BAD = {b"": 400, b"hello": 415, PHOTOGRAPHS[0][:5000]: 422, b"x" * 20_000_001: 413}


@events.init_command_line_parser.add_listener
def add_arguments(parser):
    parser.add_argument("--bad", type=float, default=0, help="share of bad requests")


class User(FastHttpUser):
    wait_time = constant(0)

    @task
    def predict(self):
        bad = random.random() < self.environment.parsed_options.bad
        body, expected = random.choice(list(BAD.items())) if bad else (random.choice(PHOTOGRAPHS), 200)
        with self.client.post("/predict", data=body, catch_response=True) as response:
            if response.status_code == expected:
                response.success()
            else:
                response.failure(f"{response.status_code}, not {expected}")
