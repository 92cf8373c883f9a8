"""Token reduction put around the blocks of a model from outside, and taken off again.

Every block gets a forward of its own, on the instance: no class is changed, parameters and their names stay. Between the
blocks travels a ``State``, a tuple of tensors, so that nothing is kept on modules: recomputation in gradient checkpointing,
deepcopy, pickle, torch.compile and torch.export see plain inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from timm.models import eva, vision_transformer
from torch import Tensor, nn

from vitzoo.models._contract import FeatureGetterNet, feature_take_indices
from vitzoo.models._plain import Plain
from vitzoo.tokens._map import TokenMap, rows
from vitzoo.tokens._parts import QKV, NotReducibleError, Parts, softmax_attend


class State(NamedTuple):
    """Tokens on their way through the blocks.

    Attributes:
        x: ``[B, L, C]``: prefix tokens, then what is left of the patches.
        patches: how many there were.
        size: ``[B, L]``: patches in each token; None: one in each.
        policy: ``[B, L]``: 1 for tokens that take part, 0 for those that are only still there; None: all do.
        source: ``[B, L0]``: the token that stands for each of the first ones, -1 for none; None: each for itself. Followed
            only where somebody asks for it.
        left: ``[B, L0, C]``: the last value of each of the first tokens that has no token any more.
        position: ``[B, L]``: which of the first tokens each comes from, -1 for a new one; for rotary positions.
        extra: what the method keeps for itself.
    """

    x: Tensor
    patches: int
    size: Tensor | None = None
    policy: Tensor | None = None
    source: Tensor | None = None
    left: Tensor | None = None
    position: Tensor | None = None
    extra: tuple[Any, ...] = ()

    def dense(self) -> Tensor:
        """A value for each of the first tokens: of what stands for it, or the last that it had itself: ``[B, L0, C]``."""
        if self.source is None:
            return self.x
        full = rows(self.x, self.source.clamp(min=0))
        return full if self.left is None else torch.where((self.source >= 0)[..., None], full, self.left)

    def advance(self, step: TokenMap, x: Tensor, *, follow: bool, alive: Tensor | None = None, **changes: Any) -> State:
        """The state after a reduction.

        Args:
            step: what became of the tokens.
            x: the new ones ``[B, M, C]``.
            follow: keep account of where each token went.
            alive: ``[B, M]``: places that hold a token; the others are padding.
            **changes: further new fields.

        Returns:
            The new state.
        """
        if not follow:
            return self._replace(x=x, **changes)
        source = step.source
        if alive is not None:
            there = torch.gather(alive, 1, source.clamp(min=0))
            source = torch.where((source >= 0) & there, source, -1)
        left = self.left
        if alive is not None or step.kept.shape[1] + step.moved.shape[1] < step.length:
            left = self.dense()
        if self.source is not None:
            source = torch.where(self.source >= 0, torch.gather(source, 1, self.source.clamp(min=0)), -1)
        position = step.kept if self.position is None else torch.gather(self.position, 1, step.kept)
        if step.made:
            position = torch.cat([position, position.new_full((position.shape[0], step.made), -1)], dim=1)
        return self._replace(x=x, source=source, left=left, position=position, **changes)


class Step(NamedTuple):
    """A block's place in a reduced model."""

    parts: Parts
    method: Method
    layer: int
    prefix: int


@dataclass
class Watch:
    """What a forward is asked to put aside: the dense tokens and the source after some blocks."""

    wanted: frozenset[int]
    last: int
    dense: dict[int, Tensor] = field(default_factory=dict)
    sources: dict[int, Tensor | None] = field(default_factory=dict)
    states: dict[int, State] = field(default_factory=dict)


@dataclass(eq=False)
class Method:
    """A way to reduce tokens: what it does before a block, in its attention, between attention and MLP, and after.

    A method overrides what it needs. Its fields are its options; learned parts are modules that ``attach`` puts into the
    model under the published names.
    """

    NEEDS_CLASS: ClassVar[bool] = False
    ALWAYS_FOLLOW: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.watch: Watch | None = None
        self.depth = self.prefix = 0
        self.rotary = False
        self.epoch: float | None = None
        self.noted: dict[str, Any] = {}
        self.grid: tuple[int, int] | None = None

    def watch_grid(self, model: Any) -> None:
        """Note rows and columns of patches of every image that goes into the model: ``self.grid``."""
        self.handle = model.patch_embed.register_forward_pre_hook(partial(_note_grid, self, model))

    @property
    def follow(self) -> bool:
        """Whether the source of every token is kept account of."""
        return self.ALWAYS_FOLLOW or self.rotary or self.watch is not None

    def attach(self, model: Any) -> None:
        """Look at the model, complain in one sentence (``NotReducibleError``), and add learned parts."""

    def detach(self, model: Any) -> None:
        """Take the learned parts out again."""

    def before(self, step: Step, state: State) -> State:
        """In front of a block."""
        return state

    def divides(self, step: Step, state: State) -> bool:
        """Whether this block must be taken apart; otherwise it runs as it is, to the bit."""
        raise NotImplementedError

    def mix(self, step: Step, state: State, rope: Tensor | None) -> State:
        """A divided block's attention and what follows it, up to the MLP."""
        parts = step.parts
        h = self.read(step, state.x)
        qkv = parts.project(h, rope)
        keys = state
        chosen = self.queries(step, state, qkv)
        if chosen is not None:
            tokens, alive = chosen
            x, policy = rows(state.x, tokens.kept), alive.to(state.x.dtype)
            state = state.advance(tokens, x, follow=self.follow, alive=alive, policy=policy)
            h, qkv = rows(h, tokens.kept), qkv._replace(q=rows(qkv.q, tokens.kept))
        y = parts.output(self.attend(step, keys, qkv), h)
        return self.between(step, state._replace(x=parts.add(state.x, y)), qkv)

    def read(self, step: Step, x: Tensor) -> Tensor:
        """What the attention branch reads of the residual stream."""
        return step.parts.read(x)

    def attend(self, step: Step, state: State, qkv: QKV) -> Tensor:
        """Attention ``[B, L, N, D]`` over the tokens of ``state``, which are the keys."""
        return softmax_attend(qkv, log_size(state))

    def queries(self, step: Step, state: State, qkv: QKV) -> tuple[TokenMap, Tensor] | None:
        """Tokens that alone go on as queries, and which of the places are not padding; None: all do."""
        return None

    def between(self, step: Step, state: State, qkv: QKV) -> State:
        """After the attention's residual, before the MLP."""
        return state

    def after(self, step: Step, state: State) -> State:
        """Behind a block."""
        return state

    def finish(self, state: State) -> Tensor:
        """What the last block hands to the rest of the model."""
        return state.x

    def loss(self, model: Any, images: Tensor, labels: Tensor, logits: Tensor) -> Tensor | None:
        """What the method adds to a training step's loss."""
        return None


def log_size(state: State) -> Tensor | None:
    """The bias on the keys that makes a token of n patches count n times: log n, ``[B, L]``."""
    return None if state.size is None else state.size.log()


# -- a block ------------------------------------------------------------------------------------------------------------


def run(
    step: Step, x: Tensor | State, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor | State:
    """The forward of a reduced block: a tensor goes into the first and comes out of the last, a ``State`` between."""
    if attn_mask is not None or is_causal:
        raise ValueError("a model with token reduction takes no attention mask: its tokens change from block to block.")
    method, block = step.method, step.parts.block
    state = x if isinstance(x, State) else State(x, x.shape[1] - step.prefix)
    watch = method.watch
    if watch is None or step.layer <= watch.last:
        state = method.before(step, state)
        turn = rope if rope is None else _rope_of(rope, state.position, step.prefix)
        if method.divides(step, state):
            state = method.mix(step, state, turn)
            state = state._replace(x=step.parts.feed(state.x))
        else:
            whole = type(block).forward
            state = state._replace(x=whole(block, state.x) if turn is None else whole(block, state.x, rope=turn))
        state = method.after(step, state)
        if watch is not None and step.layer in watch.wanted:
            watch.dense[step.layer], watch.sources[step.layer] = state.dense(), state.source
            watch.states[step.layer] = state
    return state if step.layer + 1 < method.depth else method.finish(state)


def _rope_of(rope: Tensor, position: Tensor | None, prefix: int) -> Tensor:
    """The rotary embeddings ``[..., P, E]`` (sines, then cosines) of the tokens that are left: ``[B, ..., M, E]``.

    A token without a position, such as EViT's fused one, is not turned.
    """
    if position is None:
        return rope
    at = position[:, prefix:] - prefix
    sine, cosine = rope[..., :1, :].chunk(2, -1)
    still = torch.cat([torch.zeros_like(sine), torch.ones_like(cosine)], dim=-1)
    table = torch.cat([rope, still], dim=-2)
    at = torch.where(at < 0, table.shape[-2] - 1, at)
    if table.ndim == 2:
        return table[at][:, None]
    if table.ndim == 3:  # by head
        table = table[None]
    table = table.expand(at.shape[0], *table.shape[1:])
    index = at[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[-1])
    return torch.gather(table, 2, index)


# -- a model ------------------------------------------------------------------------------------------------------------

METHODS: dict[str, type[Method]] = {}


def register(name: str) -> Any:
    """Class decorator: make a method known by name."""

    def known(cls: type[Method]) -> type[Method]:
        METHODS[name] = cls
        return cls

    return known


def _note_grid(method: Method, model: Any, embed: nn.Module, given: tuple[Tensor, ...]) -> None:
    method.grid = grid_of(model, given[0])


def backbone_of(model: nn.Module) -> Any:
    """The transformer in a model: itself, or what ``features_only`` wraps."""
    return model.model if isinstance(model, FeatureGetterNet) else model


def reduce(model: nn.Module, method: str | Method, **options: Any) -> nn.Module:
    """Put token reduction into a model, in place.

    Args:
        model: a ViT or DeiT of the zoo, timm's ``VisionTransformer`` or ``Eva``, or either with ``features_only``.
        method: a name of ``METHODS`` ("tome", "evit", ...), or a method built before.
        **options: options of the named method.

    Returns:
        The same model. Names in its state_dict stay; learned parts of a method add theirs. ``forward_features`` returns
        fewer tokens, ``forward_intermediates`` whole maps.

    Raises:
        ValueError: an unknown method, a model that cannot be reduced (and why), one that is reduced already.
        TypeError: an option that the method does not have.
    """
    target = backbone_of(model)
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"there is no token reduction '{method}'. There are: {', '.join(sorted(METHODS))}.")
        name, method = method, METHODS[method](**options)
    else:
        name = type(method).__name__
        if options:
            raise TypeError(f"options {', '.join(options)} go to the method that is built by name, not to a built one.")
    if is_reduced(target):
        raise ValueError("the model is reduced already. vitzoo.tokens.restore(model) takes that off first.")
    try:
        parts = _parts_of(target)
        if method.NEEDS_CLASS and getattr(target, "cls_token", None) is None:
            raise NotReducibleError("it ranks patches by what the class token attends to, and this model has no class token")
        method.depth, method.prefix = len(target.blocks), int(target.num_prefix_tokens)
        method.rotary = getattr(target, "rope", None) is not None
        method.attach(target)
    except NotReducibleError as why:
        raise ValueError(f"{type(target).__name__} cannot be reduced by '{name}': {why}.") from None
    for i, (block, part) in enumerate(zip(target.blocks, parts, strict=True)):
        block.forward = partial(run, Step(part, method, i, method.prefix))
    target.token_reduction = method
    for own in (forward_intermediates, prune_intermediate_layers, extra_loss, set_epoch):
        setattr(target, own.__name__, partial(own, target))
    return model


def options_of(wanted: str | dict[str, Any], keywords: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A method's name and its options, from what ``create_model`` was given.

    Args:
        wanted: a name, or a dict with ``name`` and options.
        keywords: further keywords; those that are options of the named method are taken out.

    Returns:
        Name and options.

    Raises:
        ValueError: a dict without a name.
    """
    if not isinstance(wanted, str):
        options = dict(wanted)
        if "name" not in options:
            raise ValueError(f"token_reduction needs a name: {{'name': 'tome', ...}}. Got {wanted}.")
        return options.pop("name"), options
    known = {field.name for field in fields(METHODS[wanted])} if wanted in METHODS else set()
    return wanted, {key: keywords.pop(key) for key in list(keywords) if key in known}


def restore(model: nn.Module) -> nn.Module:
    """Take token reduction off a model, learned parts included; returns the model. One without is left as it is."""
    target = backbone_of(model)
    if is_reduced(target):
        target.token_reduction.detach(target)
        for block in target.blocks:
            del block.forward
        for name in ("token_reduction", "forward_intermediates", "prune_intermediate_layers", "extra_loss", "set_epoch"):
            delattr(target, name)
    return model


def is_reduced(model: nn.Module) -> bool:
    """Whether a model has token reduction in it."""
    return "token_reduction" in vars(backbone_of(model))


_KNOWN = (vision_transformer.VisionTransformer.forward_features, eva.Eva.forward_features, Plain.forward_features)


def _parts_of(model: Any) -> list[Parts]:
    forward = getattr(type(model), "forward_features", None)
    if forward not in _KNOWN:
        if hasattr(model, "stages") or hasattr(model, "layers"):
            raise NotReducibleError("its windows and downsampling need the whole map; a plain transformer can lose tokens")
        raise NotReducibleError("it is no ViT of the zoo and does not run timm's VisionTransformer or Eva as published")
    if not len(model.blocks):
        raise NotReducibleError("it has no blocks")
    return [Parts(block) for block in model.blocks]


def forward_intermediates(
    model: Any,
    x: Tensor,
    indices: int | list[int] | None = None,
    return_prefix_tokens: bool = False,
    norm: bool = False,
    stop_early: bool = False,
    output_fmt: str = "NCHW",
    intermediates_only: bool = False,
    output_dict: bool = False,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Any:
    """What the blocks put out, as whole maps: every patch has the value of the token that stands for it.

    A patch whose token was dropped keeps the value that it had then.

    Args:
        model: a reduced model.
        x: image ``[B, in_chans, H, W]``.
        indices: which blocks: the last n for an int, all for None; negative ones count from the end.
        return_prefix_tokens: pair every map with its prefix tokens ``[B, prefix, C]``.
        norm: put every output through the final norm.
        stop_early: do not run blocks after the last one asked for.
        output_fmt: "NCHW" or "NLC".
        intermediates_only: return the list alone.
        output_dict: return a dict with timm's keys.
        attn_mask: not supported.
        is_causal: not supported.

    Returns:
        The outputs, or ``(normed tokens, outputs)``; the tokens are those that are left.

    Raises:
        ValueError: another ``output_fmt``, or a mask.
    """
    output_fmt = getattr(output_fmt, "value", output_fmt)
    if output_fmt not in ("NCHW", "NLC"):
        raise ValueError(f"output_fmt is 'NCHW' or 'NLC', got '{output_fmt}'.")
    if attn_mask is not None or is_causal:
        raise ValueError("a model with token reduction takes no attention mask: its tokens change from block to block.")
    method = model.token_reduction
    take, last = feature_take_indices(method.depth, indices)
    with _watching(method, take, last if stop_early else method.depth) as watch:
        final = model.forward_features(x)
    count = model.num_prefix_tokens
    prefixes, outputs = [], []
    for i in sorted(take):
        y = model.norm(watch.dense[i]) if norm else watch.dense[i]
        prefix, y = y[:, :count], y[:, count:]
        if output_fmt == "NCHW":
            height, width = grid_of(model, x)
            y = y.reshape(y.shape[0], height, width, y.shape[-1]).permute(0, 3, 1, 2).contiguous()
        prefixes.append(prefix)
        outputs.append(y)
    if output_dict:
        result = {"image_intermediates": outputs}
        result |= {"image_intermediates_prefix": prefixes} if return_prefix_tokens and count else {}
        return result if intermediates_only else {**result, "image_features": final}
    paired: list[Any] = list(zip(outputs, prefixes, strict=True)) if return_prefix_tokens and count else outputs
    return paired if intermediates_only else (final, paired)


def prune_intermediate_layers(model: Any, *args: Any, **kwargs: Any) -> list[int]:
    """As the model's own; the block that is then the last hands tokens to the rest of the model."""
    take = type(model).prune_intermediate_layers(model, *args, **kwargs)
    model.token_reduction.depth = len(model.blocks)
    return take


def extra_loss(model: Any, images: Tensor, labels: Tensor, logits: Tensor) -> Tensor | None:
    """What the reduction adds to the loss of the training step whose logits these are; None: nothing."""
    return model.token_reduction.loss(model, images, labels, logits)


def set_epoch(model: Any, epoch: float) -> None:
    """Tell the reduction how far a training is, in epochs (fractions count)."""
    model.token_reduction.epoch = epoch


def grid_of(model: Any, x: Tensor) -> tuple[int, int]:
    """Rows and columns of patches of an image ``[B, C, H, W]``."""
    size = x.shape[-2], x.shape[-1]
    if hasattr(model.patch_embed, "dynamic_feat_size"):
        return model.patch_embed.dynamic_feat_size(size)
    height, width = model.patch_embed.patch_size
    return (size[0] + height - 1) // height, (size[1] + width - 1) // width


@contextmanager
def _watching(method: Method, wanted: Any, last: int) -> Iterator[Watch]:
    method.watch = Watch(frozenset(wanted), last)
    try:
        yield method.watch
    finally:
        method.watch = None


def follow(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Where every patch is after each block: a picture of what a reduction does.

    Args:
        model: a reduced model.
        images: ``[B, in_chans, H, W]``.

    Returns:
        For each block ``[B, prefix + patches]``: the place, among the tokens that are left, of the one that stands for each
        of the first tokens; -1 where it was dropped.

    Raises:
        ValueError: the model is not reduced.
    """
    target = backbone_of(model)
    if not is_reduced(target):
        raise ValueError("the model is not reduced, so every patch is where it was. vitzoo.tokens.reduce(model, ...) does it.")
    method = target.token_reduction
    with _watching(method, range(method.depth), method.depth) as watch:
        target.forward_features(images)
    result = []
    for i in range(method.depth):
        source, dense = watch.sources[i], watch.dense[i]
        own = torch.arange(dense.shape[1], device=dense.device).expand(dense.shape[:2])
        result.append(own if source is None else source)
    return result
