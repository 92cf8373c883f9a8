"""Which models the contract is run on, and models whose every part takes part."""

from __future__ import annotations

import fnmatch

import torch
from torch import Tensor, nn

import vitzoo

# The smallest models that together hold every piece of every family. Costly checks take the micro ones.
SMALL = {
    "a2mamba": ("a2mamba_micro",),
    "agent": ("agent_micro", "agent_deit_tiny"),
    "alternet": ("alternet_micro",),
    "attnet": ("attnet_micro",),
    "biformer": ("biformer_micro", "biformer_stl_micro"),
    "crossformer": ("crossformer_micro",),
    "cswin": ("cswin_micro",),
    "dat": ("dat_micro",),
    "davit": ("davit_micro",),
    "deit": ("deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"),
    "ffnet": ("ffnet_micro",),
    "flatten": ("flatten_micro",),
    "gcvit": ("gcvit_micro",),
    "glnet": ("glnet_micro",),
    "maxvit": ("maxvit_micro",),
    "moh": ("moh_micro",),
    "nat": ("nat_micro", "dinat_mini", "dinat_s_tiny", "dinat_isotropic_small", "vitrpb_small"),
    "patchconvnet": ("patchconvnet_micro",),
    "pvt": ("pvt_micro", "pvt_v2_micro"),
    "smt": ("smt_micro",),
    "soft": ("soft_micro", "soft_norm_micro"),
    "spectformer": ("spectformer_micro", "spectformer_h_micro"),
    "swin": ("swin_micro", "swinv2_micro", "swin_tiny_patch4_window7_224"),
    "tap_adl": ("tap_fan_micro", "tap_rvt_micro"),
    "twins": ("twins_micro",),
    "van": ("van_micro",),
    "vit": ("vit_micro", "vit_small_patch14_reg4_dinov2"),
}
MICRO = (
    "a2mamba_micro",
    "agent_micro",
    "alternet_micro",
    "attnet_micro",
    "biformer_micro",
    "crossformer_micro",
    "cswin_micro",
    "dat_micro",
    "davit_micro",
    "ffnet_micro",
    "flatten_micro",
    "gcvit_micro",
    "glnet_micro",
    "maxvit_micro",
    "moh_micro",
    "nat_micro",
    "patchconvnet_micro",
    "pvt_micro",
    "pvt_v2_micro",
    "smt_micro",
    "soft_micro",
    "spectformer_h_micro",
    "spectformer_micro",
    "swin_micro",
    "swinv2_micro",
    "tap_fan_micro",
    "tap_rvt_micro",
    "twins_micro",
    "van_micro",
    "vit_micro",
)


SAMPLED = ("nat_micro", "swin_micro", "vit_micro")
"""For what a costlier test of every micro model nearly covers: a map, a padded map, tokens."""


def chosen(patterns: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Names for the contract, for its costly part, for a sample of that: small ones, or all listed names that match."""
    if not patterns:
        return [name for names in SMALL.values() for name in names], list(MICRO), list(SAMPLED)
    names = [name for name in vitzoo.list_models() if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
    return names, names, names


def build(name: str, **kwargs: object) -> nn.Module:
    """A model in eval mode whose parameters and batch statistics are all off their initial value.

    A layer scale of 1e-5, a norm of zero or a bias table of zeros would hide what stands behind it.
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        model = vitzoo.create_model(name, **kwargs)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 1.5)
    return model.eval()


def image(height: int = 64, width: int = 80, batch: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(2))


# families whose maps are rounded down, and why
FLOORED = {"twins_*": "as published, patches are cut from the map as far as they go"}


def map_side(name: str, size: int, stride: int) -> int:
    """Rows (or columns) of a map at ``stride`` of an image of ``size``: all are rounded up, but for ``FLOORED``."""
    return size // stride if any(fnmatch.fnmatchcase(name, p) for p in FLOORED) else ceil_div(size, stride)


def ceil_div(size: int, stride: int) -> int:
    return -(-size // stride)
