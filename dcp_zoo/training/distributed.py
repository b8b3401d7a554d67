"""One training run in several processes, on one machine or many, started by torchrun or `accelerate launch`.

Every process r holds a copy theta_r of the weights and takes its part of each batch. With B images in the whole batch,
the loss is

    L = sum_r L_r,    L_r = 1/B * (cross-entropy of the images of r, summed),

and each L_r depends on all images through the fused context c = 1/B * sum_r s_r(theta_r), s_r being the sum of the
vision prompts of r's images, before each coupled block in turn. A sum over processes has the sum over processes of the
gradients as its gradient, so that back-propagating L_r in every process at once leaves dL/dtheta_r, of the whole L, in
process r. All copies are equal, so dL/dtheta = sum_r dL/dtheta_r: one more sum over processes, and nothing is
approximated. DistributedDataParallel would do the same up to a factor; but it gains by sending a gradient as soon as
it is known, and CMPA's, shared by all coupled blocks, are known at the very end.

Without a launcher, every function here is a plain one for one process.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from dcp_zoo.errors import ZooError
from dcp_zoo.model.dcp import DCP

TIMEOUT = timedelta(minutes=10)  # far more than a step takes, or than processes differ in reading their images


def world_size() -> int:
    """Processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes, shows, calibrates and tests."""
    return rank() == 0


# --------------------------------------------------------------------------------------------------- start and failure


@contextmanager
def process_group(device: str, timeout: timedelta = TIMEOUT) -> Iterator[str]:
    """Join the other processes, if a launcher started several; yields the device of this one.

    An error in one of them ends all, and one of them says it: the process where it happened.

    Args:
        device: as for `pick_device`; "auto" and "cuda" become the GPU of this process's number on its machine.
        timeout: how long a process waits for the others.

    Raises:
        ZooError: no GPU for this process, or whatever is raised inside.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        yield device
        return
    device = _own_device(device)
    store = _join("nccl" if device.startswith("cuda") else "gloo", timeout)
    number, size = rank(), world_size()
    try:
        yield device
    except Exception as error:
        if not _is_first_failure(store, number):
            raise SystemExit(1) from error  # because another one failed, which says why
        if isinstance(error, ZooError):
            raise ZooError(
                f"Process {number + 1} of {size}: {error} All processes stop; the same command goes on from the last "
                "state that was saved, if there is one."
            ) from error
        raise
    dist.destroy_process_group()


def _join(backend: str, timeout: timedelta) -> Any:
    """Meet the other processes where the launcher's environment says; the store that all of them can write to."""
    try:
        store, number, size = next(iter(dist.rendezvous("env://", timeout=timeout)))
        # torchrun keeps its store when it starts failed processes again: theirs must not answer
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=timeout)
    except RuntimeError as error:
        raise ZooError(f"The processes of this run cannot reach each other: {str(error).splitlines()[0]}") from error
    return store


def _own_device(device: str) -> str:
    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return "cpu" if device == "auto" else device
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= torch.cuda.device_count():
        raise ZooError(
            f"Process {local + 1} of this machine has no GPU: it has {torch.cuda.device_count()}. Start as many "
            "processes as there are GPUs, or pass --device cpu."
        )
    torch.cuda.set_device(local)
    return f"cuda:{local}"


def _is_first_failure(store: Any, number: int) -> bool:
    try:
        return int(store.compare_set("failed", "", str(number))) == number
    except RuntimeError:  # the process that keeps the store is gone, and cannot say anything
        return True


# ----------------------------------------------------------------------------------------------------------- messages


def from_main(read: Callable[[], Any]) -> Any:
    """What the main process reads, in every process."""
    if world_size() == 1:
        return read()
    value = [read() if is_main() else None]
    _wait_for(dist.broadcast_object_list, value)
    return value[0]


def from_all(value: Any) -> list[Any]:
    """The values of all processes, in every process."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    _wait_for(dist.all_gather_object, values, value)
    return values


class _Sum(torch.autograd.Function):
    """Sum over processes. What happens to the sum in any of them counts, so its gradients are summed too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        _wait_for(dist.all_reduce, x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _Sum.forward(ctx, gradient)


def _wait_for(collective: Callable[..., Any], *args: Any) -> None:
    try:
        collective(*args)
    except RuntimeError as error:
        raise ZooError("A process of this run is gone, or did not answer in time.") from error


# ------------------------------------------------------------------------------------------------------------ training


@contextmanager
def shared_batches(model: Any, batch_size: int) -> Iterator[None]:
    """While it is open, the batches that a model trains on are parts of batches of `batch_size` images.

    Raises:
        ZooError: fewer images than processes, or a fusing that is not computed over processes.
    """
    if world_size() == 1:
        yield
        return
    if batch_size < world_size():
        raise ZooError(
            f"A batch of {batch_size} images cannot be shared by {world_size()} processes: start fewer, or raise "
            "batch_size (--set batch_size=N), which counts the images of all processes."
        )
    fusing = model.config.fusing if isinstance(model, DCP) else "mean"
    if fusing != "mean":
        raise ZooError(f"Several processes can train with fusing=mean alone, not {fusing}.")
    model.batch_mean = partial(batch_mean, batch_size=batch_size)
    try:
        yield
    finally:
        model.batch_mean = None


def batch_mean(x: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Mean over a batch of `batch_size` that the processes share: x (b, ...), parts of it -> (...)."""
    x = x.float() if x.dtype.itemsize < 4 else x  # half precision would lose digits
    return _Sum.apply(x.sum(0)) / batch_size


def sum_gradients(loss: torch.Tensor, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum the gradients over the processes, in place, and the loss."""
    if world_size() == 1:
        return loss
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([loss.detach().reshape(1), *(g.reshape(-1) for g in gradients)])
    _wait_for(dist.all_reduce, flat)
    total, *summed = flat.split([1, *(g.numel() for g in gradients)])
    for gradient, s in zip(gradients, summed, strict=True):
        gradient.copy_(s.view_as(gradient))
    return total[0]
