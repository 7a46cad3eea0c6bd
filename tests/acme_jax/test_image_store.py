import errno
import io
import json
import os
import warnings

import numpy as np
import pytest
from PIL import Image

from acme_jax import image_store, picture
from acme_jax.config import DataConfig
from acme_jax.idx import DataError
from acme_jax.image_store import file_sources, open_store
from acme_jax.picture import Unreadable, decode


def make_picture(height=40, width=60, seed=0):
    """Smooth in space, so that JPEG and resizing keep it nearly."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    planes = [np.sin(rng.uniform(1, 4) * x + rng.uniform(1, 4) * y) for _ in range(3)]
    return (127 + 120 * np.stack(planes, axis=-1)).astype(np.uint8)


def encoded(pixels, form="PNG", **options):
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(
        file, form, **options
    )
    return file.getvalue()


def write_pictures(root, num=6):
    root.mkdir(exist_ok=True)
    files = [f"{i}.png" for i in range(num)]
    for i, name in enumerate(files):
        (root / name).write_bytes(encoded(make_picture(seed=i)))
    return files


def make_config(tmp_path, **changes):
    fields = {"name": "image_folder", "image_size": 16, "cache": str(tmp_path / "cache")}
    return DataConfig(**{**fields, **changes})


# One picture


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (40, 40), (41, 10_001)])
def test_the_central_square_is_kept_whatever_the_shape(shape):
    height, width = shape
    pixels = np.zeros((height, width, 3), np.uint8)
    side = min(shape)
    top, left = (height - side) // 2, (width - side) // 2
    square = make_picture(side, side)
    pixels[top : top + side, left : left + side] = square
    result = decode(io.BytesIO(encoded(pixels)), side)
    np.testing.assert_array_equal(result, square)


@pytest.mark.parametrize(("size", "resized"), [(8, (8, 8)), (80, (80, 80))])
def test_resized_as_by_pillow_after_cropping(size, resized):
    pixels = make_picture(40, 40)
    expected = Image.fromarray(pixels).resize(resized, Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(decode(io.BytesIO(encoded(pixels)), size), np.asarray(expected))


def test_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    result = decode(io.BytesIO(encoded(stripes)), 8)
    assert np.all(np.abs(result.astype(int) - 100) <= 4)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM"])
def test_formats(form):
    pixels = make_picture(40, 60)
    result = decode(io.BytesIO(encoded(pixels, form)), 20)
    expected = decode(io.BytesIO(encoded(pixels)), 20)
    # GIF has 256 colours, JPEG and WebP lose a little.
    assert np.abs(result.astype(int) - expected).mean() < (8 if form == "GIF" else 3)


def test_large_jpeg_is_nearly_the_same_as_decoded_in_full():
    pixels = make_picture(400, 600)
    result = decode(io.BytesIO(encoded(pixels, "JPEG", quality=95)), 20)
    expected = decode(io.BytesIO(encoded(pixels)), 20)
    assert np.abs(result.astype(int) - expected).max() <= 4


def test_grey_is_repeated_and_16_bits_become_8():
    grey = make_picture()[..., 0]
    expected = np.repeat(decode(io.BytesIO(encoded(grey)), 40)[..., :1], 3, axis=-1)
    deep = encoded(grey.astype(np.uint16) * 256 + 255)
    for content in (encoded(grey), deep, encoded(grey, "JPEG", quality=100)):
        result = decode(io.BytesIO(content), 40)
        assert np.abs(result.astype(int) - expected).max() <= 2


def test_other_modes():
    image = Image.fromarray(make_picture())
    for mode in ("RGBA", "LA", "1", "P", "CMYK"):
        form = "TIFF" if mode == "CMYK" else "PNG"
        assert decode(io.BytesIO(encoded(image.convert(mode), form)), 16).shape == (16, 16, 3)


def test_turned_upright():
    pixels = make_picture(40, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # To be turned clockwise.
    result = decode(io.BytesIO(encoded(pixels, exif=exif)), 40)
    np.testing.assert_array_equal(result, np.rot90(pixels, -1))


JPEG = encoded(make_picture(400, 600), "JPEG", quality=95)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (JPEG[: len(JPEG) // 2], "truncated"),
        (JPEG[:100], "Truncated"),
        (b"", "not a picture of a known format"),
        (b"<html>404</html>", "not a picture of a known format"),
        (encoded(make_picture())[:-200], "truncated"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating-point"),
        (encoded(Image.fromarray(np.full((4, 4), 1 << 20, np.int32)), "TIFF"), "more than 16"),
    ],
    ids=["truncated", "header only", "empty", "page", "truncated PNG", "float", "32 bits"],
)
def test_damaged_pictures(content, message):
    with pytest.raises(Unreadable, match=message):
        decode(io.BytesIO(content), 16)


def test_huge_pictures_are_refused_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(picture.Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Unreadable, match="decompression bomb"):
        decode(io.BytesIO(encoded(make_picture(60, 60))), 16)


# The store


def test_store_holds_the_decoded_pictures_and_is_mapped(tmp_path):
    root = tmp_path / "pictures"
    files = write_pictures(root)
    seen = []
    store = open_store(
        file_sources(root, files), make_config(tmp_path), lambda done, num: seen.append((done, num))
    )
    assert isinstance(store.images, np.memmap) and not store.images.flags.writeable
    assert store.images.shape == (6, 16, 16, 3) and store.images.dtype == np.uint8
    for i, name in enumerate(files):
        with (root / name).open("rb") as file:
            np.testing.assert_array_equal(store.images[i], decode(file, 16))
    np.testing.assert_array_equal(store.kept, np.arange(6))
    assert seen == [(6, 6)] and store.skipped == ()
    (directory,) = (tmp_path / "cache").iterdir()
    assert sorted(p.name for p in directory.iterdir()) == ["images.npy", "meta.json"]
    np.testing.assert_array_equal(np.load(directory / "images.npy"), store.images)


def test_progress_and_order_with_many_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(image_store, "_AT_ONCE", 4)
    root = tmp_path / "pictures"
    files = write_pictures(root, num=10)
    seen = []
    sources = file_sources(root, files)
    small = open_store(sources, make_config(tmp_path), lambda done, num: seen.append(done))
    assert seen == [4, 8, 10]
    with (root / "9.png").open("rb") as file:
        np.testing.assert_array_equal(small.images[9], decode(file, 16))


def test_second_run_decodes_nothing(tmp_path, monkeypatch):
    root = tmp_path / "pictures"
    files = write_pictures(root)
    first = open_store(file_sources(root, files), make_config(tmp_path))
    monkeypatch.setattr(image_store, "decode", None)
    again = open_store(file_sources(root, files), make_config(tmp_path))
    np.testing.assert_array_equal(first.images, again.images)


@pytest.mark.parametrize("change", ["size of pictures", "content", "time", "file list"])
def test_changes_make_another_store(tmp_path, change):
    root = tmp_path / "pictures"
    files = write_pictures(root)
    config = make_config(tmp_path)
    open_store(file_sources(root, files), config)
    if change == "size of pictures":
        config = make_config(tmp_path, image_size=8)
    elif change == "content":
        (root / files[2]).write_bytes(encoded(make_picture(50, 50, seed=9)))
    elif change == "time":
        os.utime(root / files[2], ns=(0, 0))
    else:
        files = files[:-1]
    open_store(file_sources(root, files), config)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_default_cache(tmp_path, monkeypatch):
    root = tmp_path / "pictures"
    files = write_pictures(root, num=2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    open_store(file_sources(root, files), DataConfig(name="image_folder"))
    (directory,) = (tmp_path / "xdg" / "acme_jax").iterdir()
    assert np.load(directory / "images.npy").shape == (2, 224, 224, 3)


def corrupt(root, name):
    content = (root / name).read_bytes()
    (root / name).write_bytes(content[: len(content) // 2])


def test_corrupt_picture_is_named_and_refused(tmp_path):
    root = tmp_path / "pictures"
    files = write_pictures(root)
    corrupt(root, "3.png")
    with pytest.raises(DataError, match=r"^3\.png cannot be decoded \(.*--data.on_corrupt skip"):
        open_store(file_sources(root, files), make_config(tmp_path))
    assert list((tmp_path / "cache").iterdir()) == []


def test_corrupt_pictures_are_skipped(tmp_path):
    root = tmp_path / "pictures"
    files = write_pictures(root)
    for name in ("1.png", "5.png"):
        corrupt(root, name)
    config = make_config(tmp_path, on_corrupt="skip")
    for _ in range(2):  # decoded, then opened again
        with pytest.warns(UserWarning, match=r"2 of 6 pictures cannot be decoded: 1.png, 5.png;"):
            store = open_store(file_sources(root, files), config)
        np.testing.assert_array_equal(store.kept, [0, 2, 3, 4])
        assert store.skipped == ("1.png", "5.png")
        assert store.images.shape == (4, 16, 16, 3)
        with (root / "4.png").open("rb") as file:
            np.testing.assert_array_equal(store.images[3], decode(file, 16))
    # What one run has skipped, a stricter one refuses.
    with pytest.raises(DataError, match=r"2 of 6 pictures cannot be decoded: 1.png, 5.png; repair"):
        open_store(file_sources(root, files), make_config(tmp_path))


def test_all_pictures_corrupt(tmp_path):
    root = tmp_path / "pictures"
    files = write_pictures(root, num=2)
    for name in files:
        corrupt(root, name)
    with pytest.raises(DataError, match=r"none of the 2 pictures can be decoded, first 0.png"):
        open_store(file_sources(root, files), make_config(tmp_path, on_corrupt="skip"))


def test_missing_pictures(tmp_path):
    files = write_pictures(tmp_path / "pictures")
    with pytest.raises(DataError, match=r"2 of 8 pictures are missing .* first gone\.png"):
        file_sources(tmp_path / "pictures", [*files, "gone.png", "too.png"])


def test_picture_that_vanishes_while_decoding(tmp_path):
    root = tmp_path / "pictures"
    files = write_pictures(root)
    sources = file_sources(root, files)
    (root / "2.png").unlink()
    with pytest.raises(DataError, match=r"2\.png cannot be decoded \(No such file"):
        open_store(sources, make_config(tmp_path))


def test_interrupted_decoding_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(image_store, "_AT_ONCE", 2)
    root = tmp_path / "pictures"
    files = write_pictures(root)

    def interrupt(done, num):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_store(file_sources(root, files), make_config(tmp_path), interrupt)
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(open_store(file_sources(root, files), make_config(tmp_path)).images) == 6


def test_killed_decoding_is_not_mistaken_for_whole(tmp_path, monkeypatch):
    """What a killed process leaves bears another name."""
    root = tmp_path / "pictures"
    files = write_pictures(root)
    names = []
    open_store(
        file_sources(root, files),
        make_config(tmp_path),
        lambda done, num: names.extend(p.name for p in (tmp_path / "cache").iterdir()),
    )
    (partial,) = names
    (final,) = (p.name for p in (tmp_path / "cache").iterdir())
    assert partial.startswith(f"{final}.partial-")


def test_two_processes_at_once(tmp_path):
    root = tmp_path / "pictures"
    files = write_pictures(root)
    config = make_config(tmp_path)
    other = []

    def meanwhile(done, num):
        if not other:
            other.append(None)
            other[0] = open_store(file_sources(root, files), config)

    store = open_store(file_sources(root, files), config, meanwhile)
    np.testing.assert_array_equal(store.images, other[0].images)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_no_room_is_known_before(tmp_path, monkeypatch):
    files = write_pictures(tmp_path / "pictures")
    usage = type("Usage", (), {"free": 4000})
    monkeypatch.setattr(image_store.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(image_store, "decode", None)
    with pytest.raises(DataError, match=r"no room for .*: 0\.0 MB needed.*--data\.cache"):
        open_store(file_sources(tmp_path / "pictures", files), make_config(tmp_path))


def test_disk_that_fills_up(tmp_path, monkeypatch):
    files = write_pictures(tmp_path / "pictures")

    def full(fileno):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(image_store.os, "fsync", full)
    with pytest.raises(DataError, match=r"no room for decoded pictures in .*; free some"):
        open_store(file_sources(tmp_path / "pictures", files), make_config(tmp_path))
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_that_is_a_file(tmp_path):
    files = write_pictures(tmp_path / "pictures")
    (tmp_path / "cache").write_text("")
    with pytest.raises(DataError, match=r"cannot be written to .*; name another directory"):
        open_store(file_sources(tmp_path / "pictures", files), make_config(tmp_path))


@pytest.mark.parametrize("damage", ["truncated", "magic", "no meta", "other meta", "no json"])
def test_damaged_store(tmp_path, damage):
    root = tmp_path / "pictures"
    files = write_pictures(root)
    open_store(file_sources(root, files), make_config(tmp_path))
    (directory,) = (tmp_path / "cache").iterdir()
    images = directory / "images.npy"
    if damage == "truncated":
        images.write_bytes(images.read_bytes()[:-10])
    elif damage == "magic":
        images.write_bytes(b"\x00" * images.stat().st_size)
    elif damage == "no meta":
        (directory / "meta.json").unlink()
    elif damage == "other meta":
        (directory / "meta.json").write_text(json.dumps({"num_sources": 5, "skipped": []}))
    else:
        (directory / "meta.json").write_text("{")
    with (
        pytest.raises(DataError, match=r"are damaged .*; delete that directory"),
        warnings.catch_warnings(),
    ):
        open_store(file_sources(root, files), make_config(tmp_path))
