"""How the experiments use each data set: one configuration, shared by all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from acme_jax import presets
from acme_jax.config import Config, ConfigError, DataConfig, FleetConfig


def fashion_mnist() -> Config:
    """The main data here: 12,000 public images, 48,000 for devices, the official 10,000 test.

    Eight blocks, so that the paper's depths 0.25, 0.5 and 0.75 are whole numbers of blocks. A
    device has 250 images to train on and 500 of its own for the final evaluation (the paper: 1,250
    and 500).
    """
    base = presets.fashion_mnist()
    return dataclasses.replace(
        base,
        data=DataConfig(
            name="fashion_mnist", public_train=10_000, public_select=2_000, public_test=10_000
        ),
        model=dataclasses.replace(base.model, num_layers=8),
        fleet=FleetConfig(samples_per_device=750, test_fraction=2.0 / 3.0),
        header=dataclasses.replace(base.header, proxy_fraction=0.5),
    )


def tiny() -> Config:
    """scikit-learn's digits and a network of four blocks: seconds, for tests of the machinery."""
    return dataclasses.replace(presets.smoke(), preset="tiny")


SETTINGS: dict[str, Callable[[], Config]] = {
    "fashion_mnist": fashion_mnist,
    "cifar100": presets.vit_b16_cifar100,
    "stanford_cars": presets.vit_b16_stanford_cars,
    "mnist5k": presets.mnist5k,
    "digits": presets.digits,
    "tiny": tiny,
}
"""By the name that `scripts/reproduce.py --dataset` takes."""


def settings(dataset: str) -> Config:
    """The configuration of that name.

    Raises:
      ConfigError: there is none; the message lists the names.
    """
    if dataset not in SETTINGS:
        raise ConfigError(f"unknown data set {dataset!r}; expected one of {', '.join(SETTINGS)}")
    return SETTINGS[dataset]()
