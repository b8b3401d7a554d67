"""The methods besides `forward` that timm's functions and scripts call on a model."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from dcp_zoo.backbone._torch import skip_init
from dcp_zoo.backbone.classes import Class
from dcp_zoo.backbone.clip import FrozenCLIP, Linear, Reading
from dcp_zoo.backbone.inputs import Images
from dcp_zoo.backbone.towers.open_clip import Step, append_prompts, checkpointed
from dcp_zoo.errors import ZooError, check_choice, check_range
from dcp_zoo.fields import Values

Intermediate = Tensor | tuple[Tensor, Tensor]  # patches, or with the tokens before them
POOL = ("CLIP pools its class token", ("token",))  # for `check_only`
DROP_RATES = [f"{kind}drop_rate" for kind in ("", "attn_", "proj_", "pos_", "patch_")]
DROP_RATES += ["drop_path_rate", "drop_block_rate"]


class TimmContract(nn.Module):
    """timm's contract for all heads, whose classifier reads features of width F. It asks a head for these:"""

    encoder: FrozenCLIP
    pretrained_cfg: Values
    classes: list[Class]
    named: list[Class]
    fc: nn.Linear | None
    set_classnames: Callable[[Sequence[str]], None]
    encode_image: Callable[[Images], Tensor]
    classify: Callable[[Tensor], Tensor]
    linear: Callable[[], Linear]
    _own_reading: Callable[[], Reading]
    _outdate: Callable[[str], None]

    @property
    @abstractmethod
    def reads(self) -> list[Reading]: ...

    @property
    def num_classes(self) -> int:
        """C; 0 after `reset_classifier(0)`."""
        return len(self.classes)

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    @property
    def num_features(self) -> int:
        """F, the width of the features that the classifier reads."""
        return sum(sum(reading.widths) for reading in self.reads)

    @property
    def head_hidden_size(self) -> int:
        """F, the width of what `forward_head(pre_logits=True)` returns."""
        return self.num_features

    _grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each vision block and each chunk of class names in the backward pass: less memory, more time."""
        self._grad_checkpointing = enable

    def _checkpointed(self, function: Callable[..., Tensor], *args: object) -> Tensor:
        """`function(*args)`, computed again in the backward pass under gradient checkpointing."""
        return checkpointed(function, *args) if self._grad_checkpointing else function(*args)

    def forward_features(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> normalised image features (B, F)."""
        return self.encode_image(images)

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> tuple[Tensor, list[Intermediate]] | list[Intermediate]:
        """Patch tokens after the vision blocks, without the prompts: image features (B, E) as in `forward_features`,
        and a list with one entry per block, in order. ZooError for a block that does not exist, or an unknown format.

        Args:
            images: (B, 3, H, W), normalised as `create_transform` does.
            indices: None for all blocks, n for the last n, or a list of block numbers, -1 being the last.
            return_prefix_tokens: return pairs of the patches and the tokens before them, such as CLIP's class token (B,
                1, Dv).
            norm: apply CLIP's final layer norm to the outputs.
            stop_early: compute no block after the last of `indices`; the image features are then taken from that block,
                CLIP's embedding of a head that reads more.
            output_fmt: "NCHW" for maps (B, Dv, h, w), "NLC" for tokens (B, h * w, Dv).
            intermediates_only: omit the image features.
        """
        check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        tower = self.encoder.vision_tower
        blocks = take_blocks(indices, len(tower.blocks))
        stop = blocks[-1] if stop_early or intermediates_only else len(tower.blocks) - 1
        after: dict[int, Tensor] = {}  # class token, if any, and patches (B, N, Dv)
        for step, _, x in self._walk(images):
            if step.block in (*blocks, stop):
                after[step.block] = x[:, : tower.num_tokens]
            if step.block == stop:
                break
        intermediates = [tower.norm(after[i]) if norm else after[i] for i in blocks]
        patches = [x[:, tower.num_prefix :] for x in intermediates]
        if output_fmt == "NCHW":
            patches = [x.transpose(1, 2).unflatten(2, tower.grid).contiguous() for x in patches]
        outputs: list[Intermediate] = [*patches]
        if return_prefix_tokens:
            outputs = [(x, y[:, : tower.num_prefix]) for x, y in zip(patches, intermediates, strict=True)]
        if intermediates_only:
            return outputs
        features = tower.features(after[stop])
        if not stop_early and features.shape[1] < self.num_features:  # the head reads more
            features = self.forward_features(images)
        return features, outputs

    @property
    def feature_info(self) -> list[Values]:
        """timm's description of each vision block's feature map: channels, reduction and module."""
        tower = self.encoder.vision_tower
        names = [f"encoder.clip.visual.{tower.block_path}.{i}" for i in range(len(tower.blocks))]
        return [{"num_chs": tower.width, "reduction": tower.patch_size[0], "module": name} for name in names]

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Features (B, F) -> logits (B, C), or themselves with `pre_logits`. ZooError as of `encode_text`."""
        if pre_logits or self.num_classes == 0:
            return features
        return self.classify(features)

    @torch.no_grad()
    def get_classifier(self) -> nn.Module:
        """The layer of `reset_classifier`, which can be trained; else a copy of the current classifier as a linear
        layer, or an identity without classes. ZooError as of `encode_text`."""
        if self.num_classes == 0:
            return nn.Identity()
        if self.fc is not None:
            return self.fc
        weight, bias = self.linear()
        with skip_init():  # and no draw from torch's random state
            classifier = nn.Linear(self.num_features, self.num_classes, bias=bool(bias.any()), device=weight.device)
        classifier.weight.copy_(weight)
        if classifier.bias is not None:
            classifier.bias.copy_(bias)
        return classifier

    def reset_classifier(
        self, num_classes: int | Sequence[str], global_pool: str | None = None, classnames: Sequence[str] | None = None
    ) -> None:
        """Classify into other classes. ZooError for a number that is not that of `classnames`, and another pooling than
        "token".

        Args:
            num_classes: n for a fresh linear layer `fc` (n, F) on the image features, which is to be trained and reads
                no text; its classes are "class 0", "class 1", .. until `rename_class`. 0 returns image features. Names
                bring the head's own classifier back, see `set_classnames`.
            global_pool: None or "token".
            classnames: the names, beside their number.
        """
        check_only("global_pool", global_pool, *POOL)
        names = num_classes if classnames is None and not isinstance(num_classes, int) else classnames
        if names is not None:
            if isinstance(num_classes, int) and len(names) != num_classes:
                raise ZooError(f"num_classes={num_classes}, but there are {len(names)} class names: pass one of both.")
            self._replace_fc(self.named, None)
            self.set_classnames(names)
            return
        assert isinstance(num_classes, int)
        check_range("num_classes", num_classes, 0)
        classes = [Class(f"class {i}") for i in range(num_classes)]
        dtype = self.encoder.clip.logit_scale.dtype
        layer = nn.Linear(self.num_features, num_classes, device=self.device, dtype=dtype) if classes else None
        self._replace_fc(classes, layer)

    def _replace_fc(self, classes: list[Class], layer: nn.Linear | None) -> None:
        """Classify into these classes by this layer; None stands for the head's own classifier."""
        self.classes, self.fc = classes, layer
        self.pretrained_cfg["classifier"] = "text_probe" if layer is None else "fc"
        if layer is not None:
            self._outdate("the classifier was replaced")

    def _walk(self, images: Images) -> Iterator[tuple[Step, Tensor, Tensor]]:
        """Each vision block, and the tokens (B, N + M, Dv) that enter and leave it, the prompts last."""
        tower, prompted = self.encoder.vision_tower, self._own_reading().prompts
        x, prompts = tower.embed(images).x, prompted() if prompted else []
        n = x.shape[1]
        for i in range(len(tower.blocks)):
            x = append_prompts(x[:, :n], prompts[i]) if i < len(prompts) else x
            entering = x
            x = tower.block(i, x)
            yield Step(i), entering, x

    def group_matcher(self, coarse: bool = False) -> Values:
        """Layer groups for timm's layer-wise learning rates: the prompts and the frozen CLIP, then each CMPA."""
        return {"stem": r"^(?:prompts|encoder)\.", "blocks": [(r"^cmpa\.(\d+)", None)]}

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimizers do not decay: the prompts, as timm treats learned tokens."""
        return {"prompts.text", "prompts.vision"}


def check_only(argument: str, value: object, reason: str, values: tuple[object, ...]) -> None:
    """Raise ZooError unless `value` is None or one of the equivalent `values`."""
    if value not in (None, *values):
        raise ZooError(f"{argument}={value!r}: {reason}, only {values[0]!r} is supported.")


def sizes(size: int) -> tuple[object, ...]:
    """The ways in which timm writes the size of square images in RGB."""
    return size, (size, size), [size, size], (3, size, size), [3, size, size]


def take_blocks(indices: int | Sequence[int] | None, n_blocks: int) -> list[int]:
    """timm's `indices` as block numbers in order, see `forward_intermediates`; ZooError for none or a wrong one."""
    numbers = range(-indices, 0) if isinstance(indices, int) else range(n_blocks) if indices is None else indices
    blocks = sorted({i + n_blocks if i < 0 else i for i in numbers})
    if not blocks or blocks[0] < 0 or blocks[-1] >= n_blocks:
        problem = f"There are no blocks {indices!r}: the vision tower has blocks 0 to {n_blocks - 1}."
        raise ZooError(f"{problem} Pass n for the last n, or a list of block numbers, -1 being the last.")
    return blocks
