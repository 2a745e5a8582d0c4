"""Frozen configuration dataclasses and their validation.

A configuration is plain data: it can be printed, compared, derived with `dataclasses.replace`, parsed from the
command line and stored as JSON beside the weights. Derived quantities are properties. A field's type hint says which
values are legal, with a `Range` where not every number is; `faults()` returns one sentence for each thing that is
wrong, and `validate()` raises `ConfigError` with all of them at once.

Letters in shapes: B batch, T query positions, S cached positions, D `d_model`, N `n_heads`, K KV heads, L
`n_latent_heads`, C `d_latent`, M `heads_per_latent`, H `d_nope` or `d_head` (also the value width), R `d_rope`,
J `n_branches`, G = L / J.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import operator
import os
import reprlib
import types
from typing import Annotated, Any, ClassVar, Literal, Union, cast, get_args, get_origin, get_type_hints

from tyro.conf import AvoidSubcommands, arg

from mlra_jax.errors import UserError


class ConfigError(UserError):
    """One or more faults in a configuration; the message lists all of them."""

    def __init__(self, faults: list[str]):
        self.faults = faults
        many = f"{len(faults)} faults in the configuration:\n  - " if len(faults) > 1 else ""
        super().__init__(many + "\n  - ".join(faults))


@dataclasses.dataclass(frozen=True)
class Range:
    """Which numbers a field may hold, in its type: `Annotated[int, Range(ge=1)]`. NaN never is one of them."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = math.inf
    """None lets infinity in."""
    also: tuple[float, ...] = ()
    """Values outside the range that have a meaning of their own."""

    def __contains__(self, value: float) -> bool:
        ends = (
            (operator.ge, self.ge),
            (operator.gt, self.gt),
            (operator.le, self.le),
            (operator.lt, self.lt),
        )
        return value in self.also or (
            value > -math.inf and all(end is None or holds(value, end) for holds, end in ends)
        )

    def __str__(self) -> str:
        ends = (("at least", self.ge), ("more than", self.gt), ("at most", self.le), ("less than", self.lt))
        words = [f"{word} {end}" for word, end in ends if end is not None and end != math.inf]
        also = f" (or {', '.join(map(str, self.also))})" if self.also else ""
        return (" and ".join(words) or "finite") + also


Positive = Annotated[int, Range(ge=1)]
NotNegative = Annotated[int, Range(ge=0)]
PositiveFloat = Annotated[float, Range(gt=0)]
NotNegativeFloat = Annotated[float, Range(ge=0)]
Seed = Annotated[int, Range(ge=0, lt=2**32)]

_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}


def nearest(name: object, known: Any) -> str:
    """The hint `Did you mean X?`, after a space, if one of the `known` names is like `name`; else empty."""
    close = difflib.get_close_matches(str(name), list(map(str, known)), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def value_faults(name: str, value: Any, hint: Any, limits: Range = Range()) -> list[str]:
    """What is wrong with `value` for a field or argument `name` whose type hint is `hint`; empty if nothing is."""
    options = get_args(hint)
    if get_origin(hint) is Annotated:
        return value_faults(name, value, options[0], *(o for o in options[1:] if isinstance(o, Range)))
    if get_origin(hint) is Literal:
        if value in options:
            return []
        known = ", ".join(map(str, options))
        return [f"{name}={reprlib.repr(value)} must be one of {known}.{nearest(value, options)}"]
    if get_origin(hint) is tuple:
        if isinstance(value, list | tuple):
            return [fault for x in value for fault in value_faults(name, x, options[0])]
        return [f"{name}={reprlib.repr(value)} must be several values, a tuple."]
    if get_origin(hint) in (Union, types.UnionType):
        if value is None and types.NoneType in options:
            return []
        classes = tuple(o for o in options if o is not types.NoneType)
        if len(classes) == 1:
            return value_faults(name, value, classes[0])
    else:
        classes = (hint,)
    accepted = (*classes, int) if float in classes else classes
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in classes):
        kinds = " or ".join(_KINDS.get(c, c.__name__) for c in classes)
        return [f"{name}={reprlib.repr(value)} must be {kinds}, not {type(value).__name__}."]
    if isinstance(value, Validated):
        return value.faults()
    if isinstance(value, int | float) and value not in limits:
        finite = "" if abs(value) < math.inf else " and finite"
        return [f"{name}={value} must be {limits}{finite}."]
    return []


def require(hint: Any, **arguments: Any) -> None:
    """Refuses arguments of a function whose values are not legal for the type hint.

    Raises:
      ConfigError: names each of them.
    """
    if faults := [fault for name, value in arguments.items() for fault in value_faults(name, value, hint)]:
        raise ConfigError(faults)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


OPTION = "--"


class Validated:
    """A dataclass that can say what is wrong with it: its fields' type hints and ranges, and `conflicts`."""

    at: ClassVar[str] = ""
    """What comes before the names of the fields in messages; `OPTION` for those of a command alone."""

    def conflicts(self) -> list[str]:
        """One sentence for each way in which fields, each legal by itself, do not fit together."""
        return []

    def faults(self) -> list[str]:
        """One sentence for each fault; empty when the configuration is legal."""
        cls, faults = cast(Any, type(self)), []
        for field in dataclasses.fields(cast(Any, self)):
            name = field.name.replace("_", "-") if self.at == OPTION else field.name
            faults += value_faults(f"{self.at}{name}", getattr(self, field.name), _hints(cls)[field.name])
        return faults or self.conflicts()

    def validate(self) -> None:
        """Raises `ConfigError` listing every fault."""
        if faults := self.faults():
            raise ConfigError(faults)


class AttentionSizes(Validated):
    """What every attention's configuration says of the cache."""

    at: ClassVar[str] = "model.attention."
    n_branches: int = 1
    """J: cached heads that each query head reads and sums."""
    cached_heads_field: ClassVar[str] = "attention.n_kv_heads"
    """The field of the model's configuration that `cached_heads` is."""

    def cached_heads(self, n_heads: int) -> int:
        """Heads in the KV cache of a model with so many query heads: what tensor parallelism splits when decoding."""
        raise NotImplementedError


def _uneven(config: AttentionSizes, name: str, multiple: int = 2) -> list[str]:
    if getattr(config, name) % multiple == 0:
        return []
    even = "even" if multiple == 2 else f"a multiple of {multiple}"
    return [f"{config.at}{name}={getattr(config, name)} must be {even}; rotary elements come in pairs."]


@dataclasses.dataclass(frozen=True)
class LatentAttentionConfig(AttentionSizes):
    """MLA, GLA and MLRA: attention over `n_latent_heads` low-rank latent heads (paper, section 3).

    MLA is (1, 1), GLA-2 (2, 1), GLA-4 (4, 1), MLRA-2 (4, 2), MLRA-4 (4, 4) as (n_latent_heads, n_branches).
    """

    n_latent_heads: Positive = 4
    """L: latent heads in the KV cache; the axis that tensor parallelism splits when decoding."""
    n_branches: Positive = 4
    """J: latent heads that each query head reads and sums; the number in MLRA-2 and MLRA-4."""
    q_lora_rank: Positive = 1024
    """A: width of the compressed query."""
    kv_lora_rank: Positive = 512
    """Width of all latent heads together, L * C."""
    d_nope: Positive = 128
    """H: per-head width of the position-free part of query and key, and of the value."""
    d_rope: NotNegative = 64
    """R: width of the rotary part of the query, and of the one rotary key shared by all heads."""
    scale_latents: bool = True
    """Variance-preserving scales: sqrt(D/A) on the query, sqrt(D/C) on the latents, 1/sqrt(J) on the branch sum.
    False is the paper's "no scaling" ablation: all three are 1."""
    form: Literal["auto", "expanded", "absorbed"] = "auto"
    """How full-sequence attention is computed: per-head keys and values (expanded), or queries moved into the latent
    space (absorbed). They are equal; auto takes the one with fewer FLOPs. Decoding is always absorbed."""

    cached_heads_field: ClassVar[str] = "attention.n_latent_heads"

    def cached_heads(self, n_heads: int) -> int:
        return self.n_latent_heads

    @property
    def d_latent(self) -> int:
        """C: width of one latent head."""
        return self.kv_lora_rank // self.n_latent_heads

    @property
    def n_groups(self) -> int:
        """G: contiguous groups of query heads; group g reads the latent heads l with l mod G == g."""
        return self.n_latent_heads // self.n_branches

    def conflicts(self) -> list[str]:
        at, faults = self.at, []
        if self.n_latent_heads % self.n_branches:
            faults.append(
                f"{at}n_branches={self.n_branches} does not divide n_latent_heads={self.n_latent_heads}; "
                "each query head must read the same number of latent heads."
            )
        if self.kv_lora_rank % self.n_latent_heads:
            faults.append(
                f"{at}kv_lora_rank={self.kv_lora_rank} is not divisible by n_latent_heads={self.n_latent_heads}; "
                "the latent is cut into heads of equal width."
            )
        return faults + _uneven(self, "d_rope")


@dataclasses.dataclass(frozen=True)
class GroupedAttentionConfig(AttentionSizes):
    """MHA (n_kv_heads = n_heads), GQA, MQA (n_kv_heads = 1), and MFA (n_kv_heads = 1, wide, with a low-rank query)."""

    n_kv_heads: Positive = 24
    """K: key-value heads; KV head k serves the contiguous query heads k*N/n_kv_heads onwards."""
    d_head: Positive = 128
    """H: width of a query, key and value head; all of it is rotary."""
    q_lora_rank: NotNegative = 0
    """A: width of the compressed, normalised query that MFA makes queries from; 0: they are made from the input."""

    def cached_heads(self, n_heads: int) -> int:
        return self.n_kv_heads

    def conflicts(self) -> list[str]:
        return _uneven(self, "d_head")


@dataclasses.dataclass(frozen=True)
class TiedAttentionConfig(AttentionSizes):
    """GTA: the first half of a KV head is key and value at once; the rotary half of the key is shared by all heads."""

    n_tied_heads: Positive = 6
    """K: key-value heads; head k serves the contiguous query heads k*N/n_tied_heads onwards."""
    d_head: Positive = 128
    """H: width of a query, key and value head; the second half of query and key is rotary."""

    cached_heads_field: ClassVar[str] = "attention.n_tied_heads"

    @property
    def d_rope(self) -> int:
        """R: width of the rotary half."""
        return self.d_head // 2

    def cached_heads(self, n_heads: int) -> int:
        return self.n_tied_heads

    def conflicts(self) -> list[str]:
        return _uneven(self, "d_head", 4)


@dataclasses.dataclass(frozen=True)
class TensorProductAttentionConfig(AttentionSizes):
    """TPA: the queries, keys and values of all heads are sums of few products of a head factor and a width factor."""

    rank: Positive = 2
    """Products that make keys, and that make values; their factors are what is cached."""
    q_rank: Positive = 6
    """Products that make queries."""
    d_head: Positive = 128
    """H: width of a query, key and value head; all of it is rotary."""

    cached_heads_field: ClassVar[str] = "n_heads"

    def cached_heads(self, n_heads: int) -> int:
        return n_heads

    def conflicts(self) -> list[str]:
        return _uneven(self, "d_head")


AttentionConfig = (
    LatentAttentionConfig | GroupedAttentionConfig | TiedAttentionConfig | TensorProductAttentionConfig
)


@dataclasses.dataclass(frozen=True)
class ModelConfig(Validated):
    """The paper's decoder-only transformer: tied embeddings, RMSNorm, SwiGLU, half-split RoPE, no biases."""

    at: ClassVar[str] = "model."
    vocab_size: Positive = 50304
    """Rows of the tied embedding; ids past the tokenizer's own stay in the training softmax (as in the paper)."""
    n_layers: Positive = 24
    """Transformer layers."""
    d_model: Positive = 3072
    """D: width of the residual stream."""
    n_heads: Positive = 24
    """N: query heads."""
    d_ff: Positive = 9880
    """F: hidden width of the SwiGLU MLP."""
    attention: AvoidSubcommands[AttentionConfig] = LatentAttentionConfig()
    """Which attention, and its sizes."""
    gated_attention: bool = False
    """Multiply the heads' output by sigmoid(W_g x) before the output projection."""
    output_init: Literal["zeros", "normal"] = "zeros"
    """Initial output projections of attention and MLP: zeros (paper) or normal like the rest (ablation)."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the normal initialisation; TPA's factors are uniform, whatever it is."""
    rope_base: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: PositiveFloat = 1e-6
    """Added to the mean square in every RMSNorm."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of matrix products and attention; the residual stream, norms and softmax are float32 always."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which parameters are stored: float32 for training; decoding may hold bfloat16."""
    remat: Literal["auto", "none", "products", "dots", "mlp", "attention", "full"] = "auto"
    """What a layer keeps for the backward pass besides its input, from the most memory to the most recomputation:
    everything (none); all that products give and take, and attention's output (products); what products with weights
    give, and attention's output (dots); the MLP's first products and attention's output (mlp); attention's output;
    nothing (full). auto: training takes what fits; full where memory is unknown."""

    unroll_layers: Literal["auto", "no", "yes"] = "auto"
    """Whether a train step is compiled with all layers in a row, or as a loop over one: the first spares the copies
    into and out of stacked arrays, and takes longer to compile. auto: on GPUs, unless each layer's weights are gathered
    for it."""
    gather: Literal["auto", "layer", "step"] = "auto"
    """When training gathers the weights that fsdp splits: each layer's when they are used (layer), which takes the
    least memory, or all once a step (step), whose gradients are summed once too; needs mesh.tensor and mesh.context of
    1, and of a step with a single micro-batch is the same. auto: once a step on GPUs, if it fits."""

    @property
    def cached_heads(self) -> int:
        """Heads in the KV cache: L latent heads, K KV heads, or all N heads' factors (TPA)."""
        return self.attention.cached_heads(self.n_heads)

    @property
    def heads_per_latent(self) -> int:
        """M: query heads that read one cached head."""
        return self.n_heads * self.attention.n_branches // self.cached_heads

    def conflicts(self) -> list[str]:
        groups, what = self.cached_heads // self.attention.n_branches, self.attention.cached_heads_field
        if self.attention.n_branches > 1:
            what = "the number of head groups n_latent_heads/n_branches"
        if self.n_heads % groups == 0:
            return []
        return [
            f"{self.at}n_heads={self.n_heads} is not divisible by {what}={groups}; "
            "every latent or KV head must serve the same number of query heads."
        ]


MeshSize = Annotated[int, Range(ge=1, also=(-1,))]


@dataclasses.dataclass(frozen=True)
class MeshConfig(Validated):
    """Sizes of the device mesh; their product is the number of devices used. One size may be -1: what is left."""

    at: ClassVar[str] = "mesh."
    data: MeshSize = -1
    """Data parallelism: devices that hold copies of the parameters and different sequences."""
    fsdp: MeshSize = 1
    """Fully sharded data parallelism: different sequences, parameters split over D."""
    tensor: MeshSize = 1
    """Tensor parallelism: query heads in training, latent heads in decoding, MLP width and vocabulary in both."""
    context: MeshSize = 1
    """Context parallelism: tokens of a sequence in training, tokens of the cache in decoding."""

    def conflicts(self) -> list[str]:
        sizes = dataclasses.asdict(self)
        several = list(sizes.values()).count(-1) > 1
        return [f"At most one mesh size may be -1 (what is left); got {sizes}."] if several else []

    def resolve(self, n_devices: int) -> MeshConfig:
        """The same mesh with -1 replaced so that the sizes multiply to `n_devices`.

        Raises:
          ConfigError: the sizes are illegal, or do not multiply to `n_devices`.
        """
        self.validate()
        sizes = dataclasses.asdict(self)
        known = math.prod(v for v in sizes.values() if v != -1)
        free = [k for k, v in sizes.items() if v == -1]
        if free and n_devices % known == 0:
            sizes[free[0]] = n_devices // known
        elif free or known != n_devices:
            shown = " x ".join(f"{k}={v}" for k, v in sizes.items())
            raise ConfigError(
                [
                    f"A mesh of {shown} cannot be laid out on {n_devices} device(s); the product must be {n_devices}."
                ]
            )
        return MeshConfig(**sizes)


@dataclasses.dataclass(frozen=True)
class DataConfig(Validated):
    """Where tokens come from and how they become batches."""

    at: ClassVar[str] = "data."
    path: str = "embedded"
    """`embedded` (the corpus in the package), or a folder or bucket URL of `*_train_*.bin` and `*_val_*.bin` shards."""
    verify: bool = False
    """Read every shard once before training, and compare it with the checksum that `mlra-prepare` writes into it."""
    tokenizer: str = "byte"
    """`byte`, `gpt2`, or the path of a `tokenizers` JSON file; stored with the model for decoding."""
    seq_len: Positive = 2048
    """T: tokens in a sequence."""
    global_batch: Positive = 480
    """Sequences in one optimizer step, over all devices."""
    micro_batch: NotNegative = 0
    """Sequences that one data-parallel device (data x fsdp) processes at a time; accumulation is derived from it.
    0: what fits and is fastest by estimate (1 where the memory is unknown)."""
    order: Literal["shuffled", "sequential", "official"] = "shuffled"
    """shuffled: a new permutation of windows each epoch, from the seed; sequential: file order; official: the order
    of the paper's PyTorch code, in which rank r of `official_ranks` reads every `official_ranks`-th file."""
    official_ranks: Positive = 8
    """Ranks whose interleaving `order=official` reproduces."""
    read_threads: Positive = 4
    """Threads that read windows ahead of the device."""
    prefetch: Positive = 8
    """Global batches read ahead."""

    def conflicts(self) -> list[str]:
        if self.order != "official" or self.global_batch % self.official_ranks == 0:
            return []
        return [
            f"{self.at}global_batch={self.global_batch} is not divisible by official_ranks={self.official_ranks}, "
            "which order=official needs."
        ]

    def accumulation(self, n_data_shards: int) -> int:
        """Micro-batches in one optimizer step on `n_data_shards` = data x fsdp devices; counts `micro_batch` 0 as 1.

        Raises:
          ConfigError: `global_batch` is not a multiple of `micro_batch * n_data_shards`.
        """
        micro_batch = self.micro_batch or 1
        per_micro = micro_batch * n_data_shards
        if self.global_batch % per_micro:
            raise ConfigError(
                [
                    f"data.global_batch={self.global_batch} is not a multiple of micro_batch={micro_batch} x "
                    f"{n_data_shards} data-parallel devices (data x fsdp) = {per_micro}; change one of them."
                ]
            )
        return self.global_batch // per_micro


@dataclasses.dataclass(frozen=True)
class OptimConfig(Validated):
    """AdamW with linear warm-up from exactly 0 and cosine decay (the paper's recipe)."""

    at: ClassVar[str] = "optim."
    lr: PositiveFloat = 1.6e-4
    """Peak learning rate."""
    min_lr: NotNegativeFloat = 1.6e-5
    """Learning rate at and after `decay_steps`."""
    warmup_steps: NotNegative = 2000
    """Step k < warmup_steps has rate lr * k / warmup_steps: 0 at step 0. A warm-up that would not end before
    decay_steps takes a tenth of them."""
    decay_steps: Positive = 100_000
    """Step at which the cosine reaches `min_lr`."""
    beta1: Annotated[float, Range(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Range(ge=0, lt=1)] = 0.95
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: NotNegativeFloat = 0.1
    """Decoupled weight decay, on every parameter (norm gains and embedding too)."""
    clip_norm: Annotated[float, Range(gt=0, lt=None)] = 1.0
    """Gradients are scaled down to this global norm."""
    skip_limit: NotNegative = 0
    """Updates in a row that may be left out because loss or gradient norm is NaN, infinite or a spike; one more ends
    the run. 0: the first NaN does, and spikes are not looked for."""
    spike_deviations: NotNegativeFloat = 0.0
    """A loss or gradient norm so many standard deviations above its running mean is a spike; 0: none is."""
    spike_window: Annotated[int, Range(ge=2)] = 128
    """Updates over which that mean and deviation are taken; before as many were made, nothing is a spike."""

    @property
    def warmup(self) -> int:
        """Steps that the warm-up really takes: short runs of a configuration made for long ones have one too."""
        return self.warmup_steps if self.warmup_steps < self.decay_steps else self.decay_steps // 10

    def conflicts(self) -> list[str]:
        at, faults = self.at, []
        if self.min_lr > self.lr:
            faults.append(f"{at}min_lr={self.min_lr} must be at most lr={self.lr}.")
        if self.spike_deviations and not self.skip_limit:
            faults.append(
                f"{at}spike_deviations={self.spike_deviations} needs {at}skip_limit, the number of updates that may be "
                "left out in a row."
            )
        return faults


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Validated):
    """When checkpoints are written and how many are kept."""

    at: ClassVar[str] = "checkpoint."
    every: Positive = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep: Positive = 2
    """Most recent checkpoints kept."""
    keep_every: NotNegative = 0
    """Checkpoints at multiples of this step are kept for ever; 0: none."""


@dataclasses.dataclass(frozen=True)
class LogConfig(Validated):
    """What is measured and where it goes."""

    at: ClassVar[str] = "log."
    every: Positive = 10
    """Steps between lines of metrics."""
    eval_every: Positive = 1000
    """Steps between evaluations on the held-out windows; the last step is always evaluated."""
    eval_sequences: Positive = 200
    """Held-out sequences in one evaluation, always the same ones: the first of the validation shards."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb_project: str = ""
    """Weights & Biases project; empty: off. Needs the `wandb` package."""
    profile_start: NotNegative = 10
    """First step that `--profile` records, counted from the first step this process runs (which compiles)."""
    profile_steps: Annotated[int, Range(ge=0), arg(aliases=("--profile",))] = 0
    """Steps that the profiler records into the run's `profile` folder; 0: off."""


@dataclasses.dataclass(frozen=True)
class TrainConfig(Validated):
    """Everything that defines a training run; stored in each of its checkpoints."""

    name: str = "mlra_4"
    """Name of the run; its folder is `runs/NAME` unless `out` is given."""
    out: str = ""
    """Folder or bucket URL of the run (checkpoints, metrics); empty: `runs/NAME`."""
    model: ModelConfig = ModelConfig()
    """The network."""
    data: DataConfig = DataConfig()
    """The tokens."""
    optim: OptimConfig = OptimConfig()
    """The optimizer."""
    mesh: MeshConfig = MeshConfig()
    """The devices."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    log: LogConfig = LogConfig()
    """Metrics, evaluation, profile."""
    steps: Positive = 100_001
    """Optimizer updates in all (steps 0 to steps - 1)."""
    seed: Seed = 5000
    """Of the initial parameters and of the data order."""
    compilation_cache: str = "~/.cache/mlra_jax/xla"
    """Folder in which XLA's compiled programs are kept between runs; empty: none."""

    @property
    def run_dir(self) -> str:
        """Folder or URL that holds the run; a leading `~`, which shells leave in `--out=~/x`, is expanded."""
        return os.path.expanduser(self.out) or f"runs/{self.name}"


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as JSON-able nested dictionaries; `from_dict` is its inverse."""
    return dataclasses.asdict(config)


EXECUTION = {
    "model.remat",
    "model.unroll_layers",
    "model.gather",
    "model.attention.form",
    "data.micro_batch",
}
"""Fields that say how a run is computed, on its devices; the parameters and what they mean do not depend on them."""


def from_dict(d: Any, *, afresh: bool = False) -> TrainConfig:
    """The legal `TrainConfig` that `to_dict` wrote; fields it lacks take their defaults.

    Args:
      d: nested dictionaries.
      afresh: give the fields of `EXECUTION` their defaults, for a command with other devices to choose.

    Raises:
      ConfigError: fields are unknown, or their values not legal; all of them are listed.
    """
    unknown: list[str] = []

    def build(classes: tuple[Any, ...], values: Any, at: str) -> Any:
        if not isinstance(values, dict):
            return values
        names = lambda cls: [f.name for f in dataclasses.fields(cls)]
        cls = max(classes, key=lambda cls: len(values.keys() & names(cls)))
        fields = {}
        for name, value in values.items():
            if afresh and f"{at}{name}" in EXECUTION:
                continue
            if name not in names(cls):
                unknown.append(f"Unknown field {at}{name}.{nearest(name, names(cls))}")
                continue
            hint = _hints(cls)[name]
            hint = get_args(hint)[0] if get_origin(hint) is Annotated else hint
            parts = tuple(filter(dataclasses.is_dataclass, get_args(hint) or (hint,)))
            fields[name] = build(parts, value, f"{at}{name}.") if parts else value
        return cls(**fields)

    config = build((TrainConfig,), d, "")
    if faults := unknown + value_faults("The configuration", config, TrainConfig):
        raise ConfigError(faults)
    return config
