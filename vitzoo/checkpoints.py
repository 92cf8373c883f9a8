"""From a file to a model: unwrap, rename, resize, load strictly. Nothing is unpickled that could run code.

The authors' layout, timm's layout and our own are recognised; the renaming itself is the family's ``from_published``.
"""

from __future__ import annotations

import argparse
import logging
import os
import pickle
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from vitzoo.layers.maps import resize_positions, resize_table

_log = logging.getLogger(__name__)
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module", "net", "backbone")
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")
_COUNTED = ("total_ops", "total_params")  # buffers that a profiler has left

Model = TypeVar("Model", bound=nn.Module)


def read(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file: safetensors, or PyTorch's format with ``weights_only``; its content tells which.

    Args:
        path: a ``.safetensors``, ``.pth``, ``.pt``, ``.bin`` or ``.ckpt`` file.

    Returns:
        What the file holds: a state_dict, or a training checkpoint around one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a checkpoint, is damaged, or holds objects whose loading could run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {path}.")
    if path.suffix == ".safetensors" or _is_safetensors(path):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read as safetensors ({error}). Download it again.") from error
    try:
        with torch.serialization.safe_globals(_plain()):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and plain values, and loading the rest could run code, so it was not loaded. "
            "Open it where you trust it, and save only its state_dict."
        ) from error
    except Exception as error:  # a damaged file makes torch raise RuntimeError, EOFError, IndexError, UnicodeDecodeError, ...
        raise ValueError(f"{path} cannot be read as a checkpoint ({error}). Download or save it again.") from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not a checkpoint. Save a state_dict.")
    return dict(loaded)


def _plain() -> list[Any]:
    """What training scripts put beside the weights and what only holds values: parsed arguments, numbers of NumPy."""
    scalar: Any = np.float64(0).__reduce__()[0]
    numbers = [type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")]
    return [argparse.Namespace, np.dtype, *numbers, scalar, (scalar, "numpy.core.multiarray.scalar")]


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do, with the length of a JSON header."""
    with path.open("rb") as file:
        begin = file.read(9)
    return len(begin) == 9 and begin[8:] == b"{" and int.from_bytes(begin[:8], "little") < 100_000_000


def unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state_dict inside a training checkpoint, without wrapping and without prefixes that all its keys share.

    An exponential moving average is preferred to the weights beside it, as published loaders do.

    Args:
        checkpoint: what ``read`` returned.

    Returns:
        Tensors by name.

    Raises:
        ValueError: no tensors are found.
    """
    state: Any = checkpoint
    while True:
        inner = next((state[k] for k in _WRAPPERS if isinstance(state.get(k), Mapping) and state[k]), None)
        if inner is None:
            break
        state = inner
    state = {k: value for k, value in state.items() if isinstance(value, Tensor) and k.rpartition(".")[2] not in _COUNTED}
    if not state:
        raise ValueError(f"No tensors in this checkpoint; its entries are: {', '.join(map(str, checkpoint)) or 'none'}.")
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in state)), None):
        state = {key[len(prefix) :]: value for key, value in state.items()}
    return state


def convert(checkpoint: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint in the authors', timm's or our layout as a state_dict for ``model``.

    Relative position tables and learned positions are resized where the model's are larger or smaller. Everything else
    is linear in the values, so a dict of gradients goes the same way.

    Args:
        checkpoint: a state_dict or a training checkpoint around one, or a part of it.
        model: the model it is for, one of the zoo's.

    Returns:
        Entries under the model's names. What the model does not have is kept, so that a strict load names it.
    """
    state = unwrap(checkpoint)
    own = model.state_dict()
    published = getattr(model, "from_published", None)
    if published is not None and not _is_ours(state, own):
        state = published(state, model.cfg)
    return {key: _resized(key, value, own.get(key), model) for key, value in state.items()}


def _is_ours(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    shared = sum(key in own for key in state)
    return shared == len(state) or (shared > 0 and all(key in state for key in own))


def _resized(key: str, value: Tensor, own: Tensor | None, model: nn.Module) -> Tensor:
    if own is None or own.shape == value.shape:
        return value
    if key.endswith("rel_bias") and value.ndim == 3:
        _log.info("%s: relative position table resized from %s to %s", key, tuple(value.shape[1:]), tuple(own.shape[1:]))
        return resize_table(value, (own.shape[1], own.shape[2]))
    holder = model.get_submodule(key.rpartition(".")[0]) if "." in key else model
    resize: Any = getattr(holder, "resize_state", None)
    if resize is not None:
        _log.info("%s: resized from %s to %s", key, tuple(value.shape), tuple(own.shape))
        return resize(value)
    if key.endswith("pos_embed") and value.ndim == 3:
        prefix = getattr(model, "embedded_prefix", 0)
        side = round((value.shape[1] - prefix) ** 0.5)
        if side * side + prefix == value.shape[1]:
            height, width = holder.grid_size  # type: ignore[misc]  # a pair on every module with a pos_embed
            _log.info("%s: positions resized from %dx%d to %dx%d", key, side, side, height, width)
            like = value.new_empty(1, height, width, 0)
            grid = resize_positions(value[:, prefix:], like, (side, side), antialias=True).flatten(1, 2)
            return torch.cat([value[:, :prefix], grid], dim=1)
    return value


def load(model: Model, path: str | Path, *, adapt: bool = True, needed: Container[str] | None = None) -> Model:
    """Load a checkpoint file into a model, strictly, and return the model.

    A classifier over another number of classes than the model's is left out, and the first convolution is made to take
    the model's channels: both are logged. Any other difference raises.

    Args:
        model: one of the zoo's.
        path: a file that ``read`` can read, in any layout that ``convert`` knows.
        adapt: False: other classes and channels raise as well.
        needed: the entries that the file has to have; None: all of the model's. Published dense backbones have no last norm.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read safely, or its entries are not the model's: the message names some of both.
    """
    state = convert(read(path), model)
    own = model.state_dict()
    if adapt:
        _without_other_heads(state, own)
        _with_channels(state, own, model)
    if needed is not None:
        state = {key: value for key, value in own.items() if key not in needed} | state
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    differ = [key for key in own if key in state and state[key].shape != own[key].shape]
    shapes = [f"{key} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}" for key in differ]
    if missing or unknown or shapes:
        parts = [
            f"{len(missing)} missing ({', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''})" if missing else "",
            f"{len(unknown)} unknown ({', '.join(unknown[:3])}{' ...' if len(unknown) > 3 else ''})" if unknown else "",
            f"{len(shapes)} of another shape ({'; '.join(shapes[:2])})" if shapes else "",
        ]
        raise ValueError(
            f"{path} does not fit {type(model).__name__}: {', '.join(p for p in parts if p)}. "
            "Was it saved from another variant, or with other arguments?"
        )
    model.load_state_dict(state, strict=True)
    return model


def _without_other_heads(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Take the model's own classifier where the file has one over other classes."""
    for key in sorted(key for key in state if key.split(".")[0] in ("head", "head_dist")):
        if key not in own or state[key].shape != own[key].shape:
            wanted = tuple(own[key].shape) if key in own else "no classifier"
            _log.warning("%s: left out, the file has %s, the model %s", key, tuple(state[key].shape), wanted)
            state.pop(key)
            if key in own:
                state[key] = own[key]


def _with_channels(state: dict[str, Tensor], own: Mapping[str, Tensor], model: nn.Module) -> None:
    """Make the first convolutions take the model's channels: the file's in turn, scaled so that sums keep their size."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv") or ()
    for name in [names] if isinstance(names, str) else names:
        key = f"{name}.weight"
        if key not in state or key not in own or state[key].ndim != 4:
            continue
        theirs, ours = state[key].shape[1], own[key].shape[1]
        if theirs != ours and state[key].shape[0] == own[key].shape[0]:
            _log.info("%s: made for %d channels instead of %d", key, ours, theirs)
            weight = state[key]
            turns = weight.repeat(1, -(-ours // theirs), 1, 1)[:, :ours] * (theirs / ours)
            state[key] = weight.sum(1, keepdim=True) if ours == 1 else turns  # grey is the same in every channel


def save(model: nn.Module, path: str | Path) -> None:
    """Write a model's state_dict as safetensors; the file appears as a whole or not at all.

    Args:
        model: any module whose tensors do not share memory.
        path: of the file; its folder is made where it is not there.

    Raises:
        ValueError: the file cannot be written.
    """
    from safetensors.torch import save as to_bytes

    path = Path(path)
    content = to_bytes({key: value.contiguous() for key, value in model.state_dict().items()})
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content)
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ValueError(f"{path} cannot be written ({error.strerror or error}).") from error
