"""Named configurations. The command line starts from one of these and may override any field."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from acme_jax.config import (
    ComputeConfig,
    Config,
    ConfigError,
    DataConfig,
    DistillConfig,
    FleetConfig,
    HeaderConfig,
    ModelConfig,
    RefineConfig,
    SearchConfig,
    TrainConfig,
)


def mnist5k() -> Config:
    """The main job: 5,000 MNIST images, 3 edges with 5 devices each.

    Command: `python scripts/run_acme.py mnist5k`
    Time: about 140 s and 1.8 GB on 2 CPU cores, cold, compiling included.
    Expected: reference 0.94 on the public test split, every uniform sub-network above 0.80,
    devices 0.93 after ACME (3 seeds; docs/bench_main.json).
    """
    return Config(preset="mnist5k")


def digits() -> Config:
    """scikit-learn's 1,797 digits of 8 x 8 pixels, 2 edges with 4 devices each.

    Command: `python scripts/run_acme.py digits`
    Time: about 110 s and 1.5 GB on 2 CPU cores.
    Expected (one seed): reference 0.94 on the public test split, devices 0.95 after ACME. The
    images are so small that importances weigh more than they do: uplink 7 times centralised.
    """
    return Config(
        preset="digits",
        data=DataConfig(name="digits", public_train=750, public_select=180, public_test=180),
        model=ModelConfig(patch_size=2),
        # No shifts: one pixel of eight moves a digit by an eighth of its width.
        reference=TrainConfig(epochs=40, max_shift=0),
        distill=DistillConfig(
            width=dataclasses.replace(DistillConfig().width, epochs=4, max_shift=0),
            depth=dataclasses.replace(DistillConfig().depth, epochs=20, max_shift=0),
        ),
        fleet=FleetConfig(
            num_edges=2, devices_per_edge=4, budgets=(0.3, 0.7), samples_per_device=80
        ),
    )


def fashion_mnist() -> Config:
    """Fashion-MNIST (60,000 + 10,000 images from idx files), 3 edges with 5 devices each.

    The files come from the Debian package dataset-fashion-mnist, or from `--data.path`.

    Command: `python scripts/run_acme.py fashion_mnist`
    Time: about 230 s and 2 GB on 2 CPU cores.
    Expected (one seed): reference 0.83 on the public test split, devices 0.92 after ACME (each
    has to tell fewer classes apart).
    """
    return Config(
        preset="fashion_mnist",
        data=DataConfig(
            name="fashion_mnist", public_train=4000, public_select=800, public_test=2000
        ),
        fleet=FleetConfig(samples_per_device=320),
    )


def smoke() -> Config:
    """Every step of the loop at the smallest size that still learns something.

    Command: `python scripts/run_acme.py smoke`
    Time: about 36 s and 0.8 GB on 2 CPU cores (JAX 0.10; 44 s with 0.11 and 0.12), half of it
    compiling.
    """
    data = DataConfig(name="digits", public_train=700, public_select=150, public_test=200)
    return Config(
        preset="smoke",
        data=data,
        model=ModelConfig(patch_size=2, embed_dim=32, num_layers=4, num_heads=4, num_neurons=64),
        reference=TrainConfig(epochs=5, batch_size=50, max_shift=0),
        distill=DistillConfig(
            width=TrainConfig(epochs=2, batch_size=50, max_shift=0),
            depth=TrainConfig(epochs=2, batch_size=50, max_shift=0),
        ),
        search=SearchConfig(population_size=16, num_generations=5, fractions=(0.5, 1.0)),
        fleet=FleetConfig(
            num_edges=2, devices_per_edge=3, budgets=(0.6, 0.9), samples_per_device=80
        ),
        header=HeaderConfig(
            channels=16,
            search_epochs=2,
            controller_steps=5,
            num_candidates=4,
            final_epochs=3,
            batch_size=50,
        ),
        refine=RefineConfig(rounds=3, prune_per_round=4),
        compute=ComputeConfig(fast_compile=True),
    )


def minilm_text() -> Config:
    """A pretrained MiniLM on a text-classification set, 2 edges with 4 devices each.

    The set comes from `python scripts/make_text_dataset.py docstrings.tsv`, or is any .csv, .tsv or
    .jsonl file with columns `text` and `label`. Without access to the hub give a directory of the
    checkpoint as --model.pretrained.

    Command: `python scripts/run_acme.py minilm_text --data.path docstrings.tsv`
    """
    phase = TrainConfig(epochs=1, learning_rate=2e-4, weight_decay=0.01, max_shift=0)
    return Config(
        preset="minilm_text",
        data=DataConfig(name="text", public_train=1500, public_select=300, public_test=400),
        model=ModelConfig(pretrained="sentence-transformers/all-MiniLM-L6-v2", max_tokens=24),
        reference=dataclasses.replace(phase, epochs=3, learning_rate=1e-4),
        distill=DistillConfig(width=phase, depth=dataclasses.replace(phase, epochs=3)),
        search=SearchConfig(population_size=16, num_generations=6),
        fleet=FleetConfig(
            num_edges=2,
            devices_per_edge=4,
            # Most of MiniLM's bytes are its word embedding, which every sub-network keeps.
            budgets=(0.7, 1.0),
            distribution="dirichlet",
            samples_per_device=200,
        ),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    preset.__name__: preset for preset in (mnist5k, digits, fashion_mnist, smoke, minilm_text)
}


def get(name: str) -> Config:
    """The preset of that name.

    Raises:
      ConfigError: there is none; the message lists the names.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]()
