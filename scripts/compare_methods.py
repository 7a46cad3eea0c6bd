"""Every method and control on the same devices: accuracy, bytes, FLOPs and seconds.

    python scripts/compare_methods.py [--dataset fashion_mnist] [--seeds 0 1 2] [--out DIR]

The same as `scripts/reproduce.py methods`, whose other arguments it takes too. The JSON goes to
DIR/methods-DATASET.json, from which `scripts/make_results.py` makes the tables of docs/METHODS.md.
"""

from __future__ import annotations

import sys

import reproduce

if __name__ == "__main__":
    sys.exit(reproduce.main(["methods", *sys.argv[1:]]))
