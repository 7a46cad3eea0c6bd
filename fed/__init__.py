"""Federated learning of personalised models: clients, rounds, similarity, aggregation, traffic.

Pure functions on arrays; nothing here knows which model is trained. The modules load on
first use, so `import fed` alone does not import JAX.

Shape letters: C clients, N samples (padded), D features, Q quantiles, S steps, B batch.
"""

import importlib
from types import ModuleType

__all__ = [
    "aggregate",
    "algorithm",
    "algorithms",
    "arrivals",
    "buckets",
    "chunks",
    "clients",
    "errors",
    "mapped",
    "multihost",
    "participation",
    "partition",
    "similarity",
    "simulate",
    "sources",
    "stream",
    "traffic",
]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"fed.{name}")
    raise AttributeError(f"module 'fed' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
