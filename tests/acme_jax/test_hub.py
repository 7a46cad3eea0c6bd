"""Checkpoints by their id on the Hugging Face hub, with a stand-in for `huggingface_hub`."""

import builtins
import sys
import types

import chex
import pytest
from checkpoint_copies import CHECKPOINTS

from acme_jax import pretrained
from acme_jax.pretrained import PretrainedError


def fake_hub(monkeypatch, download):
    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def test_a_hub_id_is_downloaded(monkeypatch, tmp_path):
    calls = []

    def download(hub_id, *, allow_patterns, local_files_only):
        calls.append((hub_id, local_files_only))
        assert not any("bin" in pattern or pattern == "*" for pattern in allow_patterns)
        return str(CHECKPOINTS / "vit")

    monkeypatch.chdir(tmp_path)
    fake_hub(monkeypatch, download)
    config, params = pretrained.load_vit("google/vit")
    known, whole = pretrained.load_vit(CHECKPOINTS / "vit")
    assert config == known
    chex.assert_trees_all_equal(params, whole)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pretrained.load("google/vit")
    assert calls == [("google/vit", False), ("google/vit", True)]


@pytest.mark.parametrize(("offline", "hint"), [("", "the network"), ("1", "HF_HUB_OFFLINE is set")])
def test_an_unreachable_hub_is_one_message(monkeypatch, tmp_path, offline, hint):
    def download(*_, **__):
        raise OSError("no route to host\nand a long trace")

    monkeypatch.chdir(tmp_path)
    fake_hub(monkeypatch, download)
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    with pytest.raises(PretrainedError, match=f"google/vit .*no route to host\\).*{hint}"):
        pretrained.load_vit("google/vit")


def test_without_huggingface_hub_it_says_what_to_install(monkeypatch, tmp_path):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "huggingface_hub":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(PretrainedError, match="pip install huggingface_hub"):
        pretrained.load_vit("google/vit")


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "../a", "a/b/c", ""])
def test_a_path_that_is_not_there_is_not_taken_for_a_hub_id(monkeypatch, path):
    def download(*_, **__):
        pytest.fail("asked the hub")

    fake_hub(monkeypatch, download)
    with pytest.raises(PretrainedError):
        pretrained.load_vit(path)
