"""The state of a training run in a file, from which a stopped or killed run resumes; on a CPU bit for bit.

The next steps depend on the trained weights, the optimizer, the scaler and the number of steps done. The
order of the images, their augmentation and all other randomness depend only on the seed and the step, see
`loop.train`.
"""

import io
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch

from dcp_zoo.errors import ZooError, as_zoo_error
from dcp_zoo.fields import Values
from dcp_zoo.files import write_file
from dcp_zoo.training.folder import STATE_NAME

SAVE_EVERY = 60.0  # seconds: little work is lost; saving 11 M weights with AdamW, 133 MB, takes a slow machine 1 to 2 s
STATE_FORMAT = 5
Log = Callable[[str], object]


def no_log(message: object) -> None:
    """Say nothing."""


class TrainingState:
    """The state of one training run: weights, optimizer and losses, and a file from which it resumes,
    written atomically every `every` seconds (0: after every step), at the end, and when the run stops
    between two steps for any reason. ZooError if the file is damaged, or the state of another run."""

    def __init__(
        self,
        path: Path | None = None,  # of the output of `torch.save`; None saves nothing
        run: Mapping[str, object] | None = None,  # plain values that identify the run
        every: float = SAVE_EVERY,
        log: Log = no_log,
    ) -> None:
        self.path = path
        self.run = {**(run or {}), "state's format": STATE_FORMAT}
        self.every = every
        self.log = log
        self._between_steps = True  # False while weights and optimizer change: they must not be saved then
        self._found = self._read()
        self.losses: list[float] = self._found.get("losses", [])  # of every completed step
        self.seconds: float = self._found.get("seconds", 0.0)  # that those of the file took
        self._saved_steps = len(self.losses)

    def begin(
        self, optimizer: torch.optim.Optimizer, precision: str, after: Callable[[int], object] = lambda step: None
    ) -> "TrainingState":
        """Start with this optimizer, what it trains, and the state of the file, if any. `after`: what belongs
        to a step, by its number, besides the optimizer's."""
        self.optimizer = optimizer
        self.precision = precision
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]
        self.after = after
        device = self.trained[0].device.type
        self.scaler = torch.amp.GradScaler(device, enabled=precision == "float16" and device != "mps")
        if self._found:
            with torch.no_grad():
                for p, value in zip(self.trained, self._found["trained"], strict=True):
                    p.copy_(value)
            optimizer.load_state_dict(self._found["optimizer"])
            self.scaler.load_state_dict(self._found["scaler"])
            self.log(f"Resuming after step {self._saved_steps}, from {self.path}")
            self._found = {}
        self._saved_at = time.perf_counter()
        self._started = self._saved_at - self.seconds
        return self

    def step(self, loss: float) -> None:
        """The end of a step: update the weights, and record its loss. If that fails, the last saved state is
        kept."""
        self._between_steps = False
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if not math.isfinite(loss):
            raise self._diverged(f"the loss of step {len(self.losses) + 1} is {loss}")
        self.after(len(self.losses))
        self.losses.append(loss)
        self._between_steps = True
        if time.perf_counter() - self._saved_at >= self.every:
            self._save()

    def _diverged(self, problem: str) -> ZooError:
        advice = f"Lower the learning rate (--set lr=..., now {self.optimizer.defaults['lr']}), or omit float16"
        return ZooError(f"Training diverged: {problem}. {advice}.")

    def __enter__(self) -> "TrainingState":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Save; an error that users can act on also says what is saved and how to resume."""
        if error is None:
            self._save()
            return
        if self._between_steps and self.losses:
            with suppress(ZooError):  # the previous state remains, and the first error is the one to report
                self._save()
        if isinstance(error, KeyboardInterrupt):
            self.log(self._with_advice("Stopped."))
        # the CPU allocator has no exception type of its own
        elif isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error):
            reason = "Out of memory: use --set batch_size=N or --precision bfloat16."
            raise ZooError(self._with_advice(reason)) from error
        elif isinstance(error, ZooError):
            raise ZooError(self._with_advice(str(error))) from error

    def _with_advice(self, problem: str) -> str:
        if not self._saved_steps or self.path is None:
            return problem
        return (
            f"{problem} The state after step {self._saved_steps} is saved in {self.path.parent}: the same command "
            "resumes from there. To start again, delete this folder."
        )

    def _save(self) -> None:
        if self.path is None:
            return
        if not all(p.isfinite().all() for p in self.trained):
            raise self._diverged(f"the weights after step {len(self.losses)} are not finite")
        state = {
            "run": self.run,
            "trained": [p.detach() for p in self.trained],
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "losses": self.losses,
            "seconds": time.perf_counter() - self._started,
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_file(self.path, buffer.getvalue(), otherwise="")  # `_advice` follows
        self._saved_steps = len(self.losses)
        self._saved_at = time.perf_counter()

    def _read(self) -> Values:
        """The file's content, checked; {} if there is no file."""
        if self.path is None or not self.path.exists():
            return {}
        with as_zoo_error(f"{self.path} is damaged. Pass --overwrite, or delete the file, to start again.", Exception):
            state: Values = torch.load(self.path, map_location="cpu", weights_only=True)
            saved = state["run"]
        names = [name for name in {**saved, **self.run} if saved.get(name) != self.run.get(name)]
        if names:
            raise ZooError(
                f"{self.path} is the state of another run, which differs in {', '.join(names)}. To resume, repeat its "
                "command; otherwise choose another --output, or pass --overwrite."
            )
        return state


def remove_state(folder: Path) -> None:
    """Remove the state of a run that has finished or is to start again, and partial files of killed runs."""
    (folder / STATE_NAME).unlink(missing_ok=True)
    for leftover in folder.glob(f".{STATE_NAME}.*"):
        leftover.unlink()
