"""Building blocks that more than one family uses. Maps are channels-last, ``[B, H, W, C]``, everywhere in here."""

from vitzoo.layers.attention import PatternAttention, TokenAttention
from vitzoo.layers.blocks import Block
from vitzoo.layers.embed import ConvDownsample, ConvStem, PatchEmbed, PatchMerging
from vitzoo.layers.linear import Linear, Mlp, linear
from vitzoo.layers.maps import crop_map, pad_map, resize_positions, resize_table

__all__ = [
    "Block",
    "ConvDownsample",
    "ConvStem",
    "Linear",
    "Mlp",
    "PatchEmbed",
    "PatchMerging",
    "PatternAttention",
    "TokenAttention",
    "crop_map",
    "linear",
    "pad_map",
    "resize_positions",
    "resize_table",
]
