r"""Latency and memory of exported sub-networks on onnxruntime, beside the cost models.

    python scripts/bench_runtime.py [--preset mnist5k] [--pretrained DIR] [--held-out 12] \
        [--rounds 16] [--calls 20] [--out docs/bench_runtime.json]

Needs `pip install -e '.[onnx]'`. Measured is what the cost models describe: the sliced
backbone from images to the last hidden state, one image, one thread. Uniform networks are fitted
to (`acme_jax.profiling`), random per-layer ones are held out. A call that counts is one of many, in
rounds that visit all networks in a random order; memory is the peak of a fresh process that loads
and runs the file. About 2 minutes; run it on an idle machine.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from acme_jax import (
    concrete,
    encoders,
    export_onnx,
    latency_csv,
    presets,
    profiling,
    slicing,
    supernet,
)
from acme_jax.encoders import EncoderConfig
from acme_jax.export import ExportError
from acme_jax.fleet import REFERENCE_PROFILE
from acme_jax.latency_csv import Measurements, genome
from acme_jax.profiling import Networks
from acme_jax.run_dir import versions
from acme_jax.starting_point import make_starting_point
from nas import cost_fit
from nas.arch import ArchSpace
from nas.cost import CostModel

ROOT = Path(__file__).resolve().parent.parent

FRESH = """
import sys
import numpy as np
import onnxruntime
if len(sys.argv) > 1:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(sys.argv[1], options)
    first = session.get_inputs()[0]
    dtype = np.int32 if first.type == "tensor(int32)" else np.float32
    sample = np.zeros([1, *first.shape[1:]], dtype)
    for _ in range(10):
        session.run(None, {first.name: sample})
print(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1])
"""
# VmHWM and not getrusage: that one inherits the peak of the process that started this one.


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure."""

    preset: str = "mnist5k"
    """Whose model and search space; the weights are random, which does not matter."""
    pretrained: str | None = None
    """A Hugging Face checkpoint whose sizes replace the preset's."""
    held_out: int = 12
    """Random networks of the search space, and as many between its choices."""
    rounds: int = 16
    calls: int = 20
    """Timed calls of a visit."""
    seed: int = 0
    quick: bool = False
    """Only the corners of the grid of widths."""
    csv: Path | None = ROOT / "docs" / "latency_cpu.csv"
    """Latencies that XLA was measured with, to predict onnxruntime's from; if of this model."""
    out: Path | None = None


def full_network(arguments: Arguments) -> tuple[EncoderConfig, ArchSpace]:
    """The encoder of the preset or checkpoint, and its sub-networks."""
    config = presets.get(arguments.preset)
    if arguments.pretrained is not None:
        model = dataclasses.replace(config.model, pretrained=arguments.pretrained)
        config = dataclasses.replace(config, model=model)
    encoder = make_starting_point(config).encoder
    fractions = config.search.fractions
    if arguments.quick:
        fractions = (min(fractions), max(fractions))
    sizes = (encoder.num_layers, encoder.num_heads, encoder.num_neurons)
    return encoder, ArchSpace.from_fractions(*sizes, fractions)


def write_files(encoder: EncoderConfig, networks: Networks, folder: Path, seed: int) -> list[Path]:
    """One ONNX file for each network."""
    made = jax.jit(supernet.init, static_argnums=1)(jax.random.key(seed), encoder)
    params, files = jax.tree.map(np.asarray, made), []
    for i in range(len(networks.roles)):
        sliced = slicing.slice_params(params, genome(networks.archs, i))
        files.append(folder / f"{i}.onnx")
        files[-1].write_bytes(export_onnx.backbone_to_onnx(sliced, encoder))
    return files


def measure_latency(
    files: list[Path],
    networks: Networks,
    encoder: EncoderConfig,
    rounds: int,
    calls: int,
    seed: int,
) -> Measurements:
    """Medians over interleaved rounds, as `profiling.measure`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    sessions = [onnxruntime.InferenceSession(str(file), options) for file in files]
    rng = np.random.default_rng(seed)
    sample = encoders.random_inputs(encoder, 1, seed)
    feeds = [{session.get_inputs()[0].name: sample} for session in sessions]
    seconds = np.zeros((len(sessions), rounds, calls))
    for round in range(rounds):
        for i in rng.permutation(len(sessions)):
            sessions[i].run(None, feeds[i])
            for call in range(calls):
                start = time.perf_counter()
                sessions[i].run(None, feeds[i])
                seconds[i, round, call] = time.perf_counter() - start
    parts = (seconds, seconds[:, : rounds // 2], seconds[:, rounds // 2 :])
    dims = dataclasses.replace(encoder.dims, num_classes=0)
    return Measurements(dims, 1, *networks, *(np.median(part, axis=(1, 2)) for part in parts))


def peak_bytes(*file: Path) -> int:
    """Peak memory of a fresh process; without a file, of one that only imports onnxruntime."""
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *map(str, file)], capture_output=True, text=True, check=True
    )
    return 1024 * int(done.stdout)


def errors(measured: Measurements, model: CostModel) -> dict[str, dict[str, float]]:
    """How far a model's predictions are from the networks of each role."""
    found = {}
    for role in latency_csv.ROLES:
        archs, seconds = measured.where(role)
        if seconds.size > 1:
            predicted = profiling.predict(measured.dims, archs, model)
            error = cost_fit.prediction_error(predicted, seconds)
            found[role] = {k: round(float(v), 4) for k, v in error._asdict().items()}
    return found


def xla_models(csv: Path | None, measured: Measurements) -> dict[str, CostModel]:
    """Models fitted to XLA's latencies of the same network, where there are such."""
    if csv is None or not csv.exists():
        return {}
    parts = [p for p in latency_csv.read(csv) if p.batch_size == 1 and p.dims == measured.dims]
    fitted = profiling.fit_models(parts[0], REFERENCE_PROFILE) if parts else {}
    return {f"XLA {name}": fitted[name] for name in ("table", "roofline") if name in fitted}


def main() -> None:
    """Measures, prints and writes."""
    arguments = tyro.cli(Arguments)
    encoder, space = full_network(arguments)
    networks = profiling.choose_networks(space, arguments.held_out, arguments.seed)
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        try:
            files = write_files(encoder, networks, Path(folder), arguments.seed)
        except ExportError as error:
            sys.exit(f"error: {error}")
        measured = measure_latency(
            files, networks, encoder, arguments.rounds, arguments.calls, arguments.seed
        )
        empty = peak_bytes()
        memory = [peak_bytes(file) for file in files]
        sizes = [file.stat().st_size for file in files]
    fitted = profiling.fit_models(measured, REFERENCE_PROFILE)
    models = {f"onnxruntime {name}": fitted[name] for name in ("table", "roofline")}
    models |= xla_models(arguments.csv, measured)
    predictions = {name: profiling.predict(measured.dims, measured.archs, model)
                   for name, model in models.items()}  # fmt: skip
    rows = []
    for i, role in enumerate(measured.roles):
        arch = genome(measured.archs, i)
        rows.append(
            {
                "role": str(role),
                "depth": int(arch.depth),
                "heads": arch.heads.tolist(),
                "neurons": arch.neurons.tolist(),
                "num_params": int(concrete.num_params(measured.dims, arch)),
                "file_bytes": sizes[i],
                "latency_s": float(f"{measured.latency_s[i]:.4e}"),
                "predicted_s": {n: float(f"{p[i]:.4e}") for n, p in predictions.items()},
                "peak_bytes": memory[i],
            }
        )
    repeat = cost_fit.prediction_error(measured.second_half_s, measured.first_half_s)
    facts: dict[str, Any] = versions()
    for name in ("onnx", "onnxruntime"):
        facts["packages"][name] = importlib.metadata.version(name)
    report = {
        "command": shlex.join(["python", "scripts/bench_runtime.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "commit": facts.pop("commit"),
        "hardware": facts.pop("hardware"),
        "load_before": round(load_before, 2),
        "versions": facts,
        "preset": arguments.pretrained or arguments.preset,
        "repeatability": {k: round(float(v), 4) for k, v in repeat._asdict().items()},
        "empty_process_bytes": empty,
        "errors": {name: errors(measured, model) for name, model in models.items()},
        "rows": rows,
    }
    print(f"the machine repeats itself to {report['repeatability']['mape']:.1%}")
    for name, by_role in report["errors"].items():
        for role, e in by_role.items():
            print(f"{name:<22}{role:<10} MAPE {e['mape']:>7.1%}  largest {e['worst']:>7.1%}"
                  f"  bias {e['bias']:>7.1%}  Kendall {e['kendall']:.3f}")  # fmt: skip
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
