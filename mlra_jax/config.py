"""Frozen configuration dataclasses and their validation.

A configuration is plain data: it can be printed, compared, derived with `dataclasses.replace`, parsed from the
command line and stored as JSON beside the weights. Derived quantities are properties. Every class has `faults()`,
which returns one sentence for each thing that is wrong; `validate()` raises `ConfigError` with all of them at once.

Letters in shapes: B batch, T query positions, S cached positions, D `d_model`, N `n_heads`, K KV heads, L
`n_latent_heads`, C `d_latent`, M `heads_per_latent`, H `d_nope` or `d_head` (also the value width), R `d_rope`,
J `n_branches`, G = L / J.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Annotated, Any, ClassVar, Literal, get_args

from tyro.conf import AvoidSubcommands, arg

from mlra_jax.errors import UserError


class ConfigError(UserError):
    """One or more faults in a configuration; the message lists all of them."""

    def __init__(self, faults: list[str]):
        self.faults = faults
        many = f"{len(faults)} faults in the configuration:\n  - " if len(faults) > 1 else ""
        super().__init__(many + "\n  - ".join(faults))


def _positive(config: Any, where: str, *names: str) -> list[str]:
    return [
        f"{where}{name}={getattr(config, name)} must be at least 1."
        for name in names
        if getattr(config, name) < 1
    ]


class Validated:
    """A configuration that can say what is wrong with it."""

    def faults(self) -> list[str]:
        """One sentence for each fault; empty when the configuration is legal."""
        raise NotImplementedError

    def validate(self) -> None:
        """Raises `ConfigError` listing every fault."""
        if faults := self.faults():
            raise ConfigError(faults)


class AttentionSizes(Validated):
    """What every attention's configuration says of the cache."""

    n_branches: int = 1
    """J: cached heads that each query head reads and sums."""
    cached_heads_field: ClassVar[str] = "attention.n_kv_heads"
    """The field of the model's configuration that `cached_heads` is."""

    def cached_heads(self, n_heads: int) -> int:
        """Heads in the KV cache of a model with so many query heads: what tensor parallelism splits when decoding."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class LatentAttentionConfig(AttentionSizes):
    """MLA, GLA and MLRA: attention over `n_latent_heads` low-rank latent heads (paper, section 3).

    MLA is (1, 1), GLA-2 (2, 1), GLA-4 (4, 1), MLRA-2 (4, 2), MLRA-4 (4, 4) as (n_latent_heads, n_branches).
    """

    n_latent_heads: int = 4
    """L: latent heads in the KV cache; the axis that tensor parallelism splits when decoding."""
    n_branches: int = 4
    """J: latent heads that each query head reads and sums; the number in MLRA-2 and MLRA-4."""
    q_lora_rank: int = 1024
    """A: width of the compressed query."""
    kv_lora_rank: int = 512
    """Width of all latent heads together, L * C."""
    d_nope: int = 128
    """H: per-head width of the position-free part of query and key, and of the value."""
    d_rope: int = 64
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

    def faults(self) -> list[str]:
        at = "model.attention."
        faults = _positive(self, at, "n_latent_heads", "n_branches", "q_lora_rank", "kv_lora_rank", "d_nope")
        if faults:
            return faults
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
        if self.d_rope < 0 or self.d_rope % 2:
            faults.append(
                f"{at}d_rope={self.d_rope} must be even and not negative; rotary elements come in pairs."
            )
        return faults


@dataclasses.dataclass(frozen=True)
class GroupedAttentionConfig(AttentionSizes):
    """MHA (n_kv_heads = n_heads), GQA, MQA (n_kv_heads = 1), and MFA (n_kv_heads = 1, wide, with a low-rank query)."""

    n_kv_heads: int = 24
    """K: key-value heads; KV head k serves the contiguous query heads k*N/n_kv_heads onwards."""
    d_head: int = 128
    """H: width of a query, key and value head; all of it is rotary."""
    q_lora_rank: int = 0
    """A: width of the compressed, normalised query that MFA makes queries from; 0: they are made from the input."""

    def cached_heads(self, n_heads: int) -> int:
        return self.n_kv_heads

    def faults(self) -> list[str]:
        at = "model.attention."
        faults = _positive(self, at, "n_kv_heads", "d_head")
        if self.q_lora_rank < 0:
            faults.append(f"{at}q_lora_rank={self.q_lora_rank} must not be negative; 0 is none.")
        if not faults and self.d_head % 2:
            faults.append(f"{at}d_head={self.d_head} must be even; rotary elements come in pairs.")
        return faults


@dataclasses.dataclass(frozen=True)
class TiedAttentionConfig(AttentionSizes):
    """GTA: the first half of a KV head is key and value at once; the rotary half of the key is shared by all heads."""

    n_tied_heads: int = 6
    """K: key-value heads; head k serves the contiguous query heads k*N/n_tied_heads onwards."""
    d_head: int = 128
    """H: width of a query, key and value head; the second half of query and key is rotary."""

    cached_heads_field: ClassVar[str] = "attention.n_tied_heads"

    @property
    def d_rope(self) -> int:
        """R: width of the rotary half."""
        return self.d_head // 2

    def cached_heads(self, n_heads: int) -> int:
        return self.n_tied_heads

    def faults(self) -> list[str]:
        at = "model.attention."
        faults = _positive(self, at, "n_tied_heads", "d_head")
        if not faults and self.d_head % 4:
            faults.append(
                f"{at}d_head={self.d_head} must be a multiple of 4; rotary elements come in pairs, in half of it."
            )
        return faults


@dataclasses.dataclass(frozen=True)
class TensorProductAttentionConfig(AttentionSizes):
    """TPA: the queries, keys and values of all heads are sums of few products of a head factor and a width factor."""

    rank: int = 2
    """Products that make keys, and that make values; their factors are what is cached."""
    q_rank: int = 6
    """Products that make queries."""
    d_head: int = 128
    """H: width of a query, key and value head; all of it is rotary."""

    cached_heads_field: ClassVar[str] = "n_heads"

    def cached_heads(self, n_heads: int) -> int:
        return n_heads

    def faults(self) -> list[str]:
        at = "model.attention."
        faults = _positive(self, at, "rank", "q_rank", "d_head")
        if not faults and self.d_head % 2:
            faults.append(f"{at}d_head={self.d_head} must be even; rotary elements come in pairs.")
        return faults


AttentionConfig = (
    LatentAttentionConfig | GroupedAttentionConfig | TiedAttentionConfig | TensorProductAttentionConfig
)


@dataclasses.dataclass(frozen=True)
class ModelConfig(Validated):
    """The paper's decoder-only transformer: tied embeddings, RMSNorm, SwiGLU, half-split RoPE, no biases."""

    vocab_size: int = 50304
    """Rows of the tied embedding; ids past the tokenizer's own stay in the training softmax (as in the paper)."""
    n_layers: int = 24
    """Transformer layers."""
    d_model: int = 3072
    """D: width of the residual stream."""
    n_heads: int = 24
    """N: query heads."""
    d_ff: int = 9880
    """F: hidden width of the SwiGLU MLP."""
    attention: AvoidSubcommands[AttentionConfig] = LatentAttentionConfig()
    """Which attention, and its sizes."""
    gated_attention: bool = False
    """Multiply the heads' output by sigmoid(W_g x) before the output projection."""
    output_init: Literal["zeros", "normal"] = "zeros"
    """Initial output projections of attention and MLP: zeros (paper) or normal like the rest (ablation)."""
    init_std: float = 0.02
    """Standard deviation of the normal initialisation; TPA's factors are uniform, whatever it is."""
    rope_base: float = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-6
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

    def faults(self) -> list[str]:
        at = "model."
        faults = _positive(self, at, "vocab_size", "n_layers", "d_model", "n_heads", "d_ff")
        a = self.attention
        inner = a.faults()
        if not faults and not inner:
            groups, what = self.cached_heads // a.n_branches, a.cached_heads_field
            if a.n_branches > 1:
                what = "the number of head groups n_latent_heads/n_branches"
            if self.n_heads % groups:
                inner.append(
                    f"{at}n_heads={self.n_heads} is not divisible by {what}={groups}; "
                    "every latent or KV head must serve the same number of query heads."
                )
        faults += inner
        for name in ("init_std", "norm_eps", "rope_base"):
            if not 0 < getattr(self, name) < math.inf:
                faults.append(f"{at}{name}={getattr(self, name)} must be positive and finite.")
        return faults


@dataclasses.dataclass(frozen=True)
class MeshConfig(Validated):
    """Sizes of the device mesh; their product is the number of devices used. One size may be -1: what is left."""

    data: int = -1
    """Data parallelism: devices that hold copies of the parameters and different sequences."""
    fsdp: int = 1
    """Fully sharded data parallelism: different sequences, parameters split over D."""
    tensor: int = 1
    """Tensor parallelism: query heads in training, latent heads in decoding, MLP width and vocabulary in both."""
    context: int = 1
    """Context parallelism: tokens of a sequence in training, tokens of the cache in decoding."""

    def faults(self) -> list[str]:
        sizes = dataclasses.asdict(self)
        faults = [
            f"mesh.{k}={v} must be at least 1 (or -1: what is left)."
            for k, v in sizes.items()
            if v < 1 and v != -1
        ]
        if sum(v == -1 for v in sizes.values()) > 1:
            faults.append(f"At most one mesh size may be -1; got {sizes}.")
        return faults

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

    path: str = "embedded"
    """`embedded` (the corpus in the package), or a folder or bucket URL of `*_train_*.bin` and `*_val_*.bin` shards."""
    verify: bool = False
    """Read every shard once before training, and compare it with the checksum that `mlra-prepare` writes into it."""
    tokenizer: str = "byte"
    """`byte`, `gpt2`, or the path of a `tokenizers` JSON file; stored with the model for decoding."""
    seq_len: int = 2048
    """T: tokens in a sequence."""
    global_batch: int = 480
    """Sequences in one optimizer step, over all devices."""
    micro_batch: int = 0
    """Sequences that one data-parallel device (data x fsdp) processes at a time; accumulation is derived from it.
    0: what fits and is fastest by estimate (1 where the memory is unknown)."""
    order: Literal["shuffled", "sequential", "official"] = "shuffled"
    """shuffled: a new permutation of windows each epoch, from the seed; sequential: file order; official: the order
    of the paper's PyTorch code, in which rank r of `official_ranks` reads every `official_ranks`-th file."""
    official_ranks: int = 8
    """Ranks whose interleaving `order=official` reproduces."""
    read_threads: int = 4
    """Threads that read windows ahead of the device."""
    prefetch: int = 8
    """Global batches read ahead."""

    def faults(self) -> list[str]:
        at = "data."
        faults = _positive(
            self,
            at,
            "seq_len",
            "global_batch",
            "official_ranks",
            "read_threads",
            "prefetch",
        )
        if self.micro_batch < 0:
            faults.append(f"{at}micro_batch={self.micro_batch} must be at least 1, or 0: what fits.")
        if not faults and self.order == "official" and self.global_batch % self.official_ranks:
            faults.append(
                f"{at}global_batch={self.global_batch} is not divisible by official_ranks={self.official_ranks}, "
                "which order=official needs."
            )
        return faults

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

    lr: float = 1.6e-4
    """Peak learning rate."""
    min_lr: float = 1.6e-5
    """Learning rate at and after `decay_steps`."""
    warmup_steps: int = 2000
    """Step k < warmup_steps has rate lr * k / warmup_steps: 0 at step 0. A warm-up that would not end before
    decay_steps takes a tenth of them."""
    decay_steps: int = 100_000
    """Step at which the cosine reaches `min_lr`."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on every parameter (norm gains and embedding too)."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    skip_limit: int = 0
    """Updates in a row that may be left out because loss or gradient norm is NaN, infinite or a spike; one more ends
    the run. 0: the first NaN does, and spikes are not looked for."""
    spike_deviations: float = 0.0
    """A loss or gradient norm so many standard deviations above its running mean is a spike; 0: none is."""
    spike_window: int = 128
    """Updates over which that mean and deviation are taken; before as many were made, nothing is a spike."""

    @property
    def warmup(self) -> int:
        """Steps that the warm-up really takes: short runs of a configuration made for long ones have one too."""
        return self.warmup_steps if self.warmup_steps < self.decay_steps else self.decay_steps // 10

    def faults(self) -> list[str]:
        at = "optim."
        faults = []
        if not 0 < self.lr < math.inf or not 0 <= self.min_lr <= self.lr:
            faults.append(
                f"{at}lr={self.lr} and {at}min_lr={self.min_lr}: need 0 < lr and 0 <= min_lr <= lr."
            )
        if self.warmup_steps < 0 or self.decay_steps < 1:
            faults.append(
                f"{at}warmup_steps={self.warmup_steps} must not be negative, decay_steps={self.decay_steps} at least 1."
            )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                faults.append(f"{at}{name}={getattr(self, name)} must be in [0, 1).")
        if not (0 < self.eps < math.inf and self.clip_norm > 0 and 0 <= self.weight_decay < math.inf):
            faults.append(
                f"{at}eps={self.eps} and clip_norm={self.clip_norm} must be positive, "
                f"weight_decay={self.weight_decay} not negative."
            )
        if self.skip_limit < 0 or not 0 <= self.spike_deviations < math.inf or self.spike_window < 2:
            faults.append(
                f"{at}skip_limit={self.skip_limit} and spike_deviations={self.spike_deviations} must not be negative, "
                f"spike_window={self.spike_window} at least 2."
            )
        elif self.spike_deviations and not self.skip_limit:
            faults.append(
                f"{at}spike_deviations={self.spike_deviations} needs {at}skip_limit, the number of updates that may be "
                "left out in a row."
            )
        return faults


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Validated):
    """When checkpoints are written and how many are kept."""

    every: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Most recent checkpoints kept."""
    keep_every: int = 0
    """Checkpoints at multiples of this step are kept for ever; 0: none."""

    def faults(self) -> list[str]:
        faults = _positive(self, "checkpoint.", "every", "keep")
        if self.keep_every < 0:
            faults.append(f"checkpoint.keep_every={self.keep_every} must not be negative.")
        return faults


@dataclasses.dataclass(frozen=True)
class LogConfig(Validated):
    """What is measured and where it goes."""

    every: int = 10
    """Steps between lines of metrics."""
    eval_every: int = 1000
    """Steps between evaluations on the held-out windows; the last step is always evaluated."""
    eval_sequences: int = 200
    """Held-out sequences in one evaluation, always the same ones: the first of the validation shards."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb_project: str = ""
    """Weights & Biases project; empty: off. Needs the `wandb` package."""
    profile_start: int = 10
    """First step that `--profile` records, counted from the first step this process runs (which compiles)."""
    profile_steps: Annotated[int, arg(aliases=("--profile",))] = 0
    """Steps that the profiler records into the run's `profile` folder; 0: off."""

    def faults(self) -> list[str]:
        faults = _positive(self, "log.", "every", "eval_every", "eval_sequences")
        if self.profile_start < 0 or self.profile_steps < 0:
            faults.append("log.profile_start and log.profile_steps must not be negative.")
        return faults


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
    steps: int = 100_001
    """Optimizer updates in all (steps 0 to steps - 1)."""
    seed: int = 5000
    """Of the initial parameters and of the data order."""
    compilation_cache: str = "~/.cache/mlra_jax/xla"
    """Folder in which XLA's compiled programs are kept between runs; empty: none."""

    @property
    def run_dir(self) -> str:
        """Folder or URL that holds the run; a leading `~`, which shells leave in `--out=~/x`, is expanded."""
        return os.path.expanduser(self.out) or f"runs/{self.name}"

    def faults(self) -> list[str]:
        faults = _positive(self, "", "steps")
        if not 0 <= self.seed < 2**32:
            faults.append(f"seed={self.seed} must be at least 0 and less than 2**32.")
        for part in (
            self.model,
            self.data,
            self.optim,
            self.mesh,
            self.checkpoint,
            self.log,
        ):
            faults += part.faults()
        return faults


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as JSON-able nested dictionaries; `from_dict` is its inverse."""
    return dataclasses.asdict(config)


def attention_from_dict(d: dict[str, Any]) -> AttentionConfig:
    """The attention configuration whose fields `d` holds.

    Raises:
      ConfigError: no attention has exactly these fields.
    """
    for cls in get_args(AttentionConfig):
        if set(d) <= {f.name for f in dataclasses.fields(cls)}:
            return cls(**d)
    raise ConfigError([f"No attention configuration has the fields {sorted(d)}."])


def from_dict(d: dict[str, Any]) -> TrainConfig:
    """The `TrainConfig` that `to_dict` wrote; fields it lacks take their defaults.

    Raises:
      ConfigError: a field is unknown, all of them listed.
    """

    faults: list[str] = []

    def build(cls: type, values: dict[str, Any], where: str) -> Any:
        parts = {
            "model": ModelConfig,
            "data": DataConfig,
            "optim": OptimConfig,
            "mesh": MeshConfig,
            "checkpoint": CheckpointConfig,
            "log": LogConfig,
        }
        known = {f.name for f in dataclasses.fields(cls)}
        kwargs = {}
        for name, value in values.items():
            if name not in known:
                faults.append(f"Unknown field {where}{name} in the stored configuration.")
            elif name == "attention":
                kwargs[name] = attention_from_dict(value)
            elif name in parts and isinstance(value, dict):
                kwargs[name] = build(parts[name], value, f"{where}{name}.")
            else:
                kwargs[name] = value
        return cls(**kwargs)

    config = build(TrainConfig, d, "")
    if faults:
        raise ConfigError(faults)
    return config
