"""Makes a text-classification set from data at hand: which library does a docstring describe?

    python scripts/make_text_dataset.py docstrings.tsv

Walks through the installed NumPy, SciPy, scikit-learn, Matplotlib, JAX and Optax, and writes the
first sentence of every public function's and class's docstring with the library's name: columns
`text` and `label`. Names of libraries are blotted out of the sentences, and a sentence that
occurs twice is left out, so the set has to be learnt from what the functions do.
"""

from __future__ import annotations

import csv
import importlib
import inspect
import pkgutil
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

LIBRARIES = ("numpy", "scipy", "sklearn", "matplotlib", "jax", "optax")
PER_LIBRARY = 1200
"""At most this many sentences of a library, so that classes are of a similar size."""

_NAMES = re.compile(r"numpy|scipy|scikit-learn|sklearn|matplotlib|jax|optax|lax|pyplot", re.I)
_PRIVATE = re.compile(r"_|tests?$|test_|conftest|setup|distutils|f2py|experimental|example")


def modules(library: ModuleType) -> Iterator[ModuleType]:
    """A library and its public sub-modules; those that cannot be imported are passed over."""
    yield library
    for found in pkgutil.iter_modules(getattr(library, "__path__", [])):
        if _PRIVATE.match(found.name):
            continue
        try:
            module = importlib.import_module(f"{library.__name__}.{found.name}")
        except Exception:  # optional dependencies, other operating systems
            continue
        yield from modules(module)


def first_sentence(text: str) -> str:
    """The docstring's first sentence on one line, without names of libraries."""
    paragraph = " ".join(inspect.cleandoc(text).split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.:!?])\s", paragraph)[0]
    return _NAMES.sub("library", sentence)


def sentences(name: str) -> list[str]:
    """The first sentences of a library's docstrings, in the order of its modules."""
    found: dict[str, None] = {}
    for module in modules(importlib.import_module(name)):
        for attribute, value in sorted(vars(module).items()):
            if attribute.startswith("_") or not (inspect.isfunction(value) or inspect.isclass(value)
                                                 or callable(value)):  # fmt: skip
                continue
            if not str(getattr(value, "__module__", "")).startswith(name):
                continue
            sentence = first_sentence(getattr(value, "__doc__", None) or "")
            if len(sentence.split()) >= 4:
                found[sentence] = None
    return list(found)


def main(argv: list[str]) -> int:
    """Writes the file."""
    if len(argv) != 1:
        print("usage: make_text_dataset.py FILE.tsv", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")
    texts = {name: sentences(name) for name in LIBRARIES}
    counts = Counter(text for group in texts.values() for text in group)
    path = Path(argv[0])
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["text", "label"])
        for name, group in texts.items():
            own = [text for text in group if counts[text] == 1][:PER_LIBRARY]
            writer.writerows([text, name] for text in own)
            print(f"{name}: {len(own)} sentences")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
