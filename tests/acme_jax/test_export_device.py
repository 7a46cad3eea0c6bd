"""The commands that export a run's devices and measure exported networks."""

import json
import sys

import numpy as np
import pytest
from small_models import make_model

from acme_jax import device_model
from scripts import bench_runtime, export_device

pytest.importorskip("onnxruntime")


@pytest.fixture
def run_dir(tmp_path):
    for number in (0, 1, 2):
        device_model.save(make_model(), tmp_path / "devices" / f"{number:03d}", {"device": number})
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["export_device.py", *map(str, arguments)])
    export_device.main()


def made(run_dir):
    return sorted(path.parent.name for path in run_dir.glob("devices/*/model.onnx"))


def test_all_devices_or_some(run_dir, monkeypatch, capsys):
    command(monkeypatch, run_dir, "--devices", 2, "--formats", "onnx")
    assert made(run_dir) == ["002"]
    assert "002: model.onnx" in capsys.readouterr().out
    command(monkeypatch, run_dir / "devices" / "001", "--formats", "onnx")
    assert made(run_dir) == ["001", "002"]
    command(monkeypatch, run_dir, "--formats", "onnx")
    assert made(run_dir) == ["000", "001", "002"]
    assert not list(run_dir.glob("devices/*/model.stablehlo"))


def test_bad_input_is_one_line(run_dir, monkeypatch):
    with pytest.raises(SystemExit, match=r"error: .* has no device 7; it has 0 to 2"):
        command(monkeypatch, run_dir, "--devices", 7)
    with pytest.raises(SystemExit, match=r"error: .*nothing holds no devices; expected"):
        command(monkeypatch, run_dir / "nothing")
    (run_dir / "devices" / "000" / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match=r"error: .*000 holds no model \(model.safetensors"):
        command(monkeypatch, run_dir, "--formats", "onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(SystemExit, match=r"error: .*pip install onnx onnxruntime"):
        command(monkeypatch, run_dir)
    assert made(run_dir) == []


@pytest.mark.slow
def test_runtime_is_measured(tmp_path, monkeypatch):
    out = tmp_path / "bench.json"
    monkeypatch.setattr(sys, "argv", ["bench_runtime.py", "--quick", "--held-out", "2", "--rounds",
                                      "2", "--calls", "2", "--out", str(out)])  # fmt: skip
    bench_runtime.main()
    report = json.loads(out.read_text())
    assert {row["role"] for row in report["rows"]} == {"fit", "held_out", "between"}
    for row in report["rows"]:
        assert row["peak_bytes"] > report["empty_process_bytes"] > 10e6
        assert 1e-6 < row["latency_s"] < 1
        assert row["file_bytes"] > 4 * row["num_params"]
    error = report["errors"]["onnxruntime table"]["held_out"]
    assert np.isfinite(error["mape"])
