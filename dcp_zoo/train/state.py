"""Where a training run is, kept in a file from which a stopped run goes on as if nothing had happened.

The next steps depend on the trained weights, the optimizer, the scaler, the random states and the number of steps
done. The order of the images and their augmentation follow from the seed and the epoch alone, see `training.train`.
"""

import hashlib
import io
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dcp_zoo.errors import ZooError
from dcp_zoo.model.checkpoint import CONFIG_NAME, WEIGHTS_NAME, check_finite, replace_file
from dcp_zoo.train import distributed

STATE_NAME = "training.state"
SAVE_EVERY = 60.0  # seconds: little is lost, and 11 M weights with AdamW, 133 MB, take a slow machine 1 to 2 of them
FORMAT_VERSION = 1


class TrainingState:
    """The state of one training run, for `training.train`; what a file holds is gone on from.

    The file is written whole or not at all: after every `every` seconds, when the training is over, and when it stops
    between two steps for whatever reason. It is a sha256, a line end and what `torch.save` writes.

    Args:
        path: the file. None keeps nothing.
        run: what makes it this run and no other, in plain values; a state of another one is refused.
        every: seconds between two saved states, by a clock that never jumps; 0 saves after every step.
        say: takes messages.

    Attributes:
        losses, seconds: the loss of every step done, and when it was done, in seconds since the run began.

    Raises:
        ZooError: the file is damaged, or the state of another run.
    """

    def __init__(
        self,
        path: Path | None = None,
        run: Mapping[str, Any] | None = None,
        every: float = SAVE_EVERY,
        say: Callable[[str], object] = str,
    ) -> None:
        self.path, self.run, self.every, self.say = path, dict(run or {}), every, say
        self._found = self._read()
        self.losses: list[float] = self._found["losses"].tolist() if self._found else []
        self.seconds: list[float] = self._found["seconds"].tolist() if self._found else []
        self._kept = len(self.losses) if self._found else None  # steps done in the state that is in the file
        self._whole = True  # the weights and the optimizer are those after a whole number of steps
        self._stop = False

    # --------------------------------------------------------------------------------------------------- for `train`

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        """Take what is trained into care, and put the state of the file, if any, into it."""
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._optimizer, self._scaler = optimizer, scaler
        if self._found:
            self._restore(self._found)
            self._found = None
        self._saved = time.perf_counter()
        self._started = self._saved - (self.seconds[-1] if self.seconds else 0)

    @contextmanager
    def update(self) -> Iterator[None]:
        """Around the end of a step, where the weights change and the loss joins `losses`; a failure in it leaves the
        last saved state as it is."""
        self._whole = False
        yield
        self.seconds.append(time.perf_counter() - self._started)
        self._whole = True
        if self._stop:
            raise KeyboardInterrupt
        if self.path and time.perf_counter() - self._saved >= self.every:
            self._save()

    def __enter__(self) -> "TrainingState":
        self._handler = None
        ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # neither ignored nor somebody else's
        if self.path and ours and threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """Save, and say of an error that users can do something about what is kept and how to go on."""
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
        if error is None:
            self._save()
            return
        if self._whole and self.losses and self._kept != len(self.losses):
            with suppress(ZooError):  # then the state before it is still there, and the first error is the one to tell
                self._save()
        if self._stop or isinstance(error, KeyboardInterrupt):
            self.say(f"Stopped. {self._advice()}".rstrip())
            raise KeyboardInterrupt from error
        reason = _reason(error)
        if reason:
            raise ZooError(f"{reason} {self._advice()}".rstrip()) from error

    def _interrupt(self, *args: Any) -> None:
        """The first Ctrl-C ends the run after the step at hand; the next one at once."""
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True
        self.say("Stopping after this step; Ctrl-C again stops at once.")

    def _advice(self) -> str:
        if self._kept is None or self.path is None:
            return ""
        return (
            f"The state after step {self._kept} is kept in {self.path.parent}: without --overwrite the same command "
            "goes on from there, with it the run starts again."
        )

    # ------------------------------------------------------------------------------------------------------- the file

    def _save(self) -> None:
        if self.path is None or not distributed.is_main():
            return
        trained = {name: p.detach() for name, p in self._trained.items()}
        check_finite(trained, f"Training diverged after step {len(self.losses)}")
        state = {
            "format": FORMAT_VERSION,
            "run": self.run,
            "machine": _machine(self._trained),
            "trained": trained,
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "random": _random_states(),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "seconds": torch.tensor(self.seconds, dtype=torch.float64),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getvalue()
        checksum = hashlib.sha256(content).hexdigest().encode()
        try:
            replace_file(self.path, lambda path: Path(path).write_bytes(checksum + b"\n" + content))
        except OSError as error:
            raise ZooError(f"Cannot write the training state into {self.path.parent}: {error}. Make room.") from error
        self._kept, self._saved = len(self.losses), time.perf_counter()

    def _read(self) -> dict[str, Any] | None:
        """The checked content of the file, if there is one."""
        for number, run in enumerate(distributed.from_all(self.run)):
            different = _differences(run, self.run)
            if different:
                raise ZooError(f"Process {number + 1} was started with another command: {'; '.join(different)}.")
        path = self.path
        file = distributed.from_main(lambda: path.read_bytes() if path and path.exists() else None)
        if file is None:
            return None
        checksum, _, content = file.partition(b"\n")
        if hashlib.sha256(content).hexdigest().encode() != checksum:
            raise ZooError(f"{self.path} is damaged. Pass --overwrite, or delete the file, to start the run again.")
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if state["format"] > FORMAT_VERSION:
            raise ZooError(f"{self.path} has format {state['format']}, newer than this dcp_zoo reads: upgrade dcp_zoo.")
        different = _differences(state["run"], self.run)
        if different:
            raise ZooError(
                f"{self.path} is the state of another run: {'; '.join(different)}. To go on, repeat the command that "
                "began it; else choose another --output, or pass --overwrite to start again."
            )
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        found = {name: t.shape for name, t in state["trained"].items()}
        if found != {name: p.shape for name, p in self._trained.items()}:
            raise ZooError(f"{self.path} is the state of another model. Pass --overwrite to start the run again.")
        with torch.no_grad():
            for name, p in self._trained.items():
                p.copy_(state["trained"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        _set_random_states(state["random"])
        self.say(f"Going on after step {self._kept}, from {self.path}")
        different = _differences(state["machine"], _machine(self._trained))
        if different:
            self.say(f"Note: the last digits of the result can differ, for the run began with {'; '.join(different)}")


def remove_state(folder: Path) -> None:
    """Remove the state of a run that is finished, or to be started again, and what killed runs left half-written."""
    (folder / STATE_NAME).unlink(missing_ok=True)
    for name in (STATE_NAME, WEIGHTS_NAME, CONFIG_NAME):
        for leftover in folder.glob(f".{name}.*"):
            leftover.unlink()


# ------------------------------------------------------------------------------------------------------------- helpers


def _reason(error: BaseException) -> str | None:
    """The message of an error that users can do something about; None for a bug."""
    if isinstance(error, ZooError):
        return str(error)
    # the CPU's allocator has no exception of its own
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error):
        return "Out of memory: use --memory low, a smaller --batch-size, or --precision bfloat16."
    return None


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two tables of plain values, as "name before instead of now"; tables in them are opened."""
    different = []
    for name in {**before, **now}:
        a, b = before.get(name), now.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            different += [f"{name} {inner}" for inner in _differences(a, b)]
        elif a != b:
            different.append(f"{name} {a} instead of {b}")
    return different


def _machine(trained: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What the last bits of a result depend on beside the run itself."""
    device = next(iter(trained.values())).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    threads, processes = torch.get_num_threads(), distributed.world_size()
    return {"torch": str(torch.__version__), "device": name, "threads": threads, "processes": processes}


def _random_states() -> dict[str, Any]:
    kind, keys, *position = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *position),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
