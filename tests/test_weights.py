"""Published weights: what the manifests say, and what becomes of a download when anything about it goes wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import io
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save, save_file

import vitzoo
from vitzoo import checkpoints, weights
from vitzoo.models import _registry
from vitzoo.weights import Checkpoint
from vitzoo_cli import main

ROOT = Path(__file__).resolve().parent.parent


class Server(http.server.ThreadingHTTPServer):
    """Serves ``content``; ``cuts`` holds after how many bytes the next connections end."""

    daemon_threads = True

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.cuts, self.asked, self.delay = content, [], [], 0.0
        self.tag, self.sized = '"first"', True
        self.url = f"http://127.0.0.1:{self.server_port}/weights.safetensors"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        wanted = self.headers.get("Range")
        server.asked.append(wanted)
        if "missing" in self.path:
            self.send_error(404, "Not Found")
            return
        resume = wanted is not None and self.headers.get("If-Range") == server.tag
        start = int(re.search(r"\d+", wanted)[0]) if resume else 0
        self.send_response(206 if resume else 200)
        if server.sized:
            self.send_header("Content-Length", str(len(server.content) - start))
        self.send_header("ETag", server.tag)
        self.end_headers()
        time.sleep(server.delay)
        stop = start + server.cuts.pop(0) if server.cuts else len(server.content)
        self.wfile.write(server.content[start:stop])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def swin() -> torch.nn.Module:
    torch.manual_seed(0)
    return vitzoo.create_model("swin_micro").eval()


@pytest.fixture
def server(swin) -> Iterator[Server]:
    with Server(save(swin.state_dict())) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hub" / "checkpoints"


@pytest.fixture
def published(server, monkeypatch) -> Checkpoint:
    """swin_micro, as if its weights were published at the server."""
    digest = hashlib.sha256(server.content).hexdigest()
    row = Checkpoint("swin_micro", "somebody/swin", "MIT", 32, url=server.url, sha256=digest)
    publish(monkeypatch, row)
    return row


def publish(monkeypatch: pytest.MonkeyPatch, row: Checkpoint) -> None:
    known = _registry.checkpoints_of
    monkeypatch.setattr(_registry, "checkpoints_of", lambda name: {row.name: row} if name == row.name else known(name))


def complete(cache: Path) -> list[str]:
    """Files of the cache that somebody could take for weights."""
    return sorted(path.name for path in cache.glob("*") if path.suffix in {".pth", ".safetensors"} and path.name[0] != ".")


def sentence(create: object = None) -> str:
    with pytest.raises(ValueError, match=r".") as raised:
        create() if create else vitzoo.create_model("swin_micro", pretrained=True)
    said = str(raised.value)
    assert "\n" not in said
    return said


def assert_same(model: torch.nn.Module, other: torch.nn.Module) -> None:
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


# -- what goes well ---------------------------------------------------------------------------------------------------


def test_weights_are_fetched_once_under_the_name_of_their_row(published, server, swin, cache):
    assert_same(vitzoo.create_model("swin_micro", pretrained=True), swin)
    assert complete(cache) == ["vitzoo-swin_micro.safetensors"]
    assert_same(timm.create_model("swin_micro", pretrained=True), swin)
    features = vitzoo.create_model("swin_micro", pretrained=True, features_only=True)
    assert torch.equal(features.model.stem.proj.weight, swin.stem.proj.weight)
    assert len(server.asked) == 1


def test_a_broken_connection_is_resumed_where_it_ended(published, server, swin, cache):
    server.cuts = [1000, 2000]
    assert_same(vitzoo.create_model("swin_micro", pretrained=True), swin)
    assert server.asked == [None, "bytes=1000-", "bytes=3000-"]
    assert complete(cache) == ["vitzoo-swin_micro.safetensors"] == [p.name for p in cache.iterdir() if p.name[0] != "."]


def test_a_file_that_changed_at_the_server_is_fetched_from_its_beginning(published, server, swin):
    server.cuts = [1000] * 3
    assert "ended early, after 3000 of" in sentence()
    server.tag, server.asked = '"second"', []
    assert_same(vitzoo.create_model("swin_micro", pretrained=True), swin)
    assert server.asked == ["bytes=3000-"]  # answered with the whole file


def test_two_processes_fetch_one_file_once(published, server, tmp_path):
    server.delay = 0.3
    code = f"""
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("weights", {weights.__file__!r})
weights = sys.modules["weights"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(weights)
weights.cache_folder = lambda: Path({str(tmp_path / "shared")!r})
print(weights.fetch(weights.Checkpoint("swin_micro", "s", "MIT", 32, url={server.url!r}, sha256={published.sha256!r})))
"""
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process.communicate(timeout=60)[0] for process in both}
    assert said == {f"{tmp_path / 'shared' / 'vitzoo-swin_micro.safetensors'}\n"}
    assert [process.returncode for process in both] == [0, 0]
    assert len(server.asked) == 1


def test_timms_weights_come_from_the_hub_and_compute_the_same(monkeypatch, tmp_path):
    theirs = timm.create_model("deit_tiny_patch16_224").eval()
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a: asked.append(a) or str(tmp_path / "model.safetensors"))
    ours = vitzoo.create_model("deit_tiny_patch16_224", pretrained="fb_in1k").eval()
    assert asked == [("timm/deit_tiny_patch16_224.fb_in1k", "model.safetensors")]
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)


# -- what goes wrong: one sentence, and no file that is not whole -----------------------------------------------------


def test_a_download_that_always_ends_early_leaves_no_weights(published, server, cache, swin):
    server.cuts = [1000] * 3
    assert "Run it again" in sentence()
    assert complete(cache) == []
    assert_same(vitzoo.create_model("swin_micro", pretrained=True), swin)
    assert server.asked[-1] == "bytes=3000-"


def test_a_truncated_file_without_a_length_or_a_hash_is_noticed(published, server, cache, monkeypatch):
    publish(monkeypatch, dataclasses.replace(published, sha256=None))
    server.sized, server.content = False, server.content[:-100]
    assert "no checkpoint" in sentence()
    assert list(cache.glob("vitzoo*")) == []


def test_another_file_than_the_published_is_deleted(published, server, cache):
    server.content += b"x"
    assert "SHA-256" in sentence()
    assert list(cache.glob("vitzoo*")) == []


def test_a_page_instead_of_a_file_is_deleted(published, server, cache, monkeypatch):
    publish(monkeypatch, dataclasses.replace(published, sha256=None, url=server.url.replace("safetensors", "pth")))
    server.content = b"<!DOCTYPE html><html><body>Quota exceeded</body></html>"
    assert "no checkpoint of swin_micro" in sentence()
    assert list(cache.glob("vitzoo*")) == []


class Bomb:
    def __init__(self, path: os.PathLike) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_hostile_pickle_runs_nothing_and_is_deleted(published, server, cache, monkeypatch, tmp_path, legacy):
    publish(monkeypatch, dataclasses.replace(published, sha256=None, url=server.url.replace("safetensors", "pth")))
    content = io.BytesIO()
    torch.save({"model": Bomb(tmp_path / "it_ran")}, content, _use_new_zipfile_serialization=not legacy)
    server.content = content.getvalue()
    assert "could run code" in sentence()
    assert not (tmp_path / "it_ran").exists()
    assert list(cache.glob("vitzoo*")) == []


def test_weights_of_another_family_are_refused_with_both_sides(published, server, monkeypatch):
    server.content = save(vitzoo.create_model("nat_micro").state_dict())
    publish(monkeypatch, dataclasses.replace(published, sha256=None))
    assert re.search(r"does not fit Swin: \d+ missing \(.+\), \d+ unknown \(.+conv1", sentence())


def test_a_missing_file_and_a_missing_network_are_said(published, server, monkeypatch, cache):
    publish(monkeypatch, dataclasses.replace(published, url=server.url.replace("weights", "missing")))
    assert "answers 404 Not Found" in sentence()
    server.shutdown()
    server.server_close()
    publish(monkeypatch, published)
    said = sentence()
    assert "cannot be reached (" in said
    assert "vitzoo convert swin_micro FILE" in said
    assert complete(cache) == []


def test_a_cache_that_cannot_be_written_is_said(published, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    said = sentence()
    assert "cannot be written" in said
    assert "TORCH_HOME" in said


def test_a_cache_on_a_read_only_disk_is_said(published, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", lambda *a, **k: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    assert "cannot be written (Read-only file system)" in sentence()


def test_a_full_disk_leaves_no_weights(published, cache, monkeypatch):
    monkeypatch.setattr(weights, "_copy", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "cannot be written (No space left on device)" in sentence()
    assert complete(cache) == []


# -- hosts and licences that ask for a person -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "host", "page"),
    [
        ("dat_tiny", "Google Drive", "https://drive.google.com/file/d/1I08oJlXNtDe8jJPxHkroxUi7lYX2lhVc/view"),
        ("agent_deit_tiny", "Tsinghua cloud", "https://cloud.tsinghua.edu.cn/f/57e0904221824ee7b7af/"),
        ("crossformer_pp_base", "Baidu", "https://pan.baidu.com/s/"),
        ("glnet_4g", "OneDrive", "https://1drv.ms/"),
        ("moh_transnext_base_50", "A page of Hugging Face", "https://huggingface.co/Chat-UniVi/MoH-ViT-B-50"),
    ],
)
def test_a_host_for_browsers_ends_in_the_page_and_the_command(name, host, page):
    said = sentence(lambda: vitzoo.create_model(name, pretrained=True))
    assert said.startswith(host)
    assert page in said
    assert f"`vitzoo convert {name} FILE`" in said


def test_a_file_brought_by_hand_is_found_from_then_on(monkeypatch, tmp_path, swin, capsys):
    publish(monkeypatch, Checkpoint("swin_micro", "somebody/swin", "MIT", 32, url="https://drive.google.com/file/d/1/view"))
    monkeypatch.setattr(vitzoo, "checkpoints_of", _registry.checkpoints_of)
    torch.save({"model": {f"module.{k}": v for k, v in swin.state_dict().items()}}, tmp_path / "file.pth")
    assert "Google Drive" in sentence()
    assert main(["convert", "swin_micro", str(tmp_path / "file.pth")]) == 0, capsys.readouterr().err
    assert_same(vitzoo.create_model("swin_micro", pretrained=True), swin)


def test_a_licence_against_commercial_use_has_to_be_accepted(published, server, monkeypatch, swin):
    publish(monkeypatch, dataclasses.replace(published, license="CC BY-NC 4.0"))
    said = sentence()
    assert "CC BY-NC 4.0, which forbids commercial use" in said
    assert "https://github.com/somebody/swin" in said
    assert "under CC BY-NC" in sentence(lambda: timm.create_model("swin_micro", pretrained=True))
    assert server.asked == []
    assert_same(vitzoo.create_model("swin_micro", pretrained=True, accept_license=True), swin)
    assert "cc-by-nc" in sentence(lambda: vitzoo.create_model("vit_base_patch16_224", pretrained="mae"))
    assert "cc-by-nc" in sentence(lambda: vitzoo.create_model("convnextv2_atto.fcmae", pretrained=True))  # one of timm's


# -- the manifests ----------------------------------------------------------------------------------------------------


ROWS = [row for family in vitzoo.list_families() for row in weights.manifest(family).values()]


def test_every_manifest_is_read_and_every_row_is_of_a_model():
    assert {path.stem for path in (ROOT / "weights").glob("*.toml")} <= set(vitzoo.list_families())
    assert {row.name for row in ROWS} <= set(vitzoo.list_pretrained())
    assert vitzoo.list_pretrained("nat_t*") == ["nat_tiny"]


def test_every_row_says_where_under_which_licence_and_for_what_input():
    for row in ROWS:
        assert row.license, row
        assert (row.url.startswith("https://") and "/" in row.source) or (weights.folder() / (row.file or "?")).is_file(), row
        assert row.sha256 is None or re.fullmatch(r"[0-9a-f]{8,64}", row.sha256), row
        assert row.crop_pct is not None, row
        assert row.interpolation in {"bicubic", "bilinear"}, row
        assert len(row.mean or ()) == len(row.std or ()) == 3, row
        assert row.img_size % 8 == 0, row


def test_the_input_of_the_manifest_is_what_timm_resolves():
    model = vitzoo.create_model("nat_micro.digits", pretrained=True)
    config = timm.data.resolve_model_data_config(model)
    assert (config["input_size"], config["crop_pct"]) == ((3, 32, 32), 1.0)
    assert model.num_classes == 10
    assert vitzoo.create_model("nat_micro").num_classes == 1000


def test_no_two_checkpoints_share_a_file_of_the_cache():
    names = [weights._target(row).name for row in ROWS]
    assert len(names) == len(set(names))


def test_reading_a_file_goes_by_its_content(tmp_path, swin):
    (tmp_path / "weights.pth").write_bytes(save(swin.state_dict()))
    assert checkpoints.read(tmp_path / "weights.pth").keys() == swin.state_dict().keys()
