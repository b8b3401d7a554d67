"""Helpers for torch: models that are built without random initialisation, a cache of values that are
computed from weights, hashes of weights and of modules, pooling over a stream of batches, and random
states."""

import random
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from hashlib import sha256
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dcp_zoo.errors import ZooError

T = TypeVar("T")
CPU = torch.device("cpu")

SETTINGS = (int, float, str, type(None))
# in-place random initialisation, called directly or through torch.nn.init
RANDOM_INIT = "normal_ uniform_ trunc_normal_ kaiming_uniform_ kaiming_normal_ xavier_uniform_ xavier_normal_".split()


class _SkipInit(TorchFunctionMode):
    """Inside this context, new modules stay uninitialised, so that all their weights must be loaded
    afterwards."""

    def __torch_function__(self, function: Any, types: object, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.randn:
            return torch.empty(*args, **kwargs)
        if getattr(function, "__name__", "") in RANDOM_INIT:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def layer_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with these parameters, for which nothing is drawn."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


def skip_init(skip: bool = True) -> AbstractContextManager[object]:
    return _SkipInit() if skip else nullcontext()


_modes_lock = Lock()
_users: Counter[nn.Module] = Counter()  # how many contexts a module is in
_was_training: dict[nn.Module, bool] = {}  # before the first of them


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """A context in which a model is in eval mode; then every module is in the mode in which it was, once all
    threads that share it have left."""
    modules = list(model.modules())
    with _modes_lock:
        for module in modules:
            _users[module] += 1
            _was_training.setdefault(module, module.training)
        model.eval()
    try:
        yield
    finally:
        with _modes_lock:
            for module in modules:
                _users[module] -= 1
                if _users[module] == 0:
                    del _users[module]
                    module.training = _was_training.pop(module)


@contextmanager
def out_of_inference_mode() -> Iterator[None]:
    """A context in which a model can be trained, though the caller may be in inference mode."""
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
        yield


class WeightCache:
    """Caches one value for each change of weights, by the tensors' identity, storage, dtype, device and
    version counter, or of mode; not while gradients are enabled or code is traced. Writes that torch does
    not count, such as `parameter.data.add_(1)`, go unnoticed: write under `torch.no_grad`, as optimizers
    do."""

    def __init__(self) -> None:
        # the tensors, the key and the value: assigned at once, as threads may share a model
        self._last: tuple[list[weakref.ref[Tensor]], object, Any] = ([], None, None)

    def __call__(self, compute: Callable[[], T], tensors: Iterable[Tensor], *others: object) -> T:
        """`compute()`, or its last value if `tensors` and `others` have not changed since."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return compute()
        tensors = list(tensors)
        device = tensors[0].device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        states = []
        for t in tensors:
            version = 0 if t.is_inference() else t._version  # torch does not count writes to inference tensors
            states.append((t.data_ptr(), t.dtype, t.device, version))
        key = (states, torch.is_inference_mode_enabled(), autocast, *others)
        refs, last_key, value = self._last
        is_same = len(tensors) == len(refs) and all(ref() is t for ref, t in zip(refs, tensors, strict=True))
        if not is_same or key != last_key:
            value = compute()
            self._last = ([weakref.ref(t) for t in tensors], key, value)
        return value

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copy is empty."""
        return WeightCache, ()


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """32 hex digits for weights by name, the same on every device. It sums, as a hash of all bytes takes ten
    times as long. The first half is the sum of all 64-bit words (bytes, where their number is odd). The
    second is a hash of names, and of sums by row and by column: it changes if tensors, rows or columns
    change places."""
    total = 0
    digest = sha256()
    for name, tensor in sorted(state.items()):
        t = tensor.detach()
        has_whole_words = t.nbytes % 8 == 0
        has_whole_rows = t.numel() > 0 and t.ndim > 1 and t.nbytes // len(t) % 8 == 0
        words = t.reshape(len(t) if has_whole_rows else 1, -1).contiguous()
        words = words.view(torch.int64 if has_whole_words else torch.uint8)
        rows = words.sum(1, dtype=torch.int64)
        columns = words.sum(0, dtype=torch.int64)
        total += int(rows.sum())
        digest.update(f"{name} {tuple(t.shape)}".encode())
        digest.update(torch.cat([rows, columns]).cpu().numpy().tobytes())
    return f"{total % 2**64:016x}{digest.hexdigest()[:16]}"


def construction(module: nn.Module) -> str:
    """16 hex digits of how a module is built: the kind of each of its parts, and their public settings, such
    as heads, the epsilon of a norm, the pooling, or the size of images."""
    lines = []
    for name, part in module.named_modules():
        lines.append(f"{name} {type(part).__module__}.{type(part).__qualname__}")
        for key, value in sorted(vars(part).items()):
            values = value if isinstance(value, (list, tuple)) else [value]
            is_plain = all(isinstance(each, SETTINGS) for each in values)
            if is_plain and key != "training" and not key.startswith("_"):
                lines.append(f"{key} {value}")
    return sha256("\n".join(lines).encode()).hexdigest()[:16]


def pool(prompts: Tensor, pooling: str) -> Tensor:
    """The prompts (n, M, D) of a batch or of all classes -> (M, D)."""
    if pooling == "mean":
        return prompts.mean(0)
    if pooling == "max":
        return prompts.amax(0)
    return prompts[0]


def pool_stream(states: Iterable[Tensor], pooling: str) -> Tensor:
    """A stream of batches (b, M, Dv), pooled as a single batch -> (M, Dv)."""
    count = 0
    pooled: list[Tensor] = []
    for batch in states:
        count += len(batch)
        pooled.append(batch.sum(0) if pooling == "mean" else pool(batch, pooling))
        if pooling == "first":
            break
    if not pooled:
        raise ZooError("store_stats needs at least one image.")
    return sum(pooled[1:], pooled[0]) / count if pooling == "mean" else pool(torch.stack(pooled), pooling)


@contextmanager
def seeded(seed: int, device: torch.device = CPU) -> Iterator[None]:
    """A context in which Python, NumPy and torch, here and on this device, draw from this seed; then as
    before."""
    states = [] if device.type in ("cpu", "meta") else [device]
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    with torch.random.fork_rng(states, device_type=device.type if states else "cpu"):
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        if states:  # `manual_seed` is for the current GPU, which may be another; there is one "mps" only
            accelerator = getattr(torch, device.type)
            with accelerator.device(device) if hasattr(accelerator, "device") else nullcontext():
                accelerator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
