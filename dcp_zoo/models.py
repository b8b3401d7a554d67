"""The zoo's models as functions, as timm has its own: `from dcp_zoo.models import dcp_vitb16`, then
`dcp_vitb16(pretrained="imagenet-16shot")`; arguments are those of `dcp_zoo.create_model`."""

from dcp_zoo.zoo.dcp import model_entrypoint
from dcp_zoo.zoo.registry import MODELS

__all__ = list(MODELS)  # pyright: ignore[reportUnsupportedDunderAll]

(
    dcp_vitb32,
    dcp_vitb16,
    dcp_vitl14,
    dcp_vitl14_336,
    dcp_datacomp_b32,
    dcp_datacomp_b32_256,
    dcp_datacomp_b16,
    dcp_datacomp_l14,
    dcp_siglip_b16,
    dcp_siglip_b16_256,
    dcp_siglip_l16,
    dcp_siglip_so400m,
    dcp_siglip2_b32,
    dcp_siglip2_b16,
    dcp_siglip2_l16,
    dcp_siglip2_so400m,
    dcp_siglip2_gopt,
    dcp_pe_b16,
    dcp_pe_l14_336,
    dcp_eva02_b16,
    dcp_eva02_l14,
    dcp_mobileclip2_b,
    dcp_mobileclip2_l14,
    dcp_dfn_b16,
    dcp_dfn_l14,
    dcp_dfn_h14,
    dcp_metaclip_b16,
    dcp_metaclip_l14,
    dcp_metaclip2_h14,
    dcp_laion_b32,
    dcp_laion_b16,
    dcp_laion_l14,
    dcp_laion_h14,
    dcp_laion_bigg14,
    dcp_mini,
) = map(model_entrypoint, MODELS)
