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


_VIT_B16 = ModelConfig(
    pretrained="google/vit-base-patch16-224",
    image_size=224,
    dtype="bfloat16",
    patch_size=16,
    embed_dim=768,
    num_layers=12,
    num_heads=12,
    num_neurons=3072,
)
"""The paper's network. The sizes are those of the pretrained one, which has the last word."""

_FINE_TUNING = TrainConfig(
    epochs=10,
    batch_size=32,
    learning_rate=5e-5,
    weight_decay=0.0,
    warmup_fraction=0.0,
    max_shift=0,
    shards=4,
)
"""AdamW as the paper's code has it: linear decay, norm clipped at 1, no augmentation."""

_PAPER_DISTILLATION = DistillConfig(
    width=dataclasses.replace(_FINE_TUNING, epochs=3, learning_rate=2e-5, hidden_loss=0.1),
    depth=dataclasses.replace(_FINE_TUNING, epochs=3, learning_rate=2e-5, hidden_loss=1.0),
    depths_per_step=4,
)

_PAPER_GRID = SearchConfig(population_size=32, num_generations=1, rule="trade_off", per_layer=False)
"""All 16 sub-networks of the grid stand in the first population. `per_layer=True` with more
generations searches heads and neurons of each block as well, which the paper does not."""

_PAPER_REFINEMENT = RefineConfig(
    rounds=10,
    batch_size=64,
    learning_rate=1e-3,
    momentum=0.5,
    weight_decay=1e-4,
    prune_per_round=10,
)


def vit_b16_cifar100() -> Config:
    """The paper's setting: ViT-B/16 at 224 x 224 on CIFAR-100, 5 devices of 25 labels each.

    Command: `python scripts/run_acme.py vit_b16_cifar100 --data.path DIR`, with the official
    CIFAR-100 archive in DIR; `--model.pretrained DIR` where the hub cannot be reached.
    Needs: an accelerator with 6.5 GB of free memory, as planned (bfloat16, shards of 8 images in
    one piece); with less the plan turns to recomputation. It is printed before anything starts.
    Time: 1.7e17 FLOPs, four fifths of them distillation: planned as 25 min, compiling not
    counted, for one device whose matrix products reach 330 TFLOP/s (bfloat16), of which
    35 % are assumed; up to 4 devices share a batch.
    Expected: not known, for it has not been run on an accelerator here; only the steps of its
    supernet have been, on CPU (docs/bench_full_size.json). The paper has 0.92 for the full network.

    As in the paper: fine-tuning 10 epochs at 5e-5, widths and then depths 3 epochs at 2e-5 each,
    batch 32; refinement 10 rounds, 10 gates a round. Its label lists (C3; `--fleet.distribution`
    has IID, C2 and C4), 50 training and 20 test images a label and device, here disjoint. Its
    header search augments by crop and flip; ours reads cached features (8,000 images at the edge,
    4.8 GB), so it cannot, but the backbone's training may: `--reference.flip`,
    `--reference.min-crop 0.5`.
    """
    return Config(
        preset="vit_b16_cifar100",
        data=DataConfig(
            name="cifar100", public_train=25_000, public_select=3_000, public_test=10_000
        ),
        model=_VIT_B16,
        reference=_FINE_TUNING,
        distill=_PAPER_DISTILLATION,
        search=_PAPER_GRID,
        fleet=FleetConfig(
            num_edges=1,
            devices_per_edge=5,
            budgets=(0.3,),
            distribution="c3",
            samples_per_device=1_750,
            test_fraction=2.0 / 7.0,
        ),
        header=HeaderConfig(
            channels=256,
            blocks=1,
            repeats=3,
            search_epochs=100,
            controller_steps=300,
            final_epochs=50,
            batch_size=128,
            learning_rate=3e-3,
            proxy_fraction=0.2,
        ),
        refine=_PAPER_REFINEMENT,
    )


def vit_b16_stanford_cars() -> Config:
    """The paper's setting: ViT-B/16 at 224 x 224 on Stanford Cars (196 models), 5 devices.

    Command: `python scripts/run_acme.py vit_b16_stanford_cars --data.path DIR`, with the
    official or the Kaggle files in DIR; `--model.pretrained DIR` where the hub cannot be reached.
    Needs: an accelerator with 7.5 GB of free memory, as planned; 2.5 GB of disk for the decoded
    pictures.
    Time: 3.8e16 FLOPs, planned as 5 min where `vit_b16_cifar100` takes 25.
    Expected: not known, for it has not been run on an accelerator here; the paper has 0.92.

    Schedules and options as in `vit_b16_cifar100`. The paper gives no label lists for Cars: ours
    are those of ten classes, a digit standing for a tenth of the models. Half of the public
    training images are the edge's shared data, because 10 % would be 500.
    """
    paper = vit_b16_cifar100()
    return dataclasses.replace(
        paper,
        preset="vit_b16_stanford_cars",
        data=DataConfig(
            name="stanford_cars",
            image_size=224,
            public_train=5_000,
            public_select=800,
            public_test=8_000,
        ),
        fleet=dataclasses.replace(paper.fleet, samples_per_device=300, test_fraction=0.3),
        header=dataclasses.replace(paper.header, proxy_fraction=0.5),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    preset.__name__: preset
    for preset in (
        mnist5k,
        digits,
        fashion_mnist,
        smoke,
        minilm_text,
        vit_b16_cifar100,
        vit_b16_stanford_cars,
    )
}


def get(name: str) -> Config:
    """The preset of that name.

    Raises:
      ConfigError: there is none; the message lists the names.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]()
