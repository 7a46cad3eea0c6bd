"""Bad input on the command line: one clear line, status 2, nothing trained, nothing left."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from acme_jax import presets, system
from acme_jax.run_dir import RunDirectory
from scripts import run_acme

SCRIPT = Path(run_acme.__file__)


def fail(capsys, *argv):
    """The message of a command line that must fail before any training."""
    status = run_acme.main([str(a) for a in argv])
    shown = capsys.readouterr()
    assert status == 2
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert "reference model" not in shown.out
    return shown.err.strip().removeprefix("error: ")


def fail_on_data(capsys, tmp_path, preset, *argv):
    """The same for input that is refused after the run directory was made: it is free again."""
    message = fail(capsys, preset, "--run-dir", tmp_path / "run", *argv)
    assert not (tmp_path / "run").exists()
    return message


def test_unknown_preset_in_a_process_of_its_own():
    command = [sys.executable, str(SCRIPT), "cifar"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    names = ", ".join(presets.PRESETS)
    assert done.stderr == f"error: unknown preset 'cifar'; expected one of {names}\n"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--fleet.bugets", "0.5"], "--fleet.budgets"),  # Suggests the right one.
        (["--data.name", "cifar"], "'fashion_mnist'"),
        (["--fleet.budgets", "-1"], "budgets must be positive fractions"),
        (["--reference.epochs", "many"], "--reference.epochs"),
    ],
)
def test_key_or_value_that_the_command_line_does_not_know(capsys, tmp_path, arguments, shown):
    with pytest.raises(SystemExit) as stopped:
        run_acme.main(["smoke", "--run-dir", str(tmp_path / "run"), *arguments])
    assert stopped.value.code == 2
    assert shown in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", -1], "Config.seed must not be negative, got -1"),
        (["--distill.depths-per-step", 3], "more than the 2 depths of search.fractions"),
    ],
)
def test_impossible_combination(capsys, arguments, message):
    assert message in fail(capsys, "smoke", *arguments)


def test_budget_that_no_sub_network_fits(capsys, tmp_path):
    message = fail_on_data(capsys, tmp_path, "smoke", "--fleet.budgets", 0.9, 0.05)
    # Half of 4 blocks, heads and neurons: the smallest that the space of `smoke` has.
    size, heads, neurons = 32, 2, 32
    block = 4 * size + 3 * (size * heads * 8 + heads * 8) + heads * 8 * size + size
    block += size * neurons + neurons + neurons * size + size
    smallest = 4 * (4 * size + size + size + 17 * size + 2 * size + 2 * block)
    assert "no sub-network fits the devices of edge 1" in message
    assert f"the smallest sub-network has {smallest:,} bytes" in message
    assert "raise fleet.budgets" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.patch-size", 3], "8 x 8 is not divisible by .*patch_size 3; .*: 1, 2, 4, 8"),
        (["--fleet.devices-per-edge", 2000], "4000 devices but only 747 samples"),
        (["--fleet.samples-per-device", 1], "leaves no sample for each of the 4 labels of client"),
        (
            ["--fleet.distribution", "dirichlet", "--fleet.dirichlet-alpha", 1e-4],
            r"device \d has samples of one class only \(label \d\)",
        ),
        (["--data.public-train", 1700], "has 1797 images to divide, but .* lower the public_*"),
        (["--data.path", "here"], "digits is part of an installed package and takes no path"),
        (["--reference.batch-size", 51], r"batch_size \(51\) must be a multiple of shards \(2\)"),
        (["--header.proxy-fraction", 0.01], "proxy_fraction leaves 7 samples"),
        (["--compute.num-devices", 64], "num_devices is 64, but JAX sees"),
    ],
)
def test_input_that_does_not_fit_the_data(capsys, tmp_path, arguments, message):
    assert re.search(message, fail_on_data(capsys, tmp_path, "smoke", *arguments))


def write_idx(path, array, magic=None):
    codes = {"uint8": 0x08, "float32": 0x0D}
    header = bytes([0, 0, codes[array.dtype.name], array.ndim]) if magic is None else magic
    sizes = np.array(array.shape, ">u4").tobytes()
    path.write_bytes(header + sizes + array.astype(array.dtype.newbyteorder(">")).tobytes())


def write_fashion(directory, spoil=None):
    """Four idx files of noise; `spoil(name, array)` may change one."""
    rng = np.random.default_rng(0)
    directory.mkdir()
    for part, count in (("train", 600), ("t10k", 100)):
        arrays = {
            f"{part}-images-idx3-ubyte": rng.integers(0, 256, (count, 28, 28), np.uint8),
            f"{part}-labels-idx1-ubyte": (np.arange(count) % 10).astype(np.uint8),
        }
        for name, array in arrays.items():
            write_idx(directory / name, array if spoil is None else spoil(name, array))
    return directory


def fail_on_files(capsys, tmp_path, directory):
    return fail_on_data(capsys, tmp_path, "fashion_mnist", "--data.path", directory)


def test_directory_of_the_files_is_missing(capsys, tmp_path):
    message = fail_on_files(capsys, tmp_path, tmp_path / "nowhere")
    assert "dataset fashion_mnist is missing" in message
    assert "apt-get install dataset-fashion-mnist" in message


def test_one_file_is_missing(capsys, tmp_path):
    directory = write_fashion(tmp_path / "data")
    (directory / "t10k-images-idx3-ubyte").unlink()
    message = fail_on_files(capsys, tmp_path, directory)
    assert "t10k-images-idx3-ubyte.gz is missing" in message


def test_one_file_is_truncated(capsys, tmp_path):
    file = write_fashion(tmp_path / "data") / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:1000])
    message = fail_on_files(capsys, tmp_path, file.parent)
    assert f"{file} is truncated: 1000 bytes, its header promises 470416" in message


def test_one_file_has_a_wrong_magic_number(capsys, tmp_path):
    file = write_fashion(tmp_path / "data") / "train-labels-idx1-ubyte"
    write_idx(file, np.zeros(600, np.uint8), magic=b"\x89PNG")
    message = fail_on_files(capsys, tmp_path, file.parent)
    assert f"{file} is not an idx file: its magic number is 0x89504e47" in message


def test_labels_out_of_range(capsys, tmp_path):
    def spoil(name, array):
        return np.where(np.arange(600) == 7, np.uint8(10), array) if "train-l" in name else array

    message = fail_on_files(capsys, tmp_path, write_fashion(tmp_path / "data", spoil))
    assert "1 labels out of range, first labels[7] = 10; expected 0 to 9" in message


def test_nan_in_images(capsys, tmp_path):
    images = np.random.default_rng(0).random((700, 28, 28, 1), np.float32)
    images[603, 14, 14] = np.nan
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(700) % 10)
    arguments = ("--data.name", "arrays", "--data.path", tmp_path / "data.npz")
    message = fail_on_data(capsys, tmp_path, "mnist5k", *arguments)
    assert "1 images hold NaN or infinite pixels, first image 603" in message


def test_too_few_images_for_the_preset(capsys, tmp_path):
    message = fail_on_files(capsys, tmp_path, write_fashion(tmp_path / "data"))
    assert "fashion_mnist has 600 images to divide" in message


def test_directory_that_holds_another_run(capsys, tmp_path):
    other = dataclasses.replace(presets.get("smoke"), seed=5)
    RunDirectory.create_or_open(tmp_path / "run", other, resume=False).close()
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    for resume in ([], ["--resume"]):
        message = fail(capsys, "smoke", "--run-dir", tmp_path / "run", *resume)
        assert message.endswith(
            "run holds another run; choose another --run-dir, or set these as there: "
            "seed is 5 there, 0 now"
        )
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_directory_that_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    message = fail(capsys, "smoke", "--run-dir", tmp_path / "file" / "run")
    assert "file" in message


def test_bad_input_never_removes_a_run_that_has_begun(capsys, tmp_path):
    """Data may go missing between two starts; what was computed must stay."""
    data, path = write_fashion(tmp_path / "data"), tmp_path / "run"
    argv = ["fashion_mnist", "--data.path", data, "--run-dir", path, "--resume"]
    preset = presets.get("fashion_mnist")
    config = dataclasses.replace(preset, data=dataclasses.replace(preset.data, path=str(data)))
    run = RunDirectory.create_or_open(path, config, resume=False)
    run.append_metrics("reference model", epoch=1, loss=0.5)
    run.close()
    (data / "train-images-idx3-ubyte").unlink()
    assert "is missing" in fail(capsys, *argv)
    assert (path / "config.json").exists()
    assert len((path / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_mistake_in_the_program_is_not_taken_for_bad_input(monkeypatch):
    def run(*_, **__):
        raise ValueError("shapes (3,) and (4,) do not fit")

    monkeypatch.setattr(system, "run", run)
    with pytest.raises(ValueError, match="do not fit"):
        run_acme.main(["smoke"])
