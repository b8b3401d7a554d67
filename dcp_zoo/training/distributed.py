"""One training run in several processes, on one machine or many, started by torchrun or `accelerate launch`.

Every process r holds a copy theta_r of the weights and takes its part of each batch of B images. The loss is

    L = sum_r L_r,    L_r = 1/B * (cross-entropy summed over the images of r),

and each L_r depends on all images through the pooled prompts c = 1/B * sum_r s_r(theta_r), s_r being the sum of the
vision prompts of r's images, before each coupled block in turn. The gradient of an all-reduced sum is the all-reduced
sum of the gradients, so back-propagating L_r in every process at once leaves dL/dtheta_r, of the total L, in process r.
All copies are equal, so dL/dtheta = sum_r dL/dtheta_r: one more all-reduce, without approximation.
DistributedDataParallel sends each gradient as soon as it is ready: those of CMPA, which all blocks share, come last.

Without a launcher, all functions here run in a single process, and join no process group of the user's own.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from dcp_zoo.errors import ZooError, as_zoo_error
from dcp_zoo.model.head import Head

STEP_TIMEOUT = timedelta(minutes=10)  # far longer than a step, or than processes differ in reading their images
PATIENCE = timedelta(days=7)  # while the main process alone fits the classifier and tests

_patient: Any = None  # inside `process_group`, the group of all processes with that patience


def world_size() -> int:
    """Number of processes of this run."""
    return 1 if _patient is None else dist.get_world_size()


def rank() -> int:
    """Index of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that logs, fits the classifier, tests and writes files."""
    return rank() == 0


@contextmanager
def process_group(device: str, timeout: timedelta = STEP_TIMEOUT) -> Iterator[str]:
    """Join the other processes, if a launcher started several; yields the device of this one, as for `pick_device`,
    where "auto" and "cuda" become the GPU with this process's local rank. An error in one process stops all of them,
    and only that process reports it. ZooError for no GPU, or none of the others within `timeout`."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        yield device
        return
    device = _local_device(device)
    store = _join("nccl" if device.startswith("cuda") else "gloo", timeout)
    global _patient
    _patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    number, size = rank(), world_size()
    try:
        yield device
    except Exception as error:
        if not _is_first_failure(store, number):
            raise SystemExit(1) from error  # another process failed first and reports it
        if isinstance(error, ZooError):
            advice = "All processes stop; the same command resumes from the last saved state, if there is one."
            raise ZooError(f"Process {number + 1} of {size}: {error} {advice}") from error
        raise
    finally:
        _patient = None
    dist.destroy_process_group()


def _join(backend: str, timeout: timedelta) -> Any:
    """Connect to the other processes as set by the launcher's environment; returns the store they share."""
    try:
        store, number, size = next(iter(dist.rendezvous("env://", timeout=timeout)))
        # torchrun keeps its store when it restarts failed processes: ignore entries of earlier attempts
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=timeout)
    except RuntimeError as error:
        raise ZooError(f"The processes of this run cannot reach each other: {str(error).splitlines()[0]}") from error
    return store


def _local_device(device: str) -> str:
    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return "cpu" if device == "auto" else device
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= torch.cuda.device_count():
        problem = f"Process {local + 1} of this machine has no GPU: the machine has {torch.cuda.device_count()}."
        raise ZooError(f"{problem} Start as many processes as there are GPUs, or pass --device cpu.")
    torch.cuda.set_device(local)
    return f"cuda:{local}"


def _is_first_failure(store: dist.Store, number: int) -> bool:
    try:
        return int(store.compare_set("failed", "", str(number))) == number
    except RuntimeError:  # the process that hosts the store is gone and cannot report anything
        return True


def from_main(read: Callable[[], Any]) -> Any:
    """The value that `read` returns in the main process, broadcast to every process, which may wait for it for long."""
    if world_size() == 1:
        return read()
    value = [read() if is_main() else None]
    _wait_for(dist.broadcast_object_list, value, 0, _patient)
    return value[0]


def from_all(value: object) -> list[Any]:
    """The values of all processes, gathered in every process."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    _wait_for(dist.all_gather_object, values, value)
    return values


class _Sum(torch.autograd.Function):
    """Sum over processes. Every process uses the sum, so its gradients are summed too."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        _wait_for(dist.all_reduce, x)
        return x

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        return _Sum.forward(ctx, gradient)


def _wait_for(collective: Callable[..., Any], *args: object) -> None:
    with as_zoo_error("A process of this run died or did not respond in time.", RuntimeError):
        collective(*args)


@contextmanager
def shared_batches(model: Head, sizes: Sequence[int]) -> Iterator[Callable[[int], None]]:
    """Inside this context, a model's training batches are parts of global batches of these `sizes`; the function that
    it yields is called before each batch with the size of the global one. ZooError for fewer images than processes, or
    a pooling that is not supported with several."""
    if world_size() == 1:
        yield lambda size: None
        return
    if min(sizes) < world_size():
        problem = f"A batch of {min(sizes)} images cannot be shared by {world_size()} processes"
        raise ZooError(f"{problem}: start fewer, or increase batch_size (--set batch_size=N), which all of them share.")

    def share(size: int) -> None:
        model.pool_with(partial(batch_mean, batch_size=size))

    share(sizes[0])
    try:
        yield share
    finally:
        model.pool_with(None)


def batch_mean(x: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Mean over a global batch of `batch_size`: x (b, ...), this process's part -> (...)."""
    x = x.float() if x.dtype.itemsize < 4 else x  # a sum in half precision would lose digits
    return _Sum.apply(x.sum(0)) / batch_size


def sum_gradients(loss: torch.Tensor, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum the gradients over the processes in place; returns the summed loss."""
    if world_size() == 1:
        return loss
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([loss.detach().reshape(1), *(g.reshape(-1) for g in gradients)])
    _wait_for(dist.all_reduce, flat)
    total, *summed = flat.split([1, *(g.numel() for g in gradients)])
    for gradient, s in zip(gradients, summed, strict=True):
        gradient.copy_(s.view_as(gradient))
    return total[0]
