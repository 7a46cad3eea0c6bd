"""What importing `nas` costs: jax and numpy, no other package, and no computation."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import nas

ROOT = Path(nas.__file__).parent
MODULES = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "__init__")
LIGHT = [f"nas.{name}" for name in MODULES if name != "controller"]
ALLOWED = {"jax", "numpy", "nas"} | set(sys.stdlib_module_names)


def _import(*statements, **environment):
    """Packages that a fresh interpreter has loaded after each of the statements."""
    report = "seen.append(sorted({n.partition('.')[0] for n in sys.modules}))"
    code = "import json, sys\nseen = []\n" + "".join(f"{s}\n{report}\n" for s in statements)
    done = subprocess.run(
        [sys.executable, "-c", code + "print(json.dumps(seen))"],
        env=os.environ | environment,
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [set(packages) for packages in json.loads(done.stdout)]


def test_every_module_but_the_controller_loads_jax_and_numpy_only():
    bare, light = _import("import jax, jax.numpy, numpy", "import " + ", ".join(LIGHT))
    assert light - bare - set(sys.stdlib_module_names) == {"nas"}
    assert not light & {"flax", "optax", "orbax", "sklearn", "acme_jax", "fed"}


def test_importing_computes_nothing():
    # Any array made at import would start a backend, and there is none of this name.
    _import("import " + ", ".join(LIGHT), JAX_PLATFORMS="no_such_backend")


def test_the_package_itself_loads_nothing():
    empty, package = _import("pass", "import nas")
    assert package - empty - set(sys.stdlib_module_names) == {"nas"}


def test_the_sources_name_no_other_package():
    """What jax itself happens to load must not hide an import of our own."""
    for name in MODULES:
        allowed = ALLOWED | ({"optax"} if name == "controller" else set())
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                named = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0
                named = {node.module.partition(".")[0]}
            else:
                continue
            assert named <= allowed, f"nas/{name}.py imports {named - allowed}"
