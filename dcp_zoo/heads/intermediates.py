"""The tokens after each block of a head's image tower, as timm's feature extractors ask a model for them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import zip_longest

from torch import Tensor, nn

from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.backbone.inputs import Images
from dcp_zoo.backbone.towers import FORMATS, take_blocks
from dcp_zoo.backbone.towers.open_clip import ImageRun
from dcp_zoo.errors import ZooError, check_choice
from dcp_zoo.fields import Values


class Intermediates(nn.Module):
    """The part of timm's interface that is about blocks; `Head` is the model."""

    encoder: FrozenCLIP
    encode_image: Callable[[Images], Tensor]

    def image_prompts(self) -> list[Tensor]:
        """The prompts (M, Dv) that enter the first blocks of the image tower."""
        return []

    def _block_outputs(self, images: Images) -> Iterator[Tensor]:
        """The tokens (B, N + M, Dv) that leave each vision block, the prompts last."""
        run = ImageRun(self.encoder.vision_tower, self.encoder.enter(images).x)
        for prompts, _ in zip_longest(self.image_prompts(), run.tower.blocks):
            if prompts is not None:
                run.replace(prompts)
            run.step()
            yield run.x

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> tuple[Tensor, list[Tensor]] | list[Tensor]:
        """Patch tokens after the vision blocks, without the prompts: image features as in `forward_features`,
        and a list with one entry per block, in order. ZooError for a block that does not exist, or an
        unknown format.

        Args:
            indices: None for all blocks, n for the last n, or a list of block numbers, -1 being the last.
            norm: apply CLIP's final layer norm to the outputs.
            stop_early: compute no block after the last of `indices`, and take the image features (B, E)
                there.
            output_fmt: see `FORMATS`.
            intermediates_only: omit the image features.
        """
        check_choice("output_fmt", output_fmt, FORMATS)
        tower = self.encoder.vision_tower
        blocks = take_blocks(indices, len(tower.blocks))
        outputs = []
        for i, x in zip(range(blocks[-1] + 1), self._block_outputs(images), strict=False):
            if i in blocks:
                patches = (tower.norm(x) if norm else x)[:, tower.num_prefix : tower.num_tokens]
                if output_fmt == "NCHW":
                    patches = patches.transpose(1, 2).unflatten(2, tower.grid).contiguous()
                outputs.append(patches)
        if intermediates_only:
            return outputs
        return tower.features(x) if stop_early else self.encode_image(images), outputs

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = None, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """The numbers of these blocks, for timm's `FeatureGetterNet`. Nothing is taken out: later blocks are
        not computed there anyway, and a DCP rewrites its prompts from both towers, block by block."""
        return take_blocks(indices, len(self.encoder.vision_tower.blocks))

    @property
    def feature_info(self) -> list[Values]:
        """timm's description of each vision block's feature map: channels, reduction and module."""
        tower = self.encoder.vision_tower
        names = [f"encoder.clip.visual.{tower.block_path}.{i}" for i in range(len(tower.blocks))]
        return [{"num_chs": tower.width, "reduction": tower.patch_size[0], "module": name} for name in names]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each vision block and each chunk of class names in the backward pass: less memory, more
        time; for all heads on this CLIP."""
        for tower in ("vision_tower", "text_tower"):
            with suppress(ZooError):  # a tower without blocks
                getattr(self.encoder, tower).recomputes = enable
