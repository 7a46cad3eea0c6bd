"""The configuration of a run: nested frozen dataclasses, validated when built.

Every field has one meaning and one unit; choices are `Literal`s. The command line of
`scripts/run_acme.py` is generated from these classes, and the resolved configuration is
written to the run directory. Presets live in `acme_jax.presets`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, Literal, get_args, get_type_hints

Distribution = Literal["iid", "c2", "c3", "c4", "dirichlet"]
SelectionRule = Literal["paper", "trade_off", "nearest_ideal", "lowest_error"]
Similarity = Literal["flat", "per_dimension", "sliced", "kde"]
ImportanceFormat = Literal["float32", "log8", "log4", "log2"]
SketchFormat = Literal["float16", "linear8", "linear4"]
Coding = Literal["none", "adaptive"]
DType = Literal["float32", "bfloat16"]
DatasetName = Literal[
    "mnist5k",
    "digits",
    "fashion_mnist",
    "cifar10",
    "cifar100",
    "stanford_cars",
    "image_folder",
    "arrays",
    "text",
    "huggingface",
]
OnCorrupt = Literal["refuse", "skip"]


class ConfigError(ValueError):
    """A configuration that cannot run; the message says how to mend it."""


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check_positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        _check(value > 0, f"{type(owner).__name__}.{name} must be positive, got {value}")


def _check_choice(owner: object, name: str, alias: Any) -> None:
    value, choices = getattr(owner, name), get_args(alias)
    _check(
        value in choices,
        f"{type(owner).__name__}.{name} is {value!r}; expected one of {', '.join(choices)}",
    )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images or texts, and how they are divided. All parts are disjoint."""

    name: DatasetName = "mnist5k"
    path: str | None = None
    """Where the data lie: a directory of idx files (`fashion_mnist`; found by itself when
    None), a CIFAR archive or directory, the directory of Stanford Cars, of an image folder
    (one directory a class, or train/ and test/ of such), an .npz file or a directory of .npy
    or idx files (`arrays`), a .csv, .tsv or .jsonl file or a directory of them (`text`), a
    directory of `save_to_disk` or the id of a dataset on the hub (`huggingface`)."""
    image_size: int | None = None
    """Height and width, in pixels, of pictures decoded from files (`stanford_cars`,
    `image_folder`, `huggingface`): the central square is resized to it; None: 224."""
    on_corrupt: OnCorrupt = "refuse"
    """A picture that cannot be decoded: stop and name it, or leave it out with a warning."""
    cache: str | None = None
    """Directory for decoded pictures, kept for later runs; None: acme_jax below
    $XDG_CACHE_HOME or ~/.cache. Delete it at any time."""
    input_column: str | None = None
    """Column of the texts (`text`) or of the texts or pictures (`huggingface`); None: `text`,
    or for `huggingface` the only column of that kind."""
    label_column: str | None = None
    """Column of the labels (`text`, `huggingface`); None: `label`."""
    public_train: int = 2000
    """Samples the cloud and the edges train on."""
    public_select: int = 400
    """Samples for every choice: importance, search, header. Never trained on."""
    public_test: int = 500
    """Samples only the final evaluation reads."""

    def __post_init__(self) -> None:
        _check_choice(self, "name", DatasetName)
        _check_choice(self, "on_corrupt", OnCorrupt)
        _check_positive(self, "public_train", "public_select", "public_test")
        _check(
            self.image_size is None or self.image_size > 0,
            f"DataConfig.image_size must be positive, got {self.image_size}",
        )
        for name in ("path", "cache", "input_column", "label_column"):
            _check(
                getattr(self, name) != "", f"DataConfig.{name} is empty; leave it out, or fill it"
            )
        users = {
            "image_size": ("stanford_cars", "image_folder", "huggingface"),
            "cache": ("stanford_cars", "image_folder", "huggingface"),
            "input_column": ("text", "huggingface"),
            "label_column": ("text", "huggingface"),
        }
        for name, datasets in users.items():
            _check(
                getattr(self, name) is None or self.name in datasets,
                f"DataConfig.{name} is for {', '.join(datasets)}, but the dataset is "
                f"{self.name}, which would not look at it; leave it out",
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The full Transformer (the largest sub-network of the supernet)."""

    pretrained: str | None = None
    """Directory or hub id of a Hugging Face ViT, DeiT or BERT to start from. Its sizes then
    replace `patch_size` to `num_neurons` below; the reference phase fine-tunes it."""
    image_size: int | None = None
    """Side of the square images that the network sees; others are resized. None: the
    pretrained model's, or the data's where there is none."""
    max_tokens: int = 64
    """Token ids of a text, [CLS] and [SEP] included; longer texts are cut."""
    dtype: DType = "float32"
    """Of activations and matrix products; weights and optimiser stay float32."""
    patch_size: int = 7
    embed_dim: int = 64
    num_layers: int = 6
    num_heads: int = 4
    num_neurons: int = 256
    """Hidden units of each MLP."""

    def __post_init__(self) -> None:
        _check_choice(self, "dtype", DType)
        _check_positive(self, "patch_size", "embed_dim", "num_layers", "num_heads", "num_neurons")
        _check(
            self.image_size is None or self.image_size > 0,
            f"ModelConfig.image_size must be positive, got {self.image_size}",
        )
        _check(
            self.max_tokens >= 4,
            f"ModelConfig.max_tokens must be at least 4 ([CLS], [SEP] and words), got "
            f"{self.max_tokens}",
        )
        _check(
            self.embed_dim % self.num_heads == 0,
            f"ModelConfig.embed_dim ({self.embed_dim}) must be a multiple of num_heads "
            f"({self.num_heads})",
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """AdamW with linear decay (after an optional warm-up) for one training phase."""

    epochs: int = 15
    batch_size: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    warmup_fraction: float = 0.1
    logit_loss: float = 1.0
    """Distillation only: coefficient of the soft cross-entropy (lambda 1)."""
    hidden_loss: float = 0.1
    """Distillation only: coefficient of the hidden-state term (lambda 2). The original uses
    0.1 for widths and DynaBERT 1 for depths; with schedules as short as ours less is better
    for the narrow sub-networks."""
    max_shift: int = 1
    """Augmentation: each image moves by up to this many pixels."""
    flip: bool = False
    """Augmentation: every other image is mirrored left to right."""
    min_crop: float = 1.0
    """Augmentation: a random part of each image, of at least this part of its area and of
    aspect ratio 3:4 to 4:3, is enlarged to the whole; 1: none."""
    shards: int = 2
    """Parts of a batch whose gradients are added in a fixed order. At most this many
    devices share a batch; the result does not depend on how many do."""

    def __post_init__(self) -> None:
        _check_positive(self, "epochs", "batch_size", "learning_rate", "clip_norm", "shards")
        _check(
            0.0 <= self.warmup_fraction < 1.0,
            f"TrainConfig.warmup_fraction must be in [0, 1), got {self.warmup_fraction}",
        )
        _check(self.max_shift >= 0, "TrainConfig.max_shift must not be negative")
        _check(
            0.0 < self.min_crop <= 1.0,
            f"TrainConfig.min_crop must be in (0, 1], got {self.min_crop}",
        )


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """How the supernet is taught: widths first, then depths as well."""

    width: TrainConfig = dataclasses.field(
        default_factory=lambda: TrainConfig(
            epochs=2, learning_rate=5e-3, weight_decay=0.0, hidden_loss=0.02
        )
    )
    depth: TrainConfig = dataclasses.field(
        default_factory=lambda: TrainConfig(
            epochs=11, learning_rate=5e-3, weight_decay=0.0, hidden_loss=0.02
        )
    )
    depths_per_step: int = 1
    """Depths that each width trains in one step: 4 is all of them, DynaBERT's rule; fewer are
    drawn so that over the four widths every depth takes part."""

    def __post_init__(self) -> None:
        _check(
            self.depths_per_step >= 1,
            f"DistillConfig.depths_per_step must be positive, got {self.depths_per_step}",
        )
        for name in ("batch_size", "shards", "max_shift", "flip", "min_crop", "clip_norm"):
            width, depth = getattr(self.width, name), getattr(self.depth, name)
            _check(
                width == depth,
                f"distill.width.{name} ({width}) and distill.depth.{name} ({depth}) must be "
                "equal, because both phases share one compiled program",
            )


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """Pareto search over sub-networks (NSGA-II) and the choice from its archive."""

    population_size: int = 32
    num_generations: int = 15
    rule: SelectionRule = "lowest_error"
    num_divisions: int = 10
    """Cells of the Pareto Front Grid along each objective."""
    fractions: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """Widths and depths of the uniform grid; also the choices of each layer."""
    per_layer: bool = True
    """Search heads and neurons per layer; False searches the uniform 4 x 4 grid."""
    latency_table: str | None = None
    """File of latencies measured by `scripts/profile_device.py`; None: an assumed device."""

    def __post_init__(self) -> None:
        _check_choice(self, "rule", SelectionRule)
        _check_positive(self, "population_size", "num_generations", "num_divisions")
        _check(
            len(set(self.fractions)) == len(self.fractions)
            and all(0.0 < f <= 1.0 for f in self.fractions)
            and max(self.fractions, default=0.0) == 1.0,
            f"SearchConfig.fractions must be distinct numbers in (0, 1] that include 1, got "
            f"{self.fractions}",
        )
        _check(
            self.population_size % 2 == 0,
            f"SearchConfig.population_size must be even, got {self.population_size}",
        )


@dataclasses.dataclass(frozen=True)
class FleetConfig:
    """Edges, their devices, the devices' limits and their data."""

    num_edges: int = 3
    devices_per_edge: int = 5
    budgets: tuple[float, ...] = (0.3, 0.55, 1.0)
    """Size limit of each edge's devices as a fraction of the full model's bytes. Shorter
    tuples repeat. Devices of one edge differ by up to `budget_spread` above it."""
    budget_spread: float = 0.2
    distribution: Distribution = "c3"
    """How labels differ between devices: the paper's IID, C2, C3, C4, or Dirichlet."""
    dirichlet_alpha: float = 0.5
    samples_per_device: int = 160
    """Upper limit; label groups that many devices share give each of them fewer."""
    test_fraction: float = 0.4
    """Part of each device's samples kept for its final evaluation."""

    def __post_init__(self) -> None:
        _check_choice(self, "distribution", Distribution)
        _check_positive(
            self, "num_edges", "devices_per_edge", "dirichlet_alpha", "samples_per_device"
        )
        _check(
            self.budget_spread >= 0,
            f"FleetConfig.budget_spread must not be negative, got {self.budget_spread}",
        )
        _check(len(self.budgets) > 0, "FleetConfig.budgets is empty; give at least one number")
        _check(
            all(b > 0 for b in self.budgets),
            f"FleetConfig.budgets must be positive fractions, got {self.budgets}",
        )
        _check(
            0.0 < self.test_fraction < 1.0,
            f"FleetConfig.test_fraction must be in (0, 1), got {self.test_fraction}",
        )


@dataclasses.dataclass(frozen=True)
class HeaderConfig:
    """The edge's header search (ENAS with an LSTM controller)."""

    channels: int = 24
    blocks: int = 2
    """B: blocks of a cell."""
    repeats: int = 1
    """U: the cell is stacked U + 2 times (as the original code does)."""
    search_epochs: int = 6
    """Epochs of shared-weight training, a fresh cell each batch."""
    controller_steps: int = 20
    """REINFORCE updates after each epoch."""
    num_candidates: int = 12
    """Cells sampled from the trained controller and ranked on the select split."""
    final_epochs: int = 10
    """Epochs of training the chosen cell."""
    batch_size: int = 64
    learning_rate: float = 1e-2
    proxy_fraction: float = 0.5
    """Part of the public training images that the edge holds as its shared data."""

    def __post_init__(self) -> None:
        _check_positive(
            self,
            "channels",
            "blocks",
            "repeats",
            "search_epochs",
            "controller_steps",
            "num_candidates",
            "final_epochs",
            "batch_size",
            "learning_rate",
        )
        _check(
            0.0 < self.proxy_fraction <= 1.0,
            f"HeaderConfig.proxy_fraction must be in (0, 1], got {self.proxy_fraction}",
        )


@dataclasses.dataclass(frozen=True)
class RefineConfig:
    """The device-edge loop: local training, importance sets, pruning."""

    rounds: int = 10
    local_epochs: int = 1
    """Passes over a device's own samples in a round, between one exchange and the next. Half the
    rounds with twice the epochs and twice the N train and prune as much for half the messages."""
    batch_size: int = 16
    learning_rate: float = 0.02
    momentum: float = 0.5
    weight_decay: float = 1e-4
    prune_per_round: int = 10
    """N: exactly this many further gates are pruned each round."""
    max_pruned_fraction: float = 0.3
    """Lowers N for an edge whose header has so few gates that N a round would prune more
    than this part of them in all (a cell of pools and identities has hardly any)."""
    similarity: Similarity = "per_dimension"
    """How alike two devices' data are: by Wasserstein distances of their feature sketches (flat:
    as the original code flattens them), or, "kde", by kernel density estimates. Then the edge
    sends reference points of its shared data, and devices answer with their log densities there,
    instead of a sketch; their features, which are the kernels' centres, never leave them."""
    temperature: float = 0.1
    """tau of the softmax over similarities. The original code has 1, nearly uniform weights; at
    0.02 devices listen to themselves alone."""
    smoothing: float = 0.9
    """Weight of the past in the device's smoothed importance."""
    num_quantiles: int = 32
    """Quantiles per feature in the distribution sketch."""
    importance_format: ImportanceFormat = "float32"
    """How importance sets travel, up and down: as they are, or as logarithms in 8, 4 or 2 bits
    (zero stays zero). Devices and edges compute with what they read."""
    sketch_format: SketchFormat = "float16"
    """How the sketch travels: as float16, or in 8 or 4 bits on one linear scale."""
    class_prior: float | None = None
    """Pseudo-count of the log prior of its own labels that a device adds to the classifier before
    it trains, say 0.1; None: none. For devices that will meet the classes that they train on;
    see `acme_jax.label_prior`."""
    coding: Coding = "none"
    """Lossless coding of what devices send up, on top of the formats: "adaptive" has tables at both
    ends of every link that learn from round to round (`acme_jax.message_coding`). The bytes that a
    run counts are then the coded ones; results are the same. Floats hardly shrink: with formats in
    few bits it saves most."""
    data_quality: bool = False
    """Every device also reports, once, how good its training data are: leave-one-out likelihood,
    label entropy, and for texts approximate and Lempel-Ziv entropy, as rows of results.json and
    the report. Two traps (`acme_jax.data_quality`): runs that differ in depth and width only cannot
    tell what data are worth; and the approximate entropy of short sequences over many symbols
    measures their length, so that all different looks like constant."""
    kde_dims: int = 8
    """Dimensions of the random projection in which densities are estimated."""
    num_references: int = 200
    """Points of the edge's shared data at which devices give their log densities."""

    def __post_init__(self) -> None:
        _check_choice(self, "similarity", Similarity)
        _check_choice(self, "importance_format", ImportanceFormat)
        _check_choice(self, "sketch_format", SketchFormat)
        _check_choice(self, "coding", Coding)
        _check_positive(
            self,
            "rounds",
            "local_epochs",
            "batch_size",
            "learning_rate",
            "temperature",
            "num_quantiles",
            "kde_dims",
            "num_references",
        )
        _check(
            self.similarity != "kde" or self.sketch_format == "float16",
            f"RefineConfig.sketch_format is {self.sketch_format!r}, but with similarity 'kde' no "
            "sketch travels; leave it at 'float16'",
        )
        _check(self.prune_per_round >= 0, "RefineConfig.prune_per_round must not be negative")
        _check(
            self.class_prior is None or 0.0 < self.class_prior < float("inf"),
            "RefineConfig.class_prior must be more than 0 (0.1 is usual) or None, got "
            f"{self.class_prior}",
        )
        _check(
            0.0 <= self.max_pruned_fraction < 1.0,
            f"RefineConfig.max_pruned_fraction must be in [0, 1), got {self.max_pruned_fraction}",
        )
        for name in ("momentum", "smoothing"):
            value = getattr(self, name)
            _check(0.0 <= value < 1.0, f"RefineConfig.{name} must be in [0, 1), got {value}")


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How the work is compiled and laid out; results depend on it only by rounding."""

    num_devices: int | None = None
    """JAX devices to use; None: every accelerator, or one host device per CPU core."""
    client_chunk: int | None = None
    """Clients in one vmapped chunk; None chooses by backend (CPU: 1)."""
    checkpoint_every: int = 5
    """Epochs or rounds between checkpoints inside a phase."""
    remat: bool | None = None
    """Compute blocks again in the backward pass, for less memory; None: if it has to be."""
    micro_batch: int | None = None
    """Samples whose gradient is computed at once on one device; the gradients of a batch are
    added up. None: as many as fit."""
    eval_batch: int | None = None
    """Samples in one forward pass when sub-networks are evaluated; None: as many as fit."""
    fast_compile: bool = False
    """Leave out XLA's expensive passes: for short runs, which mostly compile. Another number
    of devices then changes losses by 1e-5 instead of 1e-6, because programs round apart."""
    compilation_cache: str | None = None
    """Directory in which compiled programs are kept for later runs on the same kind of machine
    with the same JAX; None: every run compiles. It only grows; delete it at any time."""

    def __post_init__(self) -> None:
        _check_positive(self, "checkpoint_every")
        for name in ("num_devices", "client_chunk", "micro_batch", "eval_batch"):
            value = getattr(self, name)
            _check(
                value is None or value > 0, f"ComputeConfig.{name} must be positive, got {value}"
            )
        _check(
            self.compilation_cache != "",
            "ComputeConfig.compilation_cache is empty; give a directory, or leave it out",
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that determines a run."""

    preset: str = "mnist5k"
    seed: int = 0
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    reference: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)
    search: SearchConfig = dataclasses.field(default_factory=SearchConfig)
    fleet: FleetConfig = dataclasses.field(default_factory=FleetConfig)
    header: HeaderConfig = dataclasses.field(default_factory=HeaderConfig)
    refine: RefineConfig = dataclasses.field(default_factory=RefineConfig)
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        _check(self.seed >= 0, f"Config.seed must not be negative, got {self.seed}")
        _check(
            self.distill.depths_per_step <= len(self.search.fractions),
            f"distill.depths_per_step ({self.distill.depths_per_step}) is more than the "
            f"{len(self.search.fractions)} depths of search.fractions",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionary, JSON-ready."""
        return dataclasses.asdict(self)

    def fingerprint(self) -> str:
        """Identifies the experiment: equal for configurations with equal results.

        How the work is compiled and laid out is left out: it changes results only by rounding.
        So is where decoded pictures are kept.
        """
        plain = self.to_dict()
        plain.pop("compute")
        plain["data"].pop("cache")
        text = json.dumps(plain, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def from_dict(plain: dict[str, Any]) -> Config:
    """Inverse of `Config.to_dict`; unknown keys are errors.

    Raises:
      ConfigError: an unknown key or an invalid value.
    """
    return _build(Config, plain, "")


def _build(cls: Any, plain: dict[str, Any], prefix: str) -> Any:
    _check(
        isinstance(plain, dict),
        f"configuration section {prefix.rstrip('.') or 'root'} must be a mapping, got {plain!r}",
    )
    types = get_type_hints(cls)
    fields = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(set(plain) - set(fields))
    _check(
        not unknown,
        f"unknown configuration key {prefix}{unknown[0] if unknown else ''}; "
        f"known keys here: {', '.join(fields)}",
    )
    values = {}
    for name, value in plain.items():
        section = types[name]
        if dataclasses.is_dataclass(section):
            values[name] = _build(section, value, f"{prefix}{name}.")
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)
