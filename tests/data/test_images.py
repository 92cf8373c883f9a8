from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vitzoo.data.errors import UserError, sentence
from vitzoo.data.images import DigitImages, FolderImages, list_images, read_image


def array(path, **kwargs):
    return np.asarray(read_image(path, **kwargs))


def test_16_bit_grey_is_scaled_and_not_clipped_to_white(tmp_path):
    levels = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    read = array(tmp_path / "deep.png")
    assert read.shape == (16, 16, 3)
    np.testing.assert_array_equal(read[..., 0], levels // 256)


def test_exif_orientation_is_followed_by_choice(tmp_path):
    image = Image.fromarray(np.arange(30 * 20 * 3, dtype=np.uint32).reshape(30, 20, 3).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "phone.png", exif=exif)
    assert array(tmp_path / "phone.png").shape == (20, 30, 3)
    assert array(tmp_path / "phone.png", exif=False).shape == (30, 20, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    base = Image.new("L", (5, 7), 128)
    (base.convert(mode) if mode != "I;16" else Image.fromarray(np.full((7, 5), 999, np.uint16))).save(path)
    assert array(path).shape == (7, 5, 3)


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert tuple(array(tmp_path / "x.gif")[0, 0]) == (255, 0, 0) or array(tmp_path / "x.gif")[0, 0, 0] > 250


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "header", "bomb"])
def test_what_is_no_picture_is_named(tmp_path, kind, monkeypatch):
    path = tmp_path / "broken.jpg"
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (60, 60, 3), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[:-100], "empty": b"", "text": b"no picture", "header": whole[:30]}.get(kind, whole))
    if kind == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"broken\.jpg cannot be read as a picture"):
        read_image(path)


def test_the_digits_split_is_fixed_and_complete():
    train, val = DigitImages("train", np.asarray), DigitImages("val", np.asarray)
    assert (len(train), len(val)) == (1437, 360)
    image, label = val[0]
    assert image.shape == (32, 32, 3)
    assert [val[i][1] for i in range(8)] == [2, 8, 2, 6, 6, 7, 1, 9]
    assert not {image.tobytes() for image, _ in (train[i] for i in range(1437))} & {val[i][0].tobytes() for i in range(360)}


def test_dotfiles_are_not_listed_and_uncommon_kinds_are(tmp_path):
    (tmp_path / ".thumbs").mkdir()
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("a.webp", "b.TIF", "._a.jpg", ".thumbs/c.png", "deep/er/d.JPEG", "notes.txt"):
        (tmp_path / name).touch()
    names = [path.removeprefix(f"{tmp_path}/") for path in list_images(tmp_path)]
    assert names == ["a.webp", "b.TIF", "deep/er/d.JPEG"]


def broken_set(folder, skip):
    paths = list_images(folder / "train")
    with open(paths[2], "wb") as file:
        file.write(b"no picture")
    labels = {"cat 2": 0, "cat 10": 1, "dog": 2}
    samples = [(path, labels[path.split("/")[-2]]) for path in paths]
    return FolderImages(samples, list(labels), np.asarray, skip_corrupt=skip), paths[2]


def test_an_unreadable_file_is_an_error_with_path_class_and_way_out(folder):
    images, path = broken_set(folder, skip=False)
    with pytest.raises(UserError) as caught:
        images[2]
    assert path in str(caught.value)
    assert "class 'cat 2'" in str(caught.value)
    assert "skip_corrupt true" in str(caught.value)


def test_a_skipped_file_in_training_is_replaced_by_the_seeds_draw(folder):
    images, path = broken_set(folder, skip=True)
    (first, label), (again, _) = images[2, 11, None], images[2, 11, None]
    np.testing.assert_array_equal(first, again)
    twins = [i for i in range(len(images)) if i != 2 and np.array_equal(np.asarray(images.picture(i)), first)]
    assert [images.labels[i] for i in twins] == [label]  # the stand-in comes with its own label
    assert images.broken() == [path]


def test_a_skipped_file_in_evaluation_is_marked_and_not_replaced(folder):
    images, _ = broken_set(folder, skip=True)
    image, label = images[2]
    assert label == -1 - images.labels[2]
    assert not image.any()


def test_the_sentence_of_a_workers_error_is_found():
    wrapped = 'Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File "x"\n'
    assert sentence(UserError(wrapped + "vitzoo.data.errors.UserError: a.png: broken. Mend it.\n")) == "a.png: broken. Mend it."
    assert sentence(UserError("plain: text")) == "plain: text"
