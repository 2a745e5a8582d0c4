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

from mlra_jax.errors import UserError

if TYPE_CHECKING:
    from mlra_jax.attention.base import Attention


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


class CacheArray(NamedTuple):
    """One array of an attention layer's cache."""

    width: int
    """Values of a token, for each head or for all."""
    by_head: bool = True
    """Whether each cached head has values of its own, [B, heads, S, width]; else all share them, [B, S, width]."""


class AttentionConfig(Validated):
    """Sizes of one attention family, and what they cost: base class of the frozen dataclasses in `mlra_jax.attention`.

    Counts are of one layer. `n_heads` is N, the model's query heads.
    """

    at: ClassVar[str] = "model.attention."
    n_branches: int = 1
    """J: cached heads that each query head reads and sums."""
    cached_heads_field: ClassVar[str] = "attention.n_kv_heads"
    """The field of the model's configuration that `cached_heads` is."""

    @classmethod
    def module(cls) -> type[Attention]:
        """The layer that a configuration of this class describes."""
        raise NotImplementedError

    def cached_heads(self, n_heads: int) -> int:
        """Heads in the KV cache: what tensor parallelism splits when decoding."""
        raise NotImplementedError

    def cache_arrays(self) -> dict[str, CacheArray]:
        """The arrays of the cache, by name."""
        raise NotImplementedError

    def train_flops(self, n_heads: int, keys: float) -> float:
        """FLOPs of the forward pass of one query token that sees `keys` keys, weights' products left out.

        Counted as the attention is defined, whatever form or kernel computes it.
        """
        raise NotImplementedError

    def decode_flops(self, n_heads: int) -> int:
        """FLOPs of one query token for each token in the cache, as decoding computes them."""
        raise NotImplementedError

    def activation_bytes(self, n_heads: int, itemsize: int) -> int:
        """Bytes of queries and outputs that one token takes in prefill, with elements of `itemsize` bytes."""
        raise NotImplementedError

    def gathered_values(self, n_heads: int, tensor: int) -> int:
        """Values of a token that context parallelism gathers, with `tensor` devices splitting heads that they divide.

        By default those that are cached.
        """
        heads = self.cached_heads(n_heads)
        held = heads // tensor if heads % tensor == 0 else heads
        return sum(width * (held if by_head else 1) for width, by_head in self.cache_arrays().values())

    def share(self, cached_heads: int) -> Self:
        """The sizes of one device's share that holds `cached_heads` heads of the cache.

        Raises:
          ConfigError: the family has no shares that run alone.
        """
        raise ConfigError([f"Shares of {type(self).__name__} are not known."])

    def split(self, n_latent_heads: int, n_branches: int) -> Self:
        """The sizes with each latent head cut into several (`mlra-convert split-latents`).

        Raises:
          ConfigError: there is no latent, or it cannot be cut so.
        """
        raise ConfigError(["Only latent attention (MLA, GLA, MLRA) has a latent that can be split."])


def uneven(config: AttentionConfig, name: str, multiple: int = 2) -> list[str]:
    """A fault if a rotary width cannot be cut into pairs, in `multiple / 2` equal parts."""
    if getattr(config, name) % multiple == 0:
        return []
    even = "even" if multiple == 2 else f"a multiple of {multiple}"
    return [f"{config.at}{name}={getattr(config, name)} must be {even}; rotary elements come in pairs."]


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
    attention: AttentionConfig = dataclasses.field(default_factory=lambda: attention_type("latent")())
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


Remat = Literal["auto", "none", "products", "dots", "mlp", "attention", "full"]
Gather = Literal["auto", "layer", "step"]


@dataclasses.dataclass(frozen=True)
class ExecutionConfig(Validated):
    """How a model's whole sequences are computed on the devices at hand. It defines no numbers, so it is chosen afresh
    wherever a checkpoint is read (by the planner, where it is left open)."""

    at: ClassVar[str] = "execution."
    attention_form: Literal["auto", "expanded", "absorbed"] = "auto"
    """How latent attention computes whole sequences: per-head keys and values (expanded), or queries moved into the
    latent space (absorbed). They are equal; auto takes the one with fewer FLOPs. Decoding is always absorbed."""
    remat: Remat = "auto"
    """What a layer keeps for the backward pass besides its input, from the most memory to the most recomputation:
    everything (none); all that products give and take, and attention's output (products); what products with weights
    give, and attention's output (dots); the MLP's first products and attention's output (mlp); attention's output;
    nothing (full). auto: training takes what fits; full where memory is unknown."""

    unroll_layers: Literal["auto", "no", "yes"] = "auto"
    """Whether a train step is compiled with all layers in a row, or as a loop over one: the first spares the copies
    into and out of stacked arrays, and takes longer to compile. auto: on GPUs, unless each layer's weights are gathered
    for it."""
    gather: Gather = "auto"
    """When training gathers the weights that fsdp splits: each layer's when they are used (layer), which takes the
    least memory, or all once a step (step), whose gradients are summed once too; needs mesh.tensor and mesh.context of
    1, and of a step with a single micro-batch is the same. auto: once a step on GPUs, if it fits."""
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
    """Of the initial parameters and of the data order."""
    compilation_cache: str = "~/.cache/mlra_jax/xla"
    """Folder in which XLA's compiled programs are kept between runs; empty: none."""

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
"""By which field of an attention without a `type`, as earlier versions wrote it, its family is known."""


def upgraded(d: Any) -> Any:
    """What an earlier version's `to_dict` wrote, as this one's would write it."""
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
      afresh: give what says how the run is computed (`execution`, `data.micro_batch`) its defaults, for a command with
        other devices to choose.

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
