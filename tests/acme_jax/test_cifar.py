"""Small archives in the true formats: the pickles are written as Python 2 wrote them."""

import dataclasses
import gzip
import hashlib
import io
import pickle
import struct
import tarfile
import typing

import numpy as np
import pytest

from acme_jax import cifar
from acme_jax.idx import DataError
from acme_jax.plain_pickle import load_plain

ROWS = 6


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, protocol 2, and NumPy's old module names."""

    dispatch: typing.ClassVar = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value):
        if len(value) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(value)]) + value)
        else:
            self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_bytes

    def save_array(self, array):
        # As numpy 1.x under Python 2: _reconstruct(ndarray, (0,), "b"), then its state.
        self.write(b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n")
        self.save((0,))
        self.save(b"b")
        self.write(b"tR(")
        self.save(1)
        self.save(array.shape)
        self.write(b"cnumpy\ndtype\n(")
        for value in (array.dtype.str[1:].encode(), 0, 1):
            self.save(value)
        self.write(b"tR(")
        for value in (3, b"|", None, None, None, -1, -1, 0):
            self.save(value)
        self.write(b"tb")
        self.save(False)
        self.save(array.tobytes())
        self.write(b"tb")

    dispatch[np.ndarray] = save_array


def python2_pickle(content):
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue()


def make_rows(seed, num_classes, num=ROWS):
    rng = np.random.default_rng(seed)
    planes = rng.integers(0, 256, (num, 3072), dtype=np.uint8)
    return planes, rng.integers(0, num_classes, num)


def class_names(num):
    return [f"class {i}".encode() for i in range(num)]


def make_files(archive):
    """File name -> content in the format of the archive, and the rows of each in order."""
    files, rows = {}, []
    fine = archive.num_classes == 100
    for seed, file in enumerate((*archive.train, archive.test)):
        planes, labels = make_rows(seed, archive.num_classes)
        rows.append((planes, labels))
        if archive.is_binary:
            records = [labels[:, None].astype(np.uint8), planes]
            if fine:
                records.insert(0, np.full((ROWS, 1), 77, np.uint8))
            files[file] = np.concatenate(records, axis=1).tobytes()
        else:
            content = {
                b"batch_label": b"batch 1 of 5",
                b"fine_labels" if fine else b"labels": labels.tolist(),
                b"data": planes,
                b"filenames": [b"a.png"] * ROWS,
            }
            if fine:
                content[b"coarse_labels"] = [19] * ROWS
            files[file] = python2_pickle(content)
    names = class_names(archive.num_classes)
    if archive.is_binary:
        files[archive.names] = b"\n".join(names) + b"\n\n"
    else:
        key = b"fine_label_names" if fine else b"label_names"
        files[archive.names] = python2_pickle({key: names, b"num_vis": 3072})
    files["readme.html"] = b"<html>"
    return files, rows


def small(archive):
    return dataclasses.replace(archive, train_rows=ROWS, test_rows=ROWS)


SMALL = {name: tuple(map(small, archives)) for name, archives in cifar.ARCHIVES.items()}
CHOICES = [(name, i) for name in SMALL for i in range(2)]


def write_directory(root, archive, **replaced):
    files, rows = make_files(archive)
    directory = root / archive.directory
    directory.mkdir()
    for name, content in {**files, **replaced}.items():
        if content is not None:
            (directory / name).write_bytes(content)
    return directory, rows


def write_archive(root, name, which):
    """Writes a small archive; returns its path, the archives with its md5, and its rows."""
    archive = SMALL[name][which]
    files, rows = make_files(archive)
    path = root / archive.file
    with tarfile.open(path, "w:gz") as tar:
        folder = tarfile.TarInfo(archive.directory)
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for file, content in files.items():
            info = tarfile.TarInfo(f"{archive.directory}/{file}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    known = list(SMALL[name])
    known[which] = dataclasses.replace(archive, md5=md5)
    return path, {**SMALL, name: tuple(known)}, rows


def check(data, rows, num_classes):
    assert data.inputs.shape == (ROWS * len(rows), 32, 32, 3) and data.inputs.dtype == np.uint8
    planes = np.concatenate([p for p, _ in rows])
    for channel in range(3):
        expected = planes[:, 1024 * channel : 1024 * (channel + 1)].reshape(-1, 32, 32)
        np.testing.assert_array_equal(data.inputs[..., channel], expected)
    np.testing.assert_array_equal(data.labels, np.concatenate([labels for _, labels in rows]))
    assert data.num_classes == num_classes
    assert data.class_names == tuple(name.decode() for name in class_names(num_classes))
    np.testing.assert_array_equal(np.flatnonzero(~data.official_test), np.arange(len(data) - ROWS))


@pytest.mark.parametrize(("name", "which"), CHOICES)
def test_archives(tmp_path, name, which):
    path, archives, rows = write_archive(tmp_path, name, which)
    for place in (path, tmp_path):  # the archive itself, or the directory that it lies in
        data = cifar.read_cifar(name, str(place), archives)
        check(data, rows, archives[name][which].num_classes)
    assert list(tmp_path.iterdir()) == [path]  # nothing is unpacked


@pytest.mark.parametrize(("name", "which"), CHOICES)
def test_directories(tmp_path, name, which):
    archive = SMALL[name][which]
    directory, rows = write_directory(tmp_path, archive)
    for place in (directory, tmp_path):
        check(cifar.read_cifar(name, str(place), SMALL), rows, archive.num_classes)


def test_the_official_archives_have_60000_images():
    for archives in cifar.ARCHIVES.values():
        for archive in archives:
            assert archive.train_rows * len(archive.train) == 50_000
            assert archive.test_rows == 10_000


def test_wrong_md5(tmp_path):
    path, _, _ = write_archive(tmp_path, "cifar10", 0)
    with pytest.raises(DataError, match=r"has md5 .*, so it is truncated.*c58f30108f718f92721af3b"):
        cifar.read_cifar("cifar10", str(path))


def test_archive_of_the_other_dataset(tmp_path):
    path, archives, _ = write_archive(tmp_path, "cifar100", 1)
    with pytest.raises(DataError, match=r"is cifar-100-binary.tar.gz; choose --data.name cifar100"):
        cifar.read_cifar("cifar10", str(path), archives)


def test_truncated_archive(tmp_path):
    path, archives, _ = write_archive(tmp_path, "cifar10", 1)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(DataError, match="so it is truncated, damaged or another file"):
        cifar.read_cifar("cifar10", str(path), archives)


@pytest.mark.parametrize("damage", ["not gzip", "truncated"])
def test_archive_that_is_none(tmp_path, damage):
    """Its md5 is as expected, so that reading itself meets the damage."""
    path, _, _ = write_archive(tmp_path, "cifar10", 1)
    content = b"hello" if damage == "not gzip" else path.read_bytes()[:-5000]
    path.write_bytes(content)
    broken = dataclasses.replace(SMALL["cifar10"][1], md5=hashlib.md5(content).hexdigest())
    with pytest.raises(DataError, match="cannot be read"):
        cifar.read_cifar("cifar10", str(path), {"cifar10": (broken,)})


def test_archive_without_a_file(tmp_path):
    path = tmp_path / "cifar.tar.gz"
    with gzip.open(path, "wb") as file, tarfile.open(fileobj=file, mode="w"):
        pass
    empty = dataclasses.replace(
        SMALL["cifar100"][1], md5=hashlib.md5(path.read_bytes()).hexdigest()
    )
    with pytest.raises(
        DataError, match=r"lacks fine_label_names.txt, test.bin, train.bin; get cif"
    ):
        cifar.read_cifar("cifar100", str(path), {"cifar100": (empty,)})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "absent", "absent is missing; get cifar-10-python"),
        (lambda root: root, "holds neither cifar-10-python.tar.gz nor cifar-10-binary.tar.gz"),
    ],
)
def test_nothing_there(tmp_path, make, message):
    with pytest.raises(DataError, match=message):
        cifar.read_cifar("cifar10", str(make(tmp_path)))


def test_file_missing(tmp_path):
    write_directory(tmp_path, SMALL["cifar10"][0], data_batch_3=None, **{"batches.meta": None})
    with pytest.raises(DataError, match=r"lacks batches\.meta, data_batch_3; get"):
        cifar.read_cifar("cifar10", str(tmp_path), SMALL)


def batch(**changes):
    planes, labels = make_rows(0, 10)
    content = {b"data": planes, b"labels": labels.tolist()}
    content.update({key.encode(): value for key, value in changes.items()})
    return python2_pickle({key: value for key, value in content.items() if value is not None})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (batch()[:-100], "data_batch_2 is not a sound pickle"),
        (b"", "data_batch_2 is not a sound pickle"),
        (b"\x89PNG", "data_batch_2 is not a sound pickle"),
        (python2_pickle([1, 2]), "holds a list, expected a dictionary"),
        (batch(labels=None), "must hold an array 'data' and a list 'labels'; it has data"),
        (batch(labels=[1] * 5), "has 6 images but 5 labels"),
        (batch(labels=[1] * 5 + [10]), r"1 labels out of range, first labels\[5\] = 10; expected"),
        (batch(labels=[1] * 5 + [-1]), r"first labels\[5\] = -1"),
        (batch(labels=[1] * 5 + [b"x"]), "labels that are not whole numbers"),
        (batch(data=make_rows(0, 10, num=5)[0]), r"has data uint8 \[5, 3072\], expected uint8 \[6"),
        (batch(data=np.zeros((6, 3072), ">i2")), "array of dtype b'i2', expected bytes"),
    ],
)
def test_damaged_pickles(tmp_path, content, message):
    write_directory(tmp_path, SMALL["cifar10"][0], data_batch_2=content)
    with pytest.raises(DataError, match=message):
        cifar.read_cifar("cifar10", str(tmp_path), SMALL)


@pytest.mark.parametrize(("name", "message"), [("cifar10", "18437 bytes"), ("cifar100", "18443")])
def test_truncated_records(tmp_path, name, message):
    archive = SMALL[name][1]
    file = archive.train[0]
    write_directory(tmp_path, archive, **{file: make_files(archive)[0][file][:-1]})
    with pytest.raises(DataError, match=f"{file} has {message}.*truncated or another file"):
        cifar.read_cifar(name, str(tmp_path), SMALL)


def test_record_with_a_label_out_of_range(tmp_path):
    archive = SMALL["cifar100"][1]
    content = bytearray(make_files(archive)[0]["test.bin"])
    content[3074 * 4 + 1] = 100
    write_directory(tmp_path, archive, **{"test.bin": bytes(content)})
    with pytest.raises(DataError, match=r"test.bin has 1 labels out of range, .*\[4\] = 100"):
        cifar.read_cifar("cifar100", str(tmp_path), SMALL)


@pytest.mark.parametrize(("which", "content"), [(1, b"cat\ndog\n"), (0, python2_pickle({}))])
def test_class_names_that_do_not_fit(tmp_path, which, content):
    archive = SMALL["cifar10"][which]
    write_directory(tmp_path, archive, **{archive.names: content})
    with pytest.raises(DataError, match=r"has [02] class names, expected 10"):
        cifar.read_cifar("cifar10", str(tmp_path), SMALL)


# Pickles are programs


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path):
    target = tmp_path / "written"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        raw = pickle.dumps({"data": Attack(target)}, protocol=protocol)
        with pytest.raises(DataError, match=r"batch is not a sound.*it asks to run \w+\.open"):
            load_plain(raw, "batch")
    assert not target.exists()


@pytest.mark.parametrize("module", ["os.system", "builtins.eval", "numpy.load", "numpy.memmap"])
def test_names_that_are_refused(module):
    package, name = module.rsplit(".", 1)
    raw = f"c{package}\n{name}\n.".encode()
    with pytest.raises(DataError, match=f"it asks to run {module}"):
        load_plain(raw, "batch")


def test_a_pickle_of_python_3_is_read_too():
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    content = load_plain(pickle.dumps({"data": array, "labels": [1, 2]}), "batch")
    np.testing.assert_array_equal(content["data"], array)
    assert content["labels"] == [1, 2]
