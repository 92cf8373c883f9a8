from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from timm.data import resolve_data_config

from vitzoo.data.batches import reseed
from vitzoo.data.transforms import eval_transform, keep_one_bit, train_transform

CONFIG = resolve_data_config({"input_size": (3, 32, 32)})
PICTURE = Image.fromarray(np.random.RandomState(0).randint(0, 255, (40, 40, 3), dtype=np.uint8))


def posterize_ops(transform):
    if str(getattr(transform, "name", "")).startswith("Posterize"):
        yield transform
    parts = transform if isinstance(transform, (list, tuple)) else []
    for name in ("transforms", "ops", "policy"):
        parts = [*parts, *getattr(transform, name, [])]
    for part in parts:
        yield from posterize_ops(part)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "v0", "original", "augmix-m5-w4-d2", "3a"])
def test_posterize_never_asks_for_zero_bits(policy):
    transform = train_transform(CONFIG, auto_augment=policy)
    ops = list(posterize_ops(transform))
    assert keep_one_bit(transform) == len(ops)
    for op in ops:
        for level in (0, 5, 9, 9.9, 10):
            (bits,) = op.level_fn(level, op.hparams)
            assert bits >= 1
            op.aug_fn(PICTURE, bits)  # raises with Pillow 13 where bits is 0


def test_the_usual_policy_survives_its_strongest_posterize():
    transform = train_transform(CONFIG, auto_augment="rand-m10-mstd0-inc1")
    (op,) = posterize_ops(transform)
    op.prob = 1.0
    op(PICTURE)


def test_a_picture_is_augmented_by_its_seed_alone():
    transform = train_transform(CONFIG, affine=True, auto_augment="rand-m9-mstd0.5-inc1", re_prob=1.0, re_mode="pixel")
    drawn = []
    for seed in (1, 1, 2):
        reseed(seed)
        drawn.append(transform(PICTURE))
    assert drawn[0].equal(drawn[1])
    assert not drawn[0].equal(drawn[2])
    assert drawn[0].shape == (3, 32, 32)


def test_evaluation_without_crop_keeps_the_border():
    image = np.zeros((32, 32, 3), np.uint8)
    image[0, :, :] = 255
    out = eval_transform({**CONFIG, "crop_pct": 1.0})(Image.fromarray(image))
    assert out[:, 0].min() > out[:, 1:].max()
