"""Token reduction: fewer tokens the deeper a plain transformer gets, on our models and on timm's.

``reduce(model, "tome", r=13)`` puts a method into a model, ``restore(model)`` takes it out. A method is a function on
tokens in a file of its own, with its learned part, if any, as a small module.
"""

from vitzoo.tokens import ats, dynamicvit, evit, fastervlm, mstm, skipvit, spa, sparsifiner, tap, tome, tps
from vitzoo.tokens._map import TokenMap
from vitzoo.tokens._method import METHODS, Method
from vitzoo.tokens._outputs import backbone_of, follow, is_reduced
from vitzoo.tokens._schedule import KeepRate, merge_schedule
from vitzoo.tokens._wrap import options_of, reduce, restore, without_reduction
from vitzoo.tokens.fastervlm import encode_and_select, select_tokens
from vitzoo.tokens.picture import draw_tokens, token_groups

__all__ = [
    "METHODS",
    "KeepRate",
    "Method",
    "TokenMap",
    "ats",
    "backbone_of",
    "draw_tokens",
    "dynamicvit",
    "encode_and_select",
    "evit",
    "fastervlm",
    "follow",
    "is_reduced",
    "merge_schedule",
    "mstm",
    "options_of",
    "reduce",
    "restore",
    "select_tokens",
    "skipvit",
    "spa",
    "sparsifiner",
    "tap",
    "token_groups",
    "tome",
    "tps",
    "without_reduction",
]
