from __future__ import annotations

import io
import sys
import tarfile
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torchvision
from PIL import Image

from vitzoo.data import ImageData, UserError
from vitzoo.data.sources import find_sources, read_class_map


def encoded(value, kind="JPEG"):
    file = io.BytesIO()
    Image.new("RGB", (20, 16), (value, 0, 0)).save(file, kind)
    return file.getvalue()


def shard(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))


@pytest.fixture
def wds(tmp_path):
    """Two training shards and one held-out one as WebDataset writes them: key.jpg, key.cls and what else there may be."""
    for number in range(2):
        members = {}
        for i in range(6):
            key = f"{number}/{i:03d}"
            members |= {f"{key}.cls": str(i % 3).encode(), f"{key}.json": b"{}", f"{key}.jpg": encoded(40 * i + number)}
        shard(tmp_path / f"train-{number:03d}.tar", members)
    shard(tmp_path / "val" / "0.tar", {"a.jpg": encoded(9), "a.cls": b"2"})
    return tmp_path


def test_webdataset_shards_are_read_at_any_place_with_any_number_of_workers(wds):
    batches = []
    for workers in (0, 2):
        data = ImageData(str(wds), dataset="wds", batch_size=4, num_workers=workers, img_size=32)
        data.setup("fit")
        assert data.classes == ["0", "1", "2"]
        batches.append(list(data.train_dataloader()))
        assert [label.tolist() for _, label in data.val_dataloader()] == [[2]]
    for (a, x), (b, y) in zip(*batches, strict=True):
        assert a.equal(b)
        assert x.equal(y)


def test_a_members_pixels_belong_to_its_number(wds):
    _, splits = find_sources("wds", str(wds), False, None)
    train = splits["train"]
    assert [int(np.asarray(Image.open(train.read(i)))[0, 0, 0] > 100) for i in (2, 3, 9)] == [0, 1, 1]
    assert train.names[9].endswith("train-001.tar/1/003.jpg")


def test_folders_in_a_tar_are_classes_and_those_of_training_count(tmp_path):
    shard(tmp_path / "train.tar", {"cat 10/a.png": encoded(1, "PNG"), "cat 2/a.png": encoded(2, "PNG"), "._x.jpg": b""})
    shard(tmp_path / "val.tar", {"cat 10/b.png": encoded(1, "PNG")})
    classes, splits = find_sources("tar", str(tmp_path), False, None)
    assert classes == ["cat 2", "cat 10"]
    assert splits["val"].labels == [1]
    shard(tmp_path / "val.tar", {"dog/b.png": encoded(1, "PNG")})
    with pytest.raises(UserError, match="'dog', which training has not"):
        find_sources("tar", str(tmp_path), False, None)


@pytest.mark.parametrize(
    ("dataset", "members", "words"),
    [
        ("wds", {"a.jpg": encoded(1)}, "a.jpg has no class"),
        ("wds", {"a.jpg": encoded(1), "a.cls": b"three"}, "cannot be read as a tar of pictures"),
        ("tar", {"notes.txt": b""}, "hold no picture"),
        ("tar", None, "cannot be read as a tar"),
        ("hfids/imagenet", {}, "cannot be resumed"),
        ("torch/cifar10", {}, "--data.download true"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path, dataset, members, words):
    shard(tmp_path / "val.tar", {"x/b.png": encoded(1, "PNG")})
    if members is None:
        (tmp_path / "train.tar").write_bytes(b"no tar" * 200)
    else:
        shard(tmp_path / "train.tar", members)
    with pytest.raises(UserError, match=words):
        find_sources(dataset, str(tmp_path), False, None)


def test_torchvisions_sets_come_with_their_names(tmp_path, monkeypatch):
    class Cifar:
        classes = ("plane", "car")

        def __init__(self, root, train, download):
            self.targets = [0, 1, 1] if train else [1]

        def __getitem__(self, index):
            return Image.new("L", (32, 32), 50 * index), self.targets[index]

    monkeypatch.setitem(sys.modules["timm.data.dataset_factory"]._TORCH_BASIC_DS, "cifar10", Cifar)
    data = ImageData(str(tmp_path), dataset="torch/cifar10", batch_size=1, img_size=32)
    data.setup("fit")
    assert data.classes == ["plane", "car"]
    assert data.sets["train"].picture(2).getpixel((0, 0)) == (100, 100, 100)
    assert torchvision  # what timm's table holds otherwise


def test_hugging_faces_sets_are_read_through_timms_reader(tmp_path, monkeypatch):
    class Rows(list):
        info = SimpleNamespace(
            features={"label": SimpleNamespace(names=["no", "yes"], str2int={"no": 0, "yes": 1}.get)}, splits={}
        )

        def cast_column(self, *_):
            return self

        def remove_columns(self, *_):
            return self

    rows = Rows({"image": {"bytes": encoded(10 * i), "path": None}, "label": i % 2} for i in range(4))
    fake = ModuleType("datasets")
    fake.load_dataset = lambda name, split, **_: rows
    fake.Image = lambda decode: None
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)
    classes, splits = find_sources("hfds/some/set", str(tmp_path), False, None)
    assert classes == ["no", "yes"]
    assert splits["train"].labels == [0, 1, 0, 1]
    assert Image.open(splits["train"].read(1)).size == (20, 16)


def test_a_class_map_sets_the_labels_of_folders(folder, tmp_path):
    (tmp_path / "map.txt").write_text("dog\nbird\ncat 10\ncat 2\n".replace(" ", "_"))
    for split in ("train", "val"):
        for name in ("cat 2", "cat 10"):
            (folder / split / name).rename(folder / split / name.replace(" ", "_"))
    data = ImageData(str(folder), class_map=str(tmp_path / "map.txt"), batch_size=4, img_size=32)
    assert data.classes == ["dog", "bird", "cat_10", "cat_2"]
    assert {label for _, label in data.splits["train"]} == {0, 2, 3}
    (tmp_path / "map.txt").write_text("dog 0\ncat 2\n")
    with pytest.raises(UserError, match="line 2"):
        read_class_map(str(tmp_path / "map.txt"))
