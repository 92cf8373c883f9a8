"""Attention ops: each means one thing and can be run in several ways.

`attend2d` attends along a `vitzoo.patterns.Pattern` on a map, `attend` among token sequences, `attend_routed` from regions of a
map to chosen ones; `merge_lse` joins disjoint key sets, `sample2d` reads a map between its tokens. `linear_attend` attends
without a softmax, `channel_attend` among channels. `selective_scan` is a linear recurrence along the tokens.
`match` finds each token's best partner, `merge_tokens` brings tokens together and `unmerge_tokens` hands them out again.
`explain` says which implementation would run and why not the others; `using` fixes one for a block of code, `watching`
shows its calls to a function.
"""

from vitzoo.ops._dispatch import explain, using, watching
from vitzoo.ops.attend import registration as _attend_registration  # noqa: F401  defines torch.ops.vitzoo.attend
from vitzoo.ops.attend.api import attend
from vitzoo.ops.attend.point_bias import PointBias
from vitzoo.ops.attend2d import registration as _attend2d_registration  # noqa: F401  defines torch.ops.vitzoo.attend2d
from vitzoo.ops.attend2d.api import attend2d
from vitzoo.ops.attend_routed import registration as _attend_routed_registration  # noqa: F401
from vitzoo.ops.attend_routed.api import attend_routed
from vitzoo.ops.channel_attend import registration as _channel_registration  # noqa: F401  and so on
from vitzoo.ops.channel_attend.api import channel_attend
from vitzoo.ops.linear_attend import registration as _linear_registration  # noqa: F401
from vitzoo.ops.linear_attend.api import linear_attend
from vitzoo.ops.match import registration as _match_registration  # noqa: F401
from vitzoo.ops.match.api import match
from vitzoo.ops.merge import merge_lse
from vitzoo.ops.merge_tokens import registration as _merge_tokens_registration  # noqa: F401
from vitzoo.ops.merge_tokens.api import merge_tokens, unmerge_tokens
from vitzoo.ops.sample2d import registration as _sample2d_registration  # noqa: F401  defines torch.ops.vitzoo.sample2d
from vitzoo.ops.sample2d.api import sample2d
from vitzoo.ops.selective_scan import registration as _scan_registration  # noqa: F401  defines torch.ops.vitzoo.selective_scan
from vitzoo.ops.selective_scan.api import selective_scan

__all__ = [
    "PointBias",
    "attend",
    "attend2d",
    "attend_routed",
    "channel_attend",
    "explain",
    "linear_attend",
    "match",
    "merge_lse",
    "merge_tokens",
    "sample2d",
    "selective_scan",
    "unmerge_tokens",
    "using",
    "watching",
]
