"""Frozen configuration dataclasses and their validation.

A configuration is plain data: it can be printed, compared, derived with `dataclasses.replace`, parsed from the
command line and stored as JSON beside the weights. Derived quantities are properties. A field's type hint, narrowed by
a `Range` where needed, says which values are legal; `faults()` returns one sentence for each thing that is wrong, and
`validate()` raises `ConfigError` with all of them at once. Letters are those of docs/notation.md.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import math
import operator
import os
import reprlib
import types
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Self,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from tyro.conf import arg

from mlra_jax.errors import FaultsError

if TYPE_CHECKING:
    from mlra_jax.attention.base import Attention


class ConfigError(FaultsError):
    """One or more faults in a configuration; the message lists all of them."""

    where = "the configuration"


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a field may hold, as part of its type: `Annotated[int, Range(ge=1)]`. NaN is never allowed."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = math.inf
    """None: infinity is allowed too."""
    also: tuple[float, ...] = ()
    """Values outside the range that are allowed too, such as 0 for "off"."""

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
    """The hint ` Did you mean X?` if one of the `known` names is close to `name`; else an empty string."""
    close = difflib.get_close_matches(str(name), list(map(str, known)), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def value_faults(name: str, value: Any, hint: Any, limits: Range = Range()) -> list[str]:
    """The faults of `value` as the field or argument `name` with the type hint `hint`; empty if there are none."""
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
    """Checks arguments of a function against a type hint.

    Raises:
      ConfigError: names each illegal argument.
    """
    if faults := [fault for name, value in arguments.items() for fault in value_faults(name, value, hint)]:
        raise ConfigError(faults)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


OPTION = "--"


class Validated:
    """Base of dataclasses that check themselves: each field against its type hint, then `conflicts` between fields."""

    at: ClassVar[str] = ""
    """Prefix of field names in messages; `OPTION` for the arguments of a command."""

    def conflicts(self) -> list[str]:
        """One sentence for each combination of fields that are legal alone but not together."""
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


class CacheArray(NamedTuple):
    """One array of an attention layer's cache."""

    width: int
    """Values per token: of each head, or of all heads together."""
    by_head: bool = True
    """Whether each cached head has its own values, [B, heads, S, width]; else all heads share them, [B, S, width]."""


class AttentionConfig(Validated):
    """Sizes and costs of one attention family: base class of the frozen dataclasses in `mlra_jax.attention`.

    Costs are those of one layer. `n_heads` is N, the model's query heads.
    """

    at: ClassVar[str] = "model.attention."
    n_branches: int = 1
    """J: cached heads whose outputs each query head sums."""
    cached_heads_field: ClassVar[str] = "attention.n_kv_heads"
    """Name of the configuration field that sets `cached_heads`, for messages."""

    @classmethod
    def module(cls) -> type[Attention]:
        """The layer that a configuration of this class describes."""
        raise NotImplementedError

    def cached_heads(self, n_heads: int) -> int:
        """Number of heads in the KV cache, which tensor parallelism splits when decoding."""
        raise NotImplementedError

    def cache_arrays(self) -> dict[str, CacheArray]:
        """The arrays of the cache, by name."""
        raise NotImplementedError

    def train_flops(self, n_heads: int, keys: float) -> float:
        """Forward FLOPs of one query token that attends to `keys` keys, without the products with weights.

        They follow the attention's definition, whatever form or kernel computes it.
        """
        raise NotImplementedError

    def decode_flops(self, n_heads: int) -> int:
        """FLOPs of one query token per cached token, as decoding computes them."""
        raise NotImplementedError

    def activation_bytes(self, n_heads: int, itemsize: int) -> int:
        """Bytes of queries and outputs per token of prefill, with elements of `itemsize` bytes."""
        raise NotImplementedError

    def gathered_values(self, n_heads: int, tensor: int) -> int:
        """Values per token that context parallelism gathers when `tensor` devices split the heads, if they divide them.

        By default, the cached ones.
        """
        heads = self.cached_heads(n_heads)
        held = heads // tensor if heads % tensor == 0 else heads
        return sum(width * (held if by_head else 1) for width, by_head in self.cache_arrays().values())

    def share(self, cached_heads: int) -> Self:
        """The sizes of one device's share, with `cached_heads` of the cached heads.

        Raises:
          ConfigError: the family does not say how a share runs alone.
        """
        raise ConfigError(f"{type(self).__name__} does not say how one device's share of it runs alone.")


def uneven(config: AttentionConfig, name: str, multiple: int = 2) -> list[str]:
    """A fault if the rotary width `name` is not a multiple of `multiple`: rotary elements come in pairs."""
    if getattr(config, name) % multiple == 0:
        return []
    even = "even" if multiple == 2 else f"a multiple of {multiple}"
    return [f"{config.at}{name}={getattr(config, name)} must be {even}; rotary elements come in pairs."]


@dataclasses.dataclass(frozen=True)
class RotaryScalingConfig(Validated):
    """How rotary embeddings of a model trained at one length are changed for longer sequences."""

    at: ClassVar[str] = "model.rotary_scaling."
    method: Literal["none", "linear", "ntk", "yarn"] = "none"
    """linear: position interpolation, all frequencies divided by `factor`; ntk: a larger base, so that only the lowest
    frequency is; yarn: the frequencies below `beta_slow` turns are, those above `beta_fast` stay, and attention is made
    sharper, as in DeepSeek-V2 and V3."""
    factor: Annotated[float, Range(ge=1)] = 1.0
    """By how much sequences may be longer than those of the first training; 1 changes nothing."""
    original_max_position: Positive = 2048
    """Length of those, in tokens (yarn)."""
    beta_fast: PositiveFloat = 32.0
    """Turns within the original length from which on a frequency stays as it is (yarn)."""
    beta_slow: PositiveFloat = 1.0
    """Turns within the original length up to which a frequency is divided by `factor` (yarn)."""
    mscale: NotNegativeFloat = 1.0
    """With `mscale_all_dim`: rotated queries and keys are multiplied by (0.1 * mscale * ln(factor) + 1) over
    (0.1 * mscale_all_dim * ln(factor) + 1) each, hence not at all if both are equal (yarn)."""
    mscale_all_dim: NotNegativeFloat = 1.0
    """All scores are multiplied by (0.1 * mscale_all_dim * ln(factor) + 1)**2, the inverse of the softmax's temperature
    (yarn)."""

    def conflicts(self) -> list[str]:
        at, faults = self.at, []
        if self.method == "none" and self.factor != 1:
            faults.append(f"{at}factor={self.factor} needs a {at}method: linear, ntk or yarn.")
        if self.beta_fast <= self.beta_slow:
            faults.append(f"{at}beta_fast={self.beta_fast} must be more than beta_slow={self.beta_slow}.")
        return faults


@dataclasses.dataclass(frozen=True)
class ModelConfig(Validated):
    """The paper's decoder-only transformer: tied embeddings, RMSNorm, SwiGLU, half-split RoPE, no biases."""

    at: ClassVar[str] = "model."
    vocab_size: Positive = 50304
    """Rows of the tied embedding; ids beyond the tokenizer's take part in the training softmax, as in the paper."""
    n_layers: Positive = 24
    """Transformer layers."""
    d_model: Positive = 3072
    """D: width of the residual stream."""
    n_heads: Positive = 24
    """N: query heads."""
    d_ff: Positive = 9880
    """F: hidden width of the SwiGLU MLP."""
    attention: AttentionConfig = dataclasses.field(default_factory=lambda: attention_type("latent")())
    """The attention family and its sizes."""
    gated_attention: bool = False
    """Multiply the heads' output by sigmoid(W_g x) before the output projection."""
    output_init: Literal["zeros", "normal"] = "zeros"
    """Initial output projections of attention and MLP: zeros (paper) or normal like the rest (ablation)."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the normal initialisation; TPA's factors are initialised uniformly instead."""
    rope_base: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    rotary_scaling: RotaryScalingConfig = RotaryScalingConfig()
    """Scaling of the rotary frequencies for long sequences."""
    norm_eps: PositiveFloat = 1e-6
    """Added to the mean square in every RMSNorm."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of matrix products and attention; the residual stream, norms and softmax are always float32."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which parameters are stored: float32 for training; decoding may hold bfloat16."""

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
        faults, method = [], self.rotary_scaling.method
        if self.n_heads % groups:
            faults.append(
                f"{self.at}n_heads={self.n_heads} is not divisible by {what}={groups}; "
                "every latent or KV head must serve the same number of query heads."
            )
        if method == "yarn" and self.rope_base <= 1:
            faults.append(
                f"{self.at}rope_base={self.rope_base} must be more than 1 for rotary_scaling.method=yarn."
            )
        return faults


Remat = Literal["auto", "none", "products", "dots", "mlp", "attention", "full"]
Gather = Literal["auto", "layer", "step"]


@dataclasses.dataclass(frozen=True)
class ExecutionConfig(Validated):
    """How whole sequences are computed on the devices at hand. It is not part of the model, so it is chosen anew
    wherever a checkpoint is read (by the planner, where it is left on auto)."""

    at: ClassVar[str] = "execution."
    attention_form: Literal["auto", "expanded", "absorbed"] = "auto"
    """How latent attention computes whole sequences: with per-head keys and values (expanded), or with queries moved
    into the latent space (absorbed). Both are equal; auto takes the one with fewer FLOPs. Decoding always absorbs."""
    remat: Remat = "auto"
    """What a layer saves for the backward pass besides its input, from most memory to most recomputation: everything
    (none); inputs and outputs of all products, and attention's output (products); outputs of products with weights, and
    attention's output (dots); outputs of the MLP's first products, and attention's output (mlp); attention's output
    alone (attention); nothing (full). auto: training takes what fits, or full where memory is unknown."""

    unroll_layers: Literal["auto", "no", "yes"] = "auto"
    """Compile the train step with all layers unrolled instead of as a loop over one: this saves copies into and out of
    stacked arrays, but takes longer to compile. auto: on GPUs, unless gather is layer and fsdp splits the weights."""
    gather: Gather = "auto"
    """When training gathers the weights that fsdp splits: each layer's when it is used (layer), which takes the least
    memory, or all of them once per step (step), which sums gradients once per step too. step needs mesh.tensor and
    mesh.context of 1; with a single micro-batch there is no difference. auto: step on GPUs, if it fits."""
    deterministic: Literal["yes", "no"] = "yes"
    """Whether training gives the same bits each time, on GPUs too: XLA then takes no operation that does not, and does
    not choose algorithms by measuring. On CPUs and TPUs it always does."""


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
                f"A mesh of {shown} cannot be laid out on {n_devices} device(s); the product must be {n_devices}."
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
    """Sequences that one data-parallel device (data x fsdp) processes at a time; the number of micro-batches to
    accumulate follows. 0: the fastest that fits, by estimate (1 where memory is unknown)."""
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
        """Micro-batches in one optimizer step on `n_data_shards` = data x fsdp devices, counting `micro_batch` 0 as 1.

        Raises:
          ConfigError: `global_batch` is not a multiple of `micro_batch * n_data_shards`.
        """
        micro_batch = self.micro_batch or 1
        per_micro = micro_batch * n_data_shards
        if self.global_batch % per_micro:
            raise ConfigError(
                f"data.global_batch={self.global_batch} is not a multiple of micro_batch={micro_batch} x "
                f"{n_data_shards} data-parallel devices (data x fsdp) = {per_micro}; change one of them."
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
    """Consecutive updates that may be skipped because the loss or gradient norm is NaN, infinite or a spike; one more
    ends the run. 0: the first NaN ends it, and spikes are not looked for."""
    spike_deviations: NotNegativeFloat = 0.0
    """A loss or gradient norm this many standard deviations above its running mean is a spike; 0: nothing is."""
    spike_window: Annotated[int, Range(ge=2)] = 128
    """Updates over which that mean and deviation are taken; until that many were made, nothing is a spike."""

    @property
    def warmup(self) -> int:
        """Steps that the warm-up takes; shortened in short runs of a configuration that was made for long ones."""
        return self.warmup_steps if self.warmup_steps < self.decay_steps else self.decay_steps // 10

    def conflicts(self) -> list[str]:
        at, faults = self.at, []
        if self.min_lr > self.lr:
            faults.append(f"{at}min_lr={self.min_lr} must be at most lr={self.lr}.")
        if self.spike_deviations and not self.skip_limit:
            faults.append(
                f"{at}spike_deviations={self.spike_deviations} needs {at}skip_limit, the number of updates that may be "
                "skipped in a row."
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
    """Checkpoints at multiples of this step are kept forever; 0: none."""
    stop_status: Annotated[int, Range(ge=0, le=255)] = 75
    """Exit status after a SIGTERM that ended the run, saved, before its last step, so that an orchestrator starts it
    again (75: EX_TEMPFAIL of sysexits.h); a run that is finished exits with 0."""


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
    prometheus_port: Annotated[int, Range(ge=0, le=65535)] = 0
    """Port of process 0's host where Prometheus (or OpenTelemetry's collector) finds the latest metrics, at /metrics.
    0: off. Needs the `prometheus-client` package."""
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
    init_from: str = ""
    """Run (or its `checkpoints` folder, or one step's; local or a bucket URL) whose parameters a new run starts from,
    with a new optimizer; sequences, rotary frequencies and devices may be others. Empty: random parameters."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    """The network."""
    execution: ExecutionConfig = ExecutionConfig()
    """How whole sequences are computed."""
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
    """Seed of the initial parameters and of the data order."""
    compilation_cache: str = "~/.cache/mlra_jax/xla"
    """Folder, or bucket URL (for pods, whose disks are new each time), that keeps compiled programs between runs;
    empty: none."""

    @property
    def run_dir(self) -> str:
        """Folder or URL that holds the run; a leading `~`, which shells leave in `--out=~/x`, is expanded."""
        return os.path.expanduser(self.out) or f"runs/{self.name}"


def attention_type(name: str) -> type[AttentionConfig]:
    """See `mlra_jax.attention.registry`, which is imported late: families derive from this module's classes."""
    from mlra_jax.attention import registry

    return registry.attention_type(name)


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as JSON-able nested dictionaries; `from_dict` is its inverse.

    The attention's name is its `type`.
    """
    from mlra_jax.attention.registry import attention_name

    def one(value: Any) -> Any:
        if not dataclasses.is_dataclass(value):
            return value
        fields = {f.name: one(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return (
            {"type": attention_name(type(value)), **fields} if isinstance(value, AttentionConfig) else fields
        )

    return one(config)


MOVED = {
    "model.remat": "execution.remat",
    "model.unroll_layers": "execution.unroll_layers",
    "model.gather": "execution.gather",
    "model.attention.form": "execution.attention_form",
}
"""Where fields of earlier versions are now."""

_FIELDS_BEFORE_TYPES = {
    "n_latent_heads": "latent",
    "n_kv_heads": "grouped",
    "n_tied_heads": "tied",
    "rank": "tensor_product",
}
"""The field that identifies the family of an attention without a `type`, as earlier versions wrote it."""


def upgraded(d: Any) -> Any:
    """The dictionary that an earlier version's `to_dict` wrote, in the form of this version."""
    model = d.get("model") if isinstance(d, dict) else None
    if not isinstance(model, dict):
        return d
    d = copy.deepcopy(d)
    model, execution = d["model"], d.setdefault("execution", {})
    attention = model.get("attention")
    for old, new in MOVED.items():
        holder, name = (attention if "attention" in old else model), old.split(".")[-1]
        if isinstance(holder, dict) and name in holder and isinstance(execution, dict):
            execution.setdefault(new.removeprefix("execution."), holder.pop(name))
    if isinstance(attention, dict) and "type" not in attention:
        known = (family for field, family in _FIELDS_BEFORE_TYPES.items() if field in attention)
        model["attention"] = {"type": next(known, "latent"), **attention}
    return d


def from_dict(d: Any, *, afresh: bool = False) -> TrainConfig:
    """The legal `TrainConfig` that `to_dict` wrote, in this version or an earlier one.

    Args:
      d: nested dictionaries; fields that they lack take their defaults.
      afresh: reset what was chosen for the run's devices (`execution`, `data.micro_batch`), so that a command on other
        devices chooses for itself.

    Raises:
      ConfigError: fields are unknown, or their values not legal; all of them are listed.
    """
    faults: list[str] = []

    def build(cls: Any, values: Any, at: str) -> Any:
        if not isinstance(values, dict):
            return values
        if cls is AttentionConfig:
            cls, values = (
                attention_type(str(values["type"])),
                {k: v for k, v in values.items() if k != "type"},
            )
        names = [f.name for f in dataclasses.fields(cls)]
        fields = {}
        for name, value in values.items():
            if name not in names:
                faults.append(f"Unknown field {at}{name}.{nearest(name, names)}")
                continue
            hint = _hints(cls)[name]
            is_part = isinstance(hint, type) and issubclass(hint, Validated)
            fields[name] = build(hint, value, f"{at}{name}.") if is_part else value
        return cls(**fields)

    config = build(TrainConfig, upgraded(d), "")
    if faults := faults + value_faults("The configuration", config, TrainConfig):
        raise ConfigError(faults)
    if afresh:
        data = dataclasses.replace(config.data, micro_batch=DataConfig.micro_batch)
        config = dataclasses.replace(config, execution=ExecutionConfig(), data=data)
    return config


def __getattr__(name: str) -> Any:
    """The families' configurations, which earlier versions had here."""
    from mlra_jax.attention import registry

    for place in registry.BUILT_IN.values():
        if place.endswith(f":{name}"):
            return attention_type(place)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
