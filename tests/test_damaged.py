"""Damaged inputs: pictures, checkpoints, configs. Each is read, or refused in one sentence; none hangs, none runs code."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import vitzoo
from tests.test_train import QUICK, train  # noqa: F401  # a fixture
from tests.wrong_configs import ARGUMENTS, FILES
from vitzoo.data import UserError
from vitzoo.data.images import read_image
from vitzoo.tasks.checkpointing import AtomicCheckpointIO
from vitzoo.tasks.tuning import load_weights

KINDS = {"jpg": "JPEG", "png": "PNG", "gif": "GIF", "webp": "WEBP", "tif": "TIFF", "bmp": "BMP", "ppm": "PPM"}


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds one row of it."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")


def pictures() -> dict[str, tuple[bytes, bool | None]]:
    """Content and whether it must be read (None: either) by file name."""
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 255, (48, 40, 3), dtype=np.uint8))
    found: dict[str, tuple[bytes, bool | None]] = {}
    draw = random.Random(0)
    for end, kind in KINDS.items():
        whole = encoded(noise, kind)
        found[f"whole.{end}"] = whole, True
        found[f"wrong_name_{end}.{'png' if end != 'png' else 'jpg'}"] = whole, True
        found[f"empty.{end}"] = b"", False
        found[f"text.{end}"] = b"this is not a picture\n" * 20, False
        found[f"header.{end}"] = whole[:24], False
        for share in (0.1, 0.5, 0.9):
            found[f"cut_{share}.{end}"] = whole[: int(share * len(whole))], None if kind == "TIFF" else False
        for number in range(4):
            broken = bytearray(whole)
            broken[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            found[f"bit_{number}.{end}"] = bytes(broken), None
        found[f"zeros.{end}"] = bytes(len(whole)), False
        found[f"one_pixel.{end}"] = encoded(Image.new("RGB", (1, 1)), kind), True
        found[f"line.{end}"] = encoded(Image.new("RGB", (1, 500)), kind), True
    grey = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    found["16_bit.png"] = encoded(Image.fromarray(grey), "PNG"), True
    found["16_bit.tif"] = encoded(Image.fromarray(grey), "TIFF"), True
    found["cmyk.jpg"] = encoded(noise.convert("CMYK"), "JPEG"), True
    found["float.tif"] = encoded(Image.fromarray(np.ones((5, 4), np.float32)), "TIFF"), True
    for mode in ("1", "L", "LA", "P", "RGBA"):
        found[f"mode_{mode}.png"] = encoded(noise.convert("L").convert(mode), "PNG"), True
    found["clear_palette.png"] = encoded(noise.convert("P"), "PNG", transparency=3), True
    frames = {"save_all": True, "append_images": [noise.rotate(90), noise]}
    for end in ("gif", "webp", "png", "tif"):
        found[f"animated.{end}"] = encoded(noise, KINDS[end], **frames), True
    found["wide.png"] = encoded(Image.new("1", (20_000, 3)), "PNG"), True
    found["huge.png"] = png_of(20_000, 20_000), False
    found["absurd.png"] = png_of(2**31 - 1, 2**31 - 1), False
    found["no_width.png"] = png_of(0, 5), False
    return found


PICTURES = pictures()


@pytest.mark.parametrize("name", PICTURES)
def test_a_damaged_picture_is_read_or_named(tmp_path, name):
    content, readable = PICTURES[name]
    (tmp_path / name).write_bytes(content)
    image, said = None, ""
    try:
        image = read_image(tmp_path / name)
    except UserError as error:
        said = str(error)
    if image is None:
        assert not readable
        assert name in said
        assert "\n" not in said
    else:
        assert readable is not False
        assert image.mode == "RGB"
        assert min(image.size) > 0


class Runs:
    """Unpickled, it calls something with arguments."""

    def __init__(self, call, *given):
        self.call, self.given = call, given

    def __reduce__(self):
        return self.call, self.given


def checkpoints(marker: str) -> dict[str, bytes]:
    model = vitzoo.create_model("nat_micro", num_classes=2)
    file = io.BytesIO()
    torch.save({"state_dict": {f"model.{k}": v for k, v in model.state_dict().items()}, "loops": {}}, file)
    whole = file.getvalue()
    hostile = {
        "system": Runs(os.system, f"touch {marker}"),
        "eval": Runs(eval, f"open({marker!r}, 'w')"),
        "exec": Runs(exec, f"open({marker!r}, 'w')"),
        "open": Runs(open, marker, "w"),
        "mkdir": Runs(os.mkdir, marker),
        "getattr": Runs(getattr, Runs(__import__, "os"), "system"),
    }
    found = {
        "empty.ckpt": b"",
        "text.ckpt": b"no checkpoint\n" * 9,
        "zip.ckpt": b"PK\x05\x06" + bytes(18),
        "zeros.ckpt": bytes(4096),
    }
    found |= {f"cut_{share}.ckpt": whole[: int(share * len(whole))] for share in (0.001, 0.1, 0.5, 0.9, 0.999)}
    for what, bomb in hostile.items():
        for form, options in (("zip", {}), ("old", {"_use_new_zipfile_serialization": False})):
            file = io.BytesIO()
            torch.save({"state_dict": {"x": torch.zeros(1), "y": bomb}}, file, **options)
            found[f"{what}_{form}.ckpt"] = file.getvalue()
        found[f"{what}_pickle.pth"] = pickle.dumps(bomb)
    found |= {"number.ckpt": pickle.dumps(3), "short.safetensors": b"\x08", "huge.safetensors": b"\xff" * 8 + b"{}"}
    found["lies.safetensors"] = struct.pack("<Q", 60) + b'{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,99999]}}  '
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return SimpleNamespace(marker=folder / "code_ran", contents=checkpoints(str(folder / "code_ran")), folder=folder)


def test_a_broken_or_hostile_checkpoint_is_refused_and_runs_nothing(files):
    assert len(files.contents) > 30
    model = vitzoo.create_model("nat_micro", num_classes=2)
    for name, content in files.contents.items():
        path = files.folder / name
        path.write_bytes(content)
        for load in (AtomicCheckpointIO().load_checkpoint, lambda path: load_weights(model, str(path))):
            with pytest.raises(UserError) as refused:
                load(path)
            assert name in str(refused.value), name
        assert not files.marker.exists(), name


def test_the_hostile_checkpoints_would_have_run_code(files):
    """So that the test above can fail."""
    pickle.loads(files.contents["mkdir_pickle.pth"])
    assert files.marker.exists()
    files.marker.rmdir()


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=" ".join)
def test_a_wrong_argument_is_one_sentence(train, tmp_path, arguments):  # noqa: F811
    short = ["--trainer.max_epochs", 1, "--trainer.limit_train_batches", 1, "--trainer.limit_val_batches", 1]
    short += ["--data.batch_size", 4, "--model.warmup_epochs", 0, "--out", tmp_path / "run"]
    said = train("fit", *QUICK, *short, *arguments)
    assert said.startswith("error: ")
    assert "\n" not in said


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_config_is_one_sentence_and_runs_nothing(train, tmp_path, name):  # noqa: F811
    (tmp_path / f"{name}.yaml").write_bytes(FILES[name].replace(b"touch ran", f"touch {tmp_path}/ran".encode()))
    said = train("fit", "--config", tmp_path / f"{name}.yaml", "--out", tmp_path / "run")
    assert said.startswith("error: ")
    assert "\n" not in said
    assert not (tmp_path / "ran").exists()


def test_there_are_two_hundred_of_them(files):
    assert len(PICTURES) + len(files.contents) + len(ARGUMENTS) + len(FILES) >= 200
