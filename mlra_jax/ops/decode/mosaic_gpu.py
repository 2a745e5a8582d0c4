"""Decode and prefill attention on Hopper GPUs: when the Pallas Mosaic GPU kernel applies, and how it cuts the work."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from mlra_jax.ops import tuning
from mlra_jax.ops.decode.reference import Parts, Rotary
from mlra_jax.ops.hopper import ROWS, SHARED_MEMORY, check_device
from mlra_jax.ops.rotary import apply_rope
from mlra_jax.ops.shard_map_utils import unchecked


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static sizes of a call."""

    batch: int
    q_len: int
    heads: int
    """Latent or KV heads (L)."""
    rows_per_query: int
    """M."""
    widths: tuple[int, ...]
    """Of the parts of the key."""
    shared: tuple[bool, ...]
    """Which parts all heads share."""
    v_width: int
    latent: bool
    """Whether the value is the first part of the key."""
    page: int
    """Slots of a page."""
    pages: int
    row_pages: int | None
    """Entries of a row of the page table; None: contiguous."""
    branches: int = 1
    """Heads that share the queries of a part (L / G): their other queries and their outputs lie side by side."""
    rotary: bool = False
    """Whether the kernel turns the queries of the last part."""

    @property
    def rows(self) -> int:
        """Query rows of a head: T * M."""
        return self.q_len * self.rows_per_query

    @property
    def capacity(self) -> int:
        """Tokens that a row may hold."""
        return self.page * (self.row_pages or 1)

    @property
    def value_groups(self) -> int:
        """Warpgroups that share the columns of the output: 256 float32 columns fill half of one's registers."""
        return max(1, self.v_width // 256)

    @classmethod
    def of(
        cls, parts: Parts, v: jax.Array | None, page_table: jax.Array | None, *, rotary: bool = False
    ) -> Shape:
        """The sizes of a call in the token-major layout."""
        (b, t, _, m, _), keys = parts[0][0].shape, [k for _, k in parts]
        heads = (keys[0] if v is None else v).shape[1]
        return cls(
            batch=b,
            q_len=t,
            heads=heads,
            rows_per_query=m,
            widths=tuple(k.shape[-1] for k in keys),
            shared=tuple(k.shape[1] < heads for k in keys),
            v_width=(keys[0] if v is None else v).shape[-1],
            latent=v is None,
            page=keys[0].shape[2],
            pages=keys[0].shape[0],
            row_pages=None if page_table is None else page_table.shape[1],
            branches=heads // min(q.shape[2] for q, _ in parts),
            rotary=rotary,
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """How a call is cut.

    Attributes:
      n_splits: shares into which the tokens of all sequences, laid end to end, are cut for each tile of rows; their
        parts are merged after. One: each program takes a whole sequence, and there is nothing to merge.
      block: tokens that a program takes at a time: 64 or 128; a page holds a whole number of them.
      stages: blocks in flight, 2 or more.
      row_groups: warpgroups of a program, each with 64 query rows of its own, that share its blocks.
      resident: programs that a processor holds at a time. Of two, each with half of its registers and shared memory and
        a single computing warpgroup, one reads while the other starts or ends.
    """

    n_splits: int
    block: int
    stages: int
    row_groups: int = 1
    resident: int = 1

    def tiles(self, shape: Shape) -> int:
        """Tiles of query rows of a head, one for each program."""
        return -(-shape.rows // (ROWS * self.row_groups))

    def stages_output(self, shape: Shape) -> bool:
        """Whether outputs go through shared memory: final ones, unless several warpgroups hold parts of a row."""
        return self.n_splits == 1 and shape.value_groups == 1

    def shared_bytes(self, shape: Shape) -> int:
        """Bytes of shared memory of a program, at most: queries, blocks, weights, and what is small."""
        queries = 2 * self.row_groups * ROWS * sum(shape.widths)
        if self.stages_output(shape) and shape.v_width != shape.widths[0]:
            queries += 2 * self.row_groups * ROWS * shape.v_width  # for outputs; else over the queries
        block = 2 * self.block * (sum(shape.widths) + (0 if shape.latent else shape.v_width))
        weights = 2 * ROWS * self.block if shape.value_groups > 1 else 0
        rotation = 2 * self.row_groups * shape.widths[-1] ** 2 if shape.rotary else 0
        return queries + self.stages * block + weights + rotation + 2304

    def fits(self, shape: Shape) -> bool:
        """Whether pages hold whole blocks, and a processor what its programs have there."""
        if self.resident > 1 and self.row_groups * shape.value_groups > 1:
            return False
        return shape.page % self.block == 0 and self.shared_bytes(shape) <= self.shared_memory

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory that a program may have; the hardware keeps 1 KiB of each for itself."""
        return (SHARED_MEMORY + 1024) // self.resident - 1024

    @classmethod
    def heuristic(cls, shape: Shape, processors: int) -> Config:
        """A cut that fits the GPU (docs/kernels.md has the measurements behind it)."""
        row_groups = 2 if shape.rows > ROWS and shape.value_groups == 1 else 1
        tiles = shape.heads * cls(1, 64, 4, row_groups).tiles(shape)
        # A single program for each sequence spares the merge, where that keeps all processors at work.
        programs = tiles * shape.batch
        whole = 0.9 * processors <= programs <= processors or programs >= 4 * processors
        n_splits = 1 if whole else max(1, processors // tiles)
        # Shares that end where sequences of equal length do spare programs the change from one to the next.
        even = n_splits // shape.batch * shape.batch
        n_splits = even if even >= 0.95 * n_splits else n_splits
        # No more shares than it takes with the longest one as long as it is: the rest would only be merged.
        n_blocks = shape.batch * -(-shape.capacity // 64)
        n_splits = -(-n_blocks // -(-n_blocks // n_splits))
        # Long runs over many rows are bound by arithmetic: larger blocks have fewer steps between products.
        block = 128 if row_groups == 2 and shape.page % 128 == 0 and sum(shape.widths) <= 192 else 64
        stages = 3 if n_splits > 1 and row_groups == 1 and sum(shape.widths) <= 192 else 4
        config = cls(n_splits, block, stages, row_groups)
        while config.stages > 2 and config.shared_bytes(shape) > SHARED_MEMORY:
            config = dataclasses.replace(config, stages=config.stages - 1)
        return config


def find_tuned(shape: Shape, kind: str) -> Config | None:
    """What was measured to be fastest on a device kind for such a call, if it fits this one."""
    sizes = tuning.Sizes(
        heads=shape.heads,
        rows=shape.rows_per_query,
        q_len=shape.q_len,
        widths=shape.widths,
        v_width=shape.v_width,
        latent=shape.latent,
        batch=shape.batch,
        capacity=shape.capacity,
    )

    def adapt(config: Config, measured: tuning.Sizes) -> Config | None:
        # One program for each sequence fills the GPU with that very number of sequences; shares do with any.
        balanced = config.n_splits > 1 or measured.batch == shape.batch
        return config if balanced and config.fits(shape) else None

    return tuning.find("mosaic_gpu", sizes, kind, Config, adapt)


def decode_attention(
    parts: Parts,
    v: jax.Array | None,
    kv_len_BT: jax.Array,
    *,
    scale: float,
    rotary: Rotary | None = None,
    page_table: jax.Array | None = None,
    layout: str = "token_major",
    config: Config | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """See `mlra_jax.ops.decode.reference.decode_attention`; bfloat16 in and out, float32 softmax and sums.

    Args:
      parts: pairs of queries and keys; see `mlra_jax.ops.decode.reference.unabridged`.
      v: values, or None.
      kv_len_BT: how many of the leading tokens each query sees.
      scale: multiplies the scores.
      rotary: what the queries of the last part are turned by, or None.
      page_table: pages of each row, or None.
      layout: of keys and values.
      config: how the call is cut; None: as tuned for the device, or as the heuristic says.
      interpret: `plgpu.InterpretGPUParams` run the kernel on the CPU.

    Raises:
      NotImplementedError: this is no Hopper GPU, or the arguments are not what the kernel takes.
    """
    kind, processors = check_device(interpret)
    if layout != "token_major":
        raise NotImplementedError(f"the Mosaic GPU kernel reads token-major caches; this one is {layout}.")
    arrays = [x for pair in parts for x in pair] + ([] if v is None else [v])
    if not_bf16 := {str(x.dtype) for x in arrays if x.dtype != jnp.bfloat16}:
        raise NotImplementedError(f"the Mosaic GPU kernel takes bfloat16; got {', '.join(sorted(not_bf16))}.")
    # The kernel turns by one angle for a program's rows; with values this wide it has no shared memory left for it.
    turns = rotary is not None and kv_len_BT.shape[1] == 1 and parts[0][1].shape[-1] < 512
    if rotary is not None and not turns:
        *first, (q, k) = parts
        parts = [*first, (apply_rope(q[..., -k.shape[-1] :], *(x[:, :, None, None] for x in rotary)), k)]
    shape = Shape.of(parts, v, page_table, rotary=turns)
    if any(w != 32 and w % 64 for w in shape.widths) or shape.v_width not in (64, 128, 256, 512):
        raise NotImplementedError(
            "the Mosaic GPU kernel takes keys of 32 or a multiple of 64 features and values of 64, 128, 256 or 512; "
            f"got {' + '.join(map(str, shape.widths))} and {shape.v_width}."
        )
    if shape.page % 64:
        raise NotImplementedError(
            f"the Mosaic GPU kernel takes pages, or contiguous caches, of a multiple of 64 tokens; got {shape.page}."
        )
    if config is None and interpret is None:
        config = find_tuned(shape, kind)
    config = config or Config.heuristic(shape, processors)
    if config.resident > 1 and (config.resident > 2 or config.row_groups * shape.value_groups > 1):
        raise NotImplementedError(
            f"the Mosaic GPU kernel's programs share a processor by two, and with one warpgroup each; got {config}."
        )
    if (needed := config.shared_bytes(shape)) > (available := config.shared_memory):
        raise NotImplementedError(
            f"the Mosaic GPU kernel needs {needed} bytes of shared memory for these widths; there are {available}."
        )
    from mlra_jax.ops.decode.mosaic_gpu_kernel import attend

    run = functools.partial(attend, shape=shape, scale=scale, config=config, interpret=interpret)
    args = tuple(map(tuple, parts)), v, kv_len_BT, page_table, rotary if turns else None
    leaves, tree = jax.tree.flatten(args)  # None is no leaf
    return unchecked(lambda _, *leaves: run(*jax.tree.unflatten(tree, leaves)))(None, *leaves)
