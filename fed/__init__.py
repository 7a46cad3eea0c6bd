"""Federated learning of personalised models: clients, rounds, similarity, aggregation, traffic.

Pure functions on arrays; nothing here knows which model is trained. The modules load on
first use, so `import fed` alone does not import JAX.

Shape letters: C clients, N samples (padded), D features, Q quantiles, S steps, B batch.
"""

import importlib
from types import ModuleType

__all__ = [
    "adaptive_coding",
    "aggregate",
    "algorithm",
    "algorithms",
    "arrivals",
    "buckets",
    "chain",
    "chunks",
    "cka",
    "class_statistics",
    "clients",
    "coding_sizes",
    "errors",
    "factorised",
    "gmm",
    "hessian_spectrum",
    "hypernetwork",
    "image_file",
    "kde",
    "kde_device",
    "kde_edge",
    "kde_fit",
    "label_skew",
    "latent_generator",
    "mapped",
    "multihost",
    "neural_coding",
    "participation",
    "partition",
    "pixel_model",
    "quantize",
    "range_coder",
    "reassembly",
    "similarity",
    "simulate",
    "sources",
    "stitching",
    "stream",
    "traffic",
    "transport",
    "tri_matrix",
    "unit_dropout",
]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"fed.{name}")
    raise AttributeError(f"module 'fed' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
