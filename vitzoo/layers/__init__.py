"""Building blocks that more than one family uses. Maps are channels-last, ``[B, H, W, C]``, everywhere in here."""

from vitzoo.layers.agent import AgentAttention
from vitzoo.layers.attention import FullAttention, MixedAttention, PatternAttention, TokenAttention
from vitzoo.layers.attentive import AttentiveConv
from vitzoo.layers.blocks import Block, PositionedBlock, PostNormBlock
from vitzoo.layers.conv import BatchNorm, ConvNorm, ConvNormStem, DeepStem, DepthwiseConv, init_by_fan_out, init_truncated
from vitzoo.layers.deformable import DeformableAttention
from vitzoo.layers.embed import (
    ConvDownsample,
    ConvStem,
    NormedPatches,
    OverlapPatchEmbed,
    PatchEmbed,
    PatchMerging,
    SpatialReduction,
)
from vitzoo.layers.exchange import exchangeable, refusal, takes_the_place_of, with_our_attention
from vitzoo.layers.ffnified import FFNifiedAttention, LargeKernel
from vitzoo.layers.grouped import GroupAttention
from vitzoo.layers.linear import DepthwiseMlp, Linear, Mlp, linear
from vitzoo.layers.linear_attention import ChannelAttention, FocusedLinearAttention
from vitzoo.layers.maps import crop_map, pad_map, resize_positions, resize_table
from vitzoo.layers.mixers import OnTokens, Slot, build_mixer, list_mixers, register_mixer
from vitzoo.layers.modulation import ScaleModulation
from vitzoo.layers.pooling import ClassAttention, ClassAttentionHead, ProjectedHead
from vitzoo.layers.reduced import ReducedAttention
from vitzoo.layers.relative import BottleneckAttention, HaloAttention
from vitzoo.layers.routed import RoutedAttention
from vitzoo.layers.slide import SlideAttention
from vitzoo.layers.windows import QueriedBlock, RelativeTable, WindowAttention

__all__ = [
    "AgentAttention",
    "AttentiveConv",
    "BatchNorm",
    "Block",
    "BottleneckAttention",
    "ChannelAttention",
    "ClassAttention",
    "ClassAttentionHead",
    "ConvDownsample",
    "ConvNorm",
    "ConvNormStem",
    "ConvStem",
    "DeepStem",
    "DeformableAttention",
    "DepthwiseConv",
    "DepthwiseMlp",
    "FFNifiedAttention",
    "FocusedLinearAttention",
    "FullAttention",
    "GroupAttention",
    "HaloAttention",
    "LargeKernel",
    "Linear",
    "MixedAttention",
    "Mlp",
    "NormedPatches",
    "OnTokens",
    "OverlapPatchEmbed",
    "PatchEmbed",
    "PatchMerging",
    "PatternAttention",
    "PositionedBlock",
    "PostNormBlock",
    "ProjectedHead",
    "QueriedBlock",
    "ReducedAttention",
    "RelativeTable",
    "RoutedAttention",
    "ScaleModulation",
    "SlideAttention",
    "Slot",
    "SpatialReduction",
    "TokenAttention",
    "WindowAttention",
    "build_mixer",
    "crop_map",
    "exchangeable",
    "init_by_fan_out",
    "init_truncated",
    "linear",
    "list_mixers",
    "pad_map",
    "refusal",
    "register_mixer",
    "resize_positions",
    "resize_table",
    "takes_the_place_of",
    "with_our_attention",
]
