"""What torch lacks here: models that are built without random initialisation, a cache of what is computed from weights,
texts that tell weights and modules apart, and pooling over a stream of batches."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import reduce
from hashlib import sha256
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dcp_zoo.errors import ZooError

T = TypeVar("T")

# in-place random initialisation, called directly or through torch.nn.init
RANDOM_INIT = "normal_ uniform_ trunc_normal_ kaiming_uniform_ kaiming_normal_ xavier_uniform_ xavier_normal_".split()


class _SkipInit(TorchFunctionMode):
    """Inside this context, new modules stay uninitialised, so that all their weights must be loaded afterwards."""

    def __torch_function__(self, function: Any, types: object, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.randn:
            return torch.empty(*args, **kwargs)
        if getattr(function, "__name__", "") in RANDOM_INIT:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def skip_init(skip: bool = True) -> AbstractContextManager[object]:
    return _SkipInit() if skip else nullcontext()


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside; then every module is in the mode in which it was."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def out_of_inference_mode() -> Iterator[None]:
    """To train where the caller only computes."""
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
        yield


class WeightCache:
    """Caches one value for each change of weights, by the tensors' identity, storage, dtype, device and version
    counter, or of mode; not while gradients are enabled or code is traced. Writes that torch does not count, such as
    `parameter.data.add_(1)`, go unnoticed: write under `torch.no_grad`, as optimizers do."""

    def __init__(self) -> None:
        # the tensors, what they and all else were, and the value: in one place, as threads may share a model
        self._last: tuple[list[weakref.ref[Tensor]], object, Any] = [], None, None

    def __call__(self, compute: Callable[[], T], tensors: Iterable[Tensor], *others: object) -> T:
        """`compute()`, or its last value if `tensors` and `others` have not changed since."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return compute()
        tensors = list(tensors)
        kind = tensors[0].device.type
        mode = torch.is_inference_mode_enabled(), torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        # torch does not count writes to inference tensors
        versions = [0 if t.is_inference() else t._version for t in tensors]
        key = ([(t.data_ptr(), t.dtype, t.device) for t in tensors], versions, mode, *others)
        refs, last, value = self._last
        same = len(tensors) == len(refs) and all(r() is t for r, t in zip(refs, tensors, strict=True))
        if not same or key != last:
            value = compute()
            self._last = [weakref.ref(t) for t in tensors], key, value
        return value

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copy is empty."""
        return WeightCache, ()


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """32 hex digits for weights by name, the same on every device. It sums, as a hash of all bytes takes ten times as
    long. The first half is the sum of all 64-bit words (bytes, where their number is odd), all that earlier versions
    stored. The second is a hash of names, and of sums by row and by column: it changes if tensors, rows or columns
    change places."""
    total, digest = 0, sha256()
    for name, tensor in sorted(state.items()):
        t, size = tensor.detach(), tensor.element_size()
        in_rows = t.numel() > 0 and t.ndim > 1 and t.numel() // len(t) * size % 8 == 0
        words = t.reshape(len(t) if in_rows else 1, -1).contiguous()
        words = words.view(torch.int64 if t.numel() * size % 8 == 0 else torch.uint8)
        rows, columns = (words.sum(dim, dtype=torch.int64) for dim in (1, 0))
        total += int(rows.sum())
        digest.update(f"{name} {tuple(t.shape)}".encode())
        digest.update(torch.cat([rows, columns]).cpu().numpy().tobytes())
    return f"{total % 2**64:016x}{digest.hexdigest()[:16]}"


def construction(module: nn.Module) -> str:
    """16 hex digits of how a module is built: the kind of each of its parts, and their public settings, such as heads,
    the epsilon of a norm, the pooling, or the size of images."""
    lines = []
    for name, part in module.named_modules():
        settings = [(key, _plain(value)) for key, value in sorted(vars(part).items()) if key[0] != "_"]
        kept = [(key, value) for key, value in settings if value and key != "training"]
        lines.append(f"{name} {type(part).__module__}.{type(part).__qualname__} {kept}")
    return sha256("\n".join(lines).encode()).hexdigest()[:16]


def _plain(value: Any) -> str:
    """A setting as a text; "" for what is none, such as another module or a record."""
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_plain, value))})"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    return getattr(value, "__qualname__", "")


def pool(prompts: Tensor, pooling: str) -> Tensor:
    """The prompts (n, M, D) of a batch or of all classes -> (M, D)."""
    if pooling == "mean":
        return prompts.mean(0)
    return prompts.amax(0) if pooling == "max" else prompts[0]


def pool_stream(states: Iterable[Tensor], pooling: str) -> Tensor:
    """A stream of batches (b, M, Dv), pooled as a single batch -> (M, Dv)."""
    batches = islice(states, 1) if pooling == "first" else states
    parts = [(v.sum(0) if pooling == "mean" else pool(v, pooling), len(v)) for v in batches]
    if not parts:
        raise ZooError("store_stats needs at least one image.")
    pooled, counts = zip(*parts, strict=True)
    return reduce(torch.add, pooled) / sum(counts) if pooling == "mean" else reduce(torch.maximum, pooled)
