"""Files of packed images and the script that writes them: round trips, damage, messages."""

import dataclasses
import importlib
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from image_batches import SMALL, batches, blobs

from fed.errors import SegmentError
from fed.image_file import pack, unpack
from fed.neural_coding import encode, start

FAST = {name: value for name, value in dataclasses.asdict(SMALL).items() if name != "alphabet"}


@pytest.mark.parametrize("mode", ["minimal", "neural", "none"])
def test_files(mode):
    images = blobs(15, seed=6)
    images[0, 0, 0] = 16
    settings = FAST if mode == "neural" else None
    data = pack(images, mode, settings)
    assert data == pack(images, mode, settings)
    np.testing.assert_array_equal(unpack(data), images)
    flat = unpack(pack(images[..., 0], "none"))
    assert flat.dtype == np.uint8 and flat.shape == (15, 4, 4)
    if mode == "neural":  # the file is the segments, and what leads to them
        state, rest = start(SMALL, (4, 4, 1)), data[7 + int.from_bytes(data[5:7], "big") + 4 :]
        for part in batches(images):
            state, segment = encode(SMALL, state, part)
            assert rest[:3] == len(segment).to_bytes(3, "big")
            assert rest[3 : 3 + len(segment)] == segment
            rest = rest[3 + len(segment) :]
        assert not rest
    where = np.linspace(0, len(data) - 1, 20).astype(int)
    for bad in (
        *(bytes([*data[:at], data[at] ^ 16, *data[at + 1 :]]) for at in where),
        data[:-1],
        data[:20],
        data + b"\0",
        b"",
    ):
        with pytest.raises(SegmentError):
            unpack(bad)


def test_minimal_files_of_many_levels_and_channels():
    ramp = np.arange(24, dtype=np.uint8)[:, None, None] * np.uint8(7)
    images = np.random.default_rng(0).integers(0, 4, (40, 24, 20, 3)).astype(np.uint8) + ramp
    data = pack(images, "minimal")
    np.testing.assert_array_equal(unpack(data), images)
    assert len(data) < 0.45 * images.size


def test_files_say_what_is_wrong():
    images = blobs(7)
    data = pack(images, "neural", FAST)
    with pytest.raises(SegmentError, match="not a file of packed images"):
        unpack(b"PNG" + data)
    with pytest.raises(SegmentError, match="version 02"):
        unpack(data[:4] + b"\2" + data[5:])
    end = 7 + int.from_bytes(data[5:7], "big")
    text = data[7:end].replace(b"jax ", b"JAX ")
    header = data[:7] + text
    other = bytearray(header + zlib.crc32(header).to_bytes(4, "big") + data[end + 4 :])
    np.testing.assert_array_equal(unpack(bytes(other)), images)  # another writer may agree
    other[-1] ^= 1
    with pytest.raises(SegmentError, match=r"batch 1 \(images 6 to 6\).*written by JAX .* is jax"):
        unpack(bytes(other))
    for arguments, message in (
        ((images.astype(int), "none"), "uint8, got int64"),
        ((images[0, 0], "none"), "none of them 0, got"),
        ((images[:0], "none"), "none of them 0"),
        ((images, "zip"), "one of minimal, neural, none, got 'zip'"),
        ((images, "minimal", FAST), "has no settings"),
        ((images, "neural", {"width": 3}), "unknown settings width"),
        ((images, "neural", {"steps": 0}), "steps must be from"),
    ):
        with pytest.raises(ValueError, match=message):
            pack(*arguments)


@pytest.fixture
def command(monkeypatch):
    """Runs scripts/pack_images.py."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pack_images.py", *map(str, arguments)])
        importlib.import_module("pack_images").main()

    return run


@pytest.mark.parametrize("mode", ["minimal", "neural", "none"])
def test_script(command, mode, tmp_path, capsys):
    images, packed, back = blobs(9, seed=7), tmp_path / "packed", tmp_path / "back"
    images[0, 0, 0] = 16
    np.save(tmp_path / "images.npy", images)
    options = ["--batch-size", 6, "--hidden", 8, "--steps", 1] if mode == "neural" else []
    command("pack", tmp_path / "images.npy", packed, "--mode", mode, *options)
    lines = {line.split()[0]: int(line.split()[1]) for line in capsys.readouterr().out.splitlines()}
    assert lines["raw"] == images.size and lines[mode] == packed.stat().st_size
    assert lines["zlib"] == len(zlib.compress(images.tobytes(), 9)) and "png" in lines
    command("unpack", packed, back)
    np.testing.assert_array_equal(np.load(back), images)


def test_script_says_what_is_wrong(command, tmp_path):
    wrong, out = tmp_path / "wrong.npy", tmp_path / "out"
    with pytest.raises(SystemExit, match="No such file"):
        command("pack", wrong, out)
    wrong.write_bytes(b"no array")
    with pytest.raises(SystemExit, match=r"error: .*is not an \.npy file"):
        command("pack", wrong, out)
    with pytest.raises(SystemExit, match="error: not a file of packed images"):
        command("unpack", wrong, out)
    np.save(wrong, np.zeros((2, 3, 3)))
    with pytest.raises(SystemExit, match="error: images must be uint8"):
        command("pack", wrong, out)
    assert not out.exists()
