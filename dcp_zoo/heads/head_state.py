"""The state of a head: the tensors of its checkpoint, and torch's state dict, which loads as a whole or not at all."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dcp_zoo.backbone.classes import Class, Texts, class_texts, matched
from dcp_zoo.backbone.clip import FrozenCLIP, Reading
from dcp_zoo.fields import Values
from dcp_zoo.heads.config import Abilities, HeadConfig, made, own_names
from dcp_zoo.probe.model import PREFIX, TextProbe


class HeadState(nn.Module):
    """What checkpoints and torch take from a head and bring to it. It asks a head for these:"""

    encoder: FrozenCLIP
    image_encoders: Any
    text_probe: TextProbe | None
    classes: list[Class]
    named: list[Class]
    fc: nn.Linear | None
    texts: Texts
    method: str
    abilities: Abilities
    info: Values
    pretrained_cfg: Values
    _probe_of: Callable[[Sequence[Class], int, int], TextProbe]

    @property
    @abstractmethod
    def frozen(self) -> FrozenCLIP: ...

    @property
    @abstractmethod
    def readings(self) -> list[Reading]: ...

    @property
    @abstractmethod
    def cannot_reject(self) -> str: ...

    @abstractmethod
    def _classify_into(self, classes: list[Class], texts: Texts | None) -> None:
        """`set_classnames` for classes of which some may be among the present ones."""

    @abstractmethod
    def _trained_state(self) -> dict[str, Tensor]:
        """The tensors that the method trained, by name: those of a checkpoint, besides the text probe's."""

    @abstractmethod
    def method_config(self) -> tuple[Values, Values]:
        """What `config.json` says about the method: options of the model, and values of its `dcp` block."""

    def _expected_state(self, shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`_trained_state` as a file with these tensors has it."""
        return self._trained_state()

    def _load_trained(self, state: dict[str, Tensor], config: HeadConfig) -> None:
        """Load the tensors of a checkpoint, which have been checked; its `config.json` may say more."""
        self.load_state_dict(state, strict=False)  # without CLIP

    # --- in a checkpoint ---

    def to_state(self) -> dict[str, Tensor]:
        """The trained tensors by name: the method's, the text probe's, with rows in the order of the method's classes,
        and those of the layer of `reset_classifier`."""
        layer = {} if self.fc is None else {f"fc.{name}": p.detach() for name, p in self.fc.named_parameters()}
        return self._trained_state() | ({} if self.text_probe is None else self.text_probe.tensors(self.named)) | layer

    def expected_state(self, shapes: Mapping[str, Tensor], config: HeadConfig | None = None) -> dict[str, Tensor]:
        """What `to_state` gives once a checkpoint with these shapes, and this `config.json`, is loaded: it may
        bring statistics, a text probe and a layer."""
        probe = self._probe_like(shapes, [Class(name) for name in own_names(config)] if config else self.named)
        layer: dict[str, Tensor] = {}
        if config and "named" in config["dcp"]:
            columns = self.readings[0].widths[0] if probe is None else probe.weight.shape[1]
            weight = torch.empty(len(config["label_names"]), columns, device="meta")
            layer = {"fc.weight": weight, "fc.bias": weight[:, 0]}
        return self._expected_state(shapes) | ({} if probe is None else probe.tensors()) | layer

    def from_state(self, state: dict[str, Tensor], config: HeadConfig) -> None:
        """Take over a checkpoint: tensors that match `expected_state`, and what its `config.json` says of texts and of
        training. The head keeps its classes, or gets those of the checkpoint's layer. ZooError, before any change, for
        a class without sentences."""
        block, names = config["dcp"], own_names(config)
        classes, given = matched(names, self.named), self.texts if isinstance(self.texts, Mapping) else None
        wanted, read = self.named, dict(zip(classes, block.get("read", names), strict=True))
        class_texts([read.get(one, one.read) for one in wanted], given or block["texts"])
        for one in classes:
            one.read = read[one]
        self.text_probe, self.fc = None, None
        self.classes, self.named, self.texts = classes, classes, block["texts"]  # those of the tensors
        if "fc.weight" in state:
            rows, columns = state["fc.weight"].shape
            self.fc = nn.Linear(columns, rows, device=self.encoder.device)
        self._load_trained(state, config)
        self.info = made(config)
        self._classify_into(wanted, given)
        if self.fc is not None:
            self.classes = [Class(name) for name in config["label_names"]]

    # --- in torch's state dict ---

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """torch's. The text probe has rows for the head's present classes, as in a checkpoint."""
        state, probe = super().state_dict(*args, prefix=prefix, **kwargs), self.text_probe
        if probe is not None and probe.classes != self.named:
            own = probe.tensors(self.named)
            state.update((f"{prefix}{PREFIX}{name}", own[f"{PREFIX}{name}"]) for name in ("weight", "bias", "means"))
        return state

    def _load_from_state_dict(
        self,
        state_dict: Values,
        prefix: str,
        local_metadata: Values,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """A state with a text probe brings it, and one with the method's tensors alone takes it away. What belongs to
        any other module that this head lacks is unexpected: torch would drop it, as the module's name is known."""
        own = {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)}
        if f"{PREFIX}weight" in own:
            probe = self._probe_like(own, self.named)
            if self.text_probe is None or probe is None or not self.text_probe.is_like(probe):
                self.text_probe = probe
        elif own.keys() & self._trained_state():
            self.text_probe = None
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        lacking = tuple(
            f"{path}.{name}.".removeprefix(".")
            for path, module in self.named_modules()
            for name, child in module._modules.items()
            if child is None
        )
        unexpected_keys += [f"{prefix}{name}" for name in own if name.startswith(lacking)]

    def _probe_like(self, shapes: Mapping[str, Tensor], classes: Sequence[Class]) -> TextProbe | None:
        """An empty text probe of these classes for tensors of these shapes; None if they have none."""
        if not any(name.startswith(PREFIX) for name in shapes):
            return None
        means, examples = (shapes.get(f"{PREFIX}{name}", torch.empty(0)) for name in ("means", "examples"))
        return self._probe_of(classes, means.shape[-1], len(examples)).to(self.encoder.device)
