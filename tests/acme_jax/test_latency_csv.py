"""The file of measured latencies: what is written comes back, what is wrong is refused."""

import re

import numpy as np
import pytest

from acme_jax import latency_csv
from acme_jax.idx import DataError
from nas.cost import ModelDims

DIMS = ModelDims(3, 8, 4, 2, 8, 5, 16)
FACTS = {"command": "python scripts/profile_device.py", "commit": "abc"}


def measurements(batch_size=1):
    archs = [
        latency_csv.make_genome(1, [1, 1, 1], [2, 2, 2]),
        latency_csv.make_genome(3, [4, 4, 4], [8, 8, 8]),
        latency_csv.make_genome(2, [1, 3, 4], [8, 2, 5]),
    ]
    times = np.array([[1e-4, 2e-4, 1.5e-4], [1.1e-4, 2e-4, 1e-4], [9e-5, 2e-4, 2e-4]]) / batch_size
    roles = np.array(["fit", "fit", "between"])
    return latency_csv.Measurements(DIMS, batch_size, roles, latency_csv.stack(archs), *times)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "latency.csv"
    latency_csv.write(path, [measurements(1), measurements(16)], FACTS)
    return path


def test_what_is_written_comes_back(file):
    found = latency_csv.read(file)
    assert [part.batch_size for part in found] == [1, 16]
    for part, expected in zip(found, [measurements(1), measurements(16)], strict=True):
        assert part.dims == expected.dims
        for name in ("roles", "latency_s", "first_half_s", "second_half_s"):
            value, wanted = getattr(part, name), getattr(expected, name)
            if name == "roles":
                assert value.tolist() == wanted.tolist()
            else:
                np.testing.assert_allclose(value, wanted, rtol=1e-4)
        for leaf, wanted in zip(part.archs, expected.archs, strict=True):
            np.testing.assert_array_equal(leaf, wanted)


def test_the_file_documents_itself(file):
    comments = [line for line in file.read_text().splitlines() if line.startswith("#")]
    for column in latency_csv.COLUMNS:
        assert any(re.match(rf"#  .*\b{column}\b.*:", line) for line in comments), column
    assert "# command: python scripts/profile_device.py" in comments
    assert "# commit: abc" in comments
    assert any("modelled, not measured" in line for line in comments)


def changed(file, old, new, count=1):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, count))
    return file


LAST = "between,2,1 3 4,8 2 5,"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("# dims: ", "# sizes: ", "does not say which model was measured"),
        ("num_heads=4", "num_heads=x", "does not say which model was measured"),
        ("num_heads=4 ", "", "does not say which model was measured"),
        ("num_heads=4", "num_heads=0", "does not say which model was measured"),
        ("role,depth", "depth,role", "has no line 'role,depth,heads"),
        ("1.5000e-04", "nan", r"line \d+: latency_s is nan; .* positive and finite"),
        ("1.5000e-04", "-1e-4", r"latency_s is -1e-4; .* positive and finite"),
        ("1.5000e-04", "0", "positive and finite"),
        ("9.0000e-05", "inf", "second_half_s is inf"),
        ("1.5000e-04", "fast", "could not convert string to float: 'fast'"),
        ("1.5000e-04,", "", "8 fields, expected 9"),
        (LAST, "test,2,1 3 4,8 2 5,", "role 'test'; expected one of fit, held_out, between"),
        (LAST, "between,4,1 3 4,8 2 5,", "depth is '4'; expected 1 numbers from 1 to 3"),
        (LAST, "between,2,1 3 5,8 2 5,", "heads is '1 3 5'; expected 3 numbers from 1 to 4"),
        (LAST, "between,2,1 3 4,8 2,", "neurons is '8 2'; expected 3 numbers from 1 to 8"),
        (LAST, "between,2,2 3 4,8 2 5,", "does not belong to this model"),
        (LAST, "between,2,1 3 four,8 2 5,", "invalid literal"),
    ],
)
def test_a_spoilt_file_is_refused_with_its_place(file, old, new, message):
    with pytest.raises(DataError, match=message) as caught:
        latency_csv.read(changed(file, old, new))
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_network_measured_twice_is_refused_even_in_other_words(file):
    """Heads of a dropped block (here block 2) do not make another network."""
    row = next(line for line in file.read_text().splitlines() if line.startswith(LAST))
    for again in (row, row.replace("1 3 4,8 2 5", "1 3 2,8 2 7")):
        text = file.read_text()
        file.write_text(text + again + "\n")
        with pytest.raises(DataError, match=r"line \d+: the network of line \d+ again"):
            latency_csv.read(file)
        file.write_text(text)


def test_files_that_are_none(tmp_path, file):
    with pytest.raises(DataError, match=r"nowhere.csv is missing; make it with scripts/profile"):
        latency_csv.read(tmp_path / "nowhere.csv")
    with pytest.raises(DataError, match="not a file of measured latencies"):
        latency_csv.read(tmp_path)
    binary = tmp_path / "binary.csv"
    binary.write_bytes(bytes(range(256)))
    with pytest.raises(DataError, match="not a file of measured latencies"):
        latency_csv.read(binary)
    empty = tmp_path / "empty.csv"
    empty.write_text("")
    with pytest.raises(DataError, match="does not say which model"):
        latency_csv.read(empty)
    only_head = [line for line in file.read_text().splitlines() if line.startswith(("#", "role"))]
    file.write_text("\n".join(only_head))
    with pytest.raises(DataError, match="has no measurements"):
        latency_csv.read(file)
