"""Every public path with the model on a second device: no operation mixes its tensors with the CPU's.

The machine has none: its tensors are on the CPU, but say that they are elsewhere, and an operation that
mixes them with the CPU's fails as it would on a GPU. "meta" is the only other device that every torch
accepts; in the context of `second_device`, it computes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from convert import convert_cmpa_checkpoint
from helpers import FEW_STEPS
from PIL import Image
from shared import CFG, COLORS, GOLDEN, build_tiny_clip
from test_baselines import logits_of
from test_method_heads import small
from test_tower_kinds import build_clip
from torch.utils._python_dispatch import TorchDispatchMode

import dcp_zoo
from dcp_zoo import DCP, ZooError, load_head
from dcp_zoo.prediction.heads import HeadBackend
from dcp_zoo.probe import candidates
from dcp_zoo.release.onnx import export
from dcp_zoo.training.methods import METHODS, fit_head

NAMES = ["ant", "wild_cat", "crocodile head", "emu"]
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SHORT = {"epochs": 2, "batch_size": 12, "n_ctx": 2, "depth": 2, "classifier": "none"}


pytestmark = [FEW_STEPS, pytest.mark.filterwarnings("ignore:.*to a meta parameter")]


@pytest.fixture
def device(monkeypatch) -> Iterator[torch.device]:
    """The second device, where every operation takes longer: a text probe takes few steps, and need not
    converge."""
    monkeypatch.setattr(candidates, "STEPS", 2)
    with second_device() as device:
        yield device


def test_mixing_is_found(device):
    x = torch.ones(3).to(device)
    assert (x.device, (x + 1).device, (x * torch.tensor(2.0)).cpu().tolist()) == (device, device, [2.0] * 3)
    with pytest.raises(AssertionError, match="aten.add.Tensor mixes"):
        x + torch.ones(3)
    with pytest.raises(AssertionError, match="generator"):
        torch.randn(3, device=device, generator=torch.Generator())


@pytest.mark.parametrize("kind", ["open_clip", "siglip", "clipa", "eva02", "pe"])
def test_towers(kind, golden, device):
    clip, tokenizer = (build_tiny_clip(golden), None) if kind == "open_clip" else build_clip(kind)
    model = DCP(clip.to(device), NAMES, n_ctx=3, tokenizer=tokenizer, ctx_init="a photo of")
    images = IMAGES.to(device)
    model.set_grad_checkpointing(True)
    model(images).sum().backward()
    assert all(p.grad.device == device for p in model.parameters() if p.requires_grad)
    model.store_stats([IMAGES])
    model.eval()
    with torch.no_grad():
        logits = model(images)
        assert model.fuse()(images).device == logits.device == device
        assert model.encode_text().device == device
    assert len(model.predict(IMAGES)) == 4


def test_what_a_model_offers(golden, device, tmp_path):
    clip = build_tiny_clip(golden).to(device)
    converted = convert_cmpa_checkpoint(GOLDEN / "model.pth.tar-20", classnames=golden["classnames"], clip=clip)
    converted.store_stats(golden["backbone"]["images"])
    model = DCP(build_tiny_clip(golden).to(device), NAMES, n_ctx=3, depth=2).eval()
    model.store_stats(IMAGES)
    model.pretrained_cfg, images = CFG, IMAGES.to(device)
    with pytest.raises(ZooError, match=r"Export needs a model on the CPU.*call model.cpu\(\)"):
        export(model, tmp_path / "x.onnx")
    model.forward_intermediates(images, norm=True)
    model.forward_head(model.forward_features(images))
    assert model.get_classifier().weight.device == device
    HeadBackend(model, features=True).compute(torch.randint(256, IMAGES.shape).to(torch.uint8).numpy())
    for stats in ("batch", "stored"):
        model.stats = stats
        model.predict(IMAGES)
    model.save_pretrained(tmp_path)
    load_head(model, tmp_path)
    model.set_classnames(NAMES[::-1], {name: [f"a {name}.", f"the {name}."] for name in NAMES})
    model.predict(IMAGES)


# One of each kind in every run: of features, of images that are kept, of prompts, of weights, and a text
# probe.
EVERY_RUN = {"linear-probe", "proker", "promptsrc", "clip-lora", "text-probe"}
METHODS_THERE = [
    pytest.param(name, marks=[] if name in EVERY_RUN else pytest.mark.scripts)
    for name in METHODS
    if name != "dcp"  # which is trained below
]


@pytest.mark.parametrize("method", METHODS_THERE)
def test_methods(method, clip, photos, device):
    classifier = "none" if METHODS[method].abilities.fitted else "text-probe"
    given = small(method, clip.to(device), photos, classifier=classifier)
    few = {"epochs": 1, "batch_size": 9}  # of two steps those of weights
    given.recipe = given.recipe.updated({name: n for name, n in few.items() if hasattr(given.recipe, name)})
    head = fit_head(method, given)
    assert logits_of(head, given.val).device == torch.device("cpu")
    assert {t.device for t in head.state_dict().values()} == {device}
    if method == "zero-shot":  # which reads names
        head.set_classnames([*head.classnames, "purple"])
    head.predict(IMAGES)


def test_training_and_prediction(photos, device, tmp_path):
    """In float16, whose state is the largest, of a stopped run."""
    paths, labels = [item.path for item in photos[:3]], [str(COLORS[item.label]) for item in photos[:3]]
    options = {"method": "dcp", "recipe": SHORT, "precision": "float16", "output": tmp_path, "device": device.type}
    with pytest.raises(KeyboardInterrupt):
        dcp_zoo.train("dcp_mini", paths, labels, callbacks=[Mock(side_effect=KeyboardInterrupt)], **options)
    head = dcp_zoo.train("dcp_mini", paths, labels, **options)
    assert head.device == device
    dcp_zoo.evaluate(head, paths, labels)
    dcp_zoo.predict(f"local-dir:{tmp_path}", paths[:2], device=device.type)


def test_a_head_is_on_its_own_device_again_after_it_was_asked_elsewhere(device, tmp_path):
    head, path = dcp_zoo.create_model("dcp_mini.pacs_photo-16shot", True), str(tmp_path / "red.png")
    Image.new("RGB", (200, 200), "red").save(path)
    for door in (dcp_zoo.predict, lambda head, paths, device: dcp_zoo.evaluate(head, paths, ["dog"], device=device)):
        door(head, [path], device=device.type)
        assert {t.device.type for t in (*head.parameters(), *head.buffers())} == {"cpu"}
        assert head.training


DEVICE = torch.device("meta")
CPU = torch.device("cpu")
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default, aten._copy_from.default)
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")  # take the CPU's indices


class OnDevice(torch.Tensor):
    """A tensor of the second device around one of the CPU."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "OnDevice":
        layout: dict[str, Any] = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=CPU, dispatch_device=True, **layout
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(operation, args, kwargs or {})

    def __repr__(self, **options: Any) -> str:
        return f"OnDevice({self.inner!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.__reduce_ex__(protocol)

    def tolist(self) -> Any:
        return self.inner.tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, new: "OnDevice") -> None:
        torch._C.TensorBase.data.__set__(self, new)
        self.inner = new.inner


def computed(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The result of an operation, on the device of its tensors or on the one that it asks for."""
    if operation is torch.ops.prim.device.default:
        return DEVICE
    tensors: list[torch.Tensor] = []
    mapped([*args, *kwargs.values()], tensors.append)
    ours = [t for t in tensors if isinstance(t, OnDevice)]
    asked = kwargs.get("device")
    there = bool(ours) if asked is None else torch.device(asked).type == DEVICE.type
    if operation in COPIES:
        there = isinstance(tensors[0], OnDevice) if asked is None else there
    elif ours and operation.overloadpacket.__name__ not in INDEXING:
        others = [tuple(t.shape) for t in tensors if not isinstance(t, OnDevice) and t.ndim]  # numbers may be mixed
        assert not others, f"{operation} mixes tensors of the device with the CPU's {others}"
    assert not (there and kwargs.get("generator")), f"{operation} draws on the device with the CPU's generator"
    inner_args = mapped(args, inner)
    inner_kwargs = {name: mapped(value, inner) for name, value in kwargs.items()}
    if asked is not None:
        inner_kwargs["device"] = CPU
    known = {id(t.inner): t for t in ours}  # in-place operations return their argument

    def placed(t: torch.Tensor) -> torch.Tensor:
        return known[id(t)] if id(t) in known else OnDevice(t)

    result = operation(*inner_args, **inner_kwargs)
    return mapped(result, placed) if there else result


def inner(t: torch.Tensor) -> torch.Tensor:
    return t.inner if isinstance(t, OnDevice) else t


def mapped(value: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """`value` with its tensors, which may be in lists, replaced; torch's `tree_map` takes several times as
    long."""
    if isinstance(value, torch.Tensor):
        return function(value)
    return type(value)(mapped(v, function) for v in value) if isinstance(value, (list, tuple)) else value


class Computing(TorchDispatchMode):
    """Operations without tensors of the device, which may ask for one."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(operation, args, kwargs or {})


@contextmanager
def second_device() -> Iterator[torch.device]:
    """Inside, "meta" is a second device, with the CPU's autocast, and inference mode is no_grad."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("autocast", "is_autocast_enabled", "get_autocast_dtype"):
            function = getattr(torch, name)
            patch.setattr(torch, name, lambda kind, *args, f=function, **kw: f("cpu", *args, **kw))
        make = torch.tensor  # which asks no mode
        patch.setattr(torch, "tensor", lambda values, *, device=None, **kw: make(values, **kw).to(device or CPU))
        for name in ("__enter__", "__exit__"):  # tensors without data of their own have no inference mode
            patch.setattr(torch.inference_mode, name, getattr(torch.no_grad, name))
        was = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            with Computing():
                yield DEVICE
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(was)
