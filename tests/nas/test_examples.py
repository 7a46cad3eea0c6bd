"""The examples run as written, at reduced size, and stand on `nas` alone."""

import ast
import runpy
import sys
from pathlib import Path

import jax

EXAMPLES = Path(__file__).resolve().parents[2] / "scripts" / "examples"


def _run(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with jax.numpy_rank_promotion("allow"):  # JAX's default, which a stranger's code runs under
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_search_mixer_prints_a_front(monkeypatch, capsys):
    _run(monkeypatch, "search_mixer.py", 40, 3)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    flops, errors = ([float(row[column]) for row in rows] for column in (0, 1))
    assert len(rows) > 2
    assert flops == sorted(flops)
    assert errors == sorted(errors, reverse=True)  # a front: more FLOPs only for less error
    assert errors[-1] < errors[0]


def test_search_mixer_is_short_and_knows_only_nas():
    text = (EXAMPLES / "search_mixer.py").read_text()
    assert len(text.splitlines()) < 80
    modules = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
        )
    }
    assert not modules & {"acme_jax", "fed"}
    assert modules - set(sys.stdlib_module_names) == {"nas", "jax", "flax", "optax", "sklearn"}


def test_select_for_fleet_serves_and_draws(monkeypatch, capsys, tmp_path):
    picture = tmp_path / "fleet.png"
    _run(
        monkeypatch, "select_for_fleet.py",
        "--devices", 500, "--generations", 4, "--out", picture,
    )  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    served, none = int(lines[1].split()[0]), int(lines[3].split()[0])
    assert served + none == 500
    assert served > 100 and none > 10
    assert "nothing fits" in lines[4]
    assert picture.stat().st_size > 10_000
