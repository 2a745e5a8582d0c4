"""Decode attention on Ampere, Ada and Hopper GPUs in Triton, called through jax-triton.

Flash decoding: the tokens of each row are split over programs, each leaves an output and a log-sum-exp, and a second
kernel merges those. Optional: needs `pip install 'mlra_jax[triton]'`, which is imported where a kernel is launched.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mlra_jax.ops import tuning
from mlra_jax.ops.decode.reference import Parts, unabridged
from mlra_jax.ops.device import Chip, current_device, find_chip
from mlra_jax.ops.libraries import declining, name, version

LIBRARIES = ("jax-triton", "triton", "jax")
REMEDY = "pip install --upgrade 'mlra_jax[triton]'"

MAX_SPLITS = 256
"""Most splits of a row; the kernel that merges them takes them all at once."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiling of the kernel. Sizes of blocks are powers of two from 16."""

    block_rows: int
    """Query rows of one program."""
    block_tokens: int
    """Tokens that it takes at a time; a page holds a whole number of them."""
    splits: int
    """Programs among which the tokens of a row are divided."""
    warps: int
    stages: int
    """Blocks of tokens in flight, each of block_tokens x (key + value) widths of shared memory."""


def heuristic_config(
    chip: Chip,
    *,
    programs: int,
    rows: int,
    key_width: int,
    value_width: int,
    tokens: int,
    page: int | None,
    latent: bool,
) -> Config:
    """A tiling that fits the chip.

    Args:
      chip: that it is for.
      programs: (batch row, head) pairs.
      rows: query rows of each.
      key_width: of all parts together.
      value_width: of the output.
      tokens: that a row may hold.
      page: slots of a page, or None.
      latent: the keys are the values.
    """
    # Scores and sums of a tile live in registers, its queries in shared memory: the wider a row, the fewer rows.
    width = value_width + max(key_width, value_width)
    most_rows = 64 if width <= 384 else 32 if width <= 640 else 16
    block_rows = max(16, min(most_rows, _power_of_two(rows)))
    block_tokens = 64 if width <= 640 else 32

    def stages_for(resident: int) -> int:
        """Most blocks in flight that leave room for so many programs on a processor, which keeps 1 KiB of each."""
        queries = block_rows * (2 * key_width + 2 * block_tokens)  # and weights
        block = 2 * block_tokens * (key_width if latent else key_width + value_width)
        left = (chip.shared_bytes + 1024) // resident - 1024 - queries
        return min(4, left // block + (chip.capability < 90))

    while block_tokens > 16 and (stages_for(1) < 2 or (page is not None and page % block_tokens)):
        block_tokens //= 2
    # Before Hopper one program's softmax hides behind another's products.
    resident = 2 if chip.capability < 90 and stages_for(2) >= 2 else 1
    stages = max(1, stages_for(resident))

    programs *= math.ceil(rows / block_rows)
    blocks = math.ceil(tokens / block_tokens)
    slots = chip.processors * resident

    def time(splits: int) -> float:
        """Blocks that the busiest slot takes; starting a program, and merging its output, cost like some more."""
        waves = math.ceil(programs * splits / slots)
        return waves * (math.ceil(blocks / splits) + 4) + splits / 32

    splits = min(range(1, max(1, min(MAX_SPLITS, blocks // 4)) + 1), key=time)
    return Config(block_rows, block_tokens, splits, warps=4, stages=stages)


def heuristic_for(sizes: tuning.Sizes, page: int | None, chip: Chip) -> Config:
    """`heuristic_config` of a call."""
    return heuristic_config(
        chip,
        programs=sizes.batch * sizes.heads,
        rows=sizes.q_len * sizes.rows,
        key_width=sum(sizes.widths),
        value_width=sizes.v_width,
        tokens=sizes.capacity,
        page=page,
        latent=sizes.latent,
    )


def find_tuned(sizes: tuning.Sizes, page: int | None, kind: str) -> Config | None:
    """What was measured to be fastest on a device kind for such a call, if its blocks fit the pages."""

    def adapt(config: Config, measured: tuning.Sizes) -> Config | None:
        if page is not None and page % config.block_tokens:
            return None
        # As many programs as were measured, or a few less: one more than fit would be another wave.
        splits = min(MAX_SPLITS, max(1, config.splits * measured.batch // sizes.batch))
        return dataclasses.replace(config, splits=splits)

    return tuning.find("triton", sizes, kind, Config, adapt)


@unabridged
def decode_attention(
    parts: Parts,
    v: jax.Array | None,
    kv_len_BT: jax.Array,
    *,
    scale: float,
    page_table: jax.Array | None = None,
    layout: str = "token_major",
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `mlra_jax.ops.decode.reference.decode_attention`; `config`: None for the tuned, or the heuristic's."""
    chip, kind = _check(parts, v, page_table, layout)
    (q, k), *rest = parts
    q_rope, k_rope = rest[0] if rest else (q, k)
    b, t, heads, m, c = q.shape
    r = q_rope.shape[-1] if rest else 0
    slots = k.shape[2]
    width = c if v is None else v.shape[-1]
    call = tuning.Sizes(
        heads=heads,
        rows=m,
        q_len=t,
        widths=(c, r) if r else (c,),
        v_width=width,
        latent=v is None,
        batch=b,
        capacity=slots if page_table is None else slots * page_table.shape[1],
    )
    page = None if page_table is None else slots
    config = config or find_tuned(call, page, kind) or heuristic_for(call, page, chip)
    if page_table is not None and slots % config.block_tokens:
        raise NotImplementedError(
            f"Its blocks of {config.block_tokens} tokens do not fit whole into pages of {slots}; use pages of a "
            "multiple of 16 tokens and a block that divides them."
        )
    kernels = _import_kernels()
    tiles = math.ceil(t * m / config.block_rows)
    out = (
        jax.ShapeDtypeStruct((b, t, heads, m, width), q.dtype),
        jax.ShapeDtypeStruct((b, t, heads, m), jnp.float32),
    )
    split_out = out
    if config.splits > 1:
        split_out = (
            jax.ShapeDtypeStruct((b, heads, config.splits, t * m, width), jnp.float32),
            jax.ShapeDtypeStruct((b, heads, config.splits, t * m), jnp.float32),
        )
    sizes = {"T": t, "L": heads, "M": m, "V": width, "SPLITS": config.splits}
    parts_of_output = _launch(
        kernels.split_kernel,
        (
            q,
            q_rope,
            k,
            k_rope,
            k if v is None else v,
            kv_len_BT,
            kv_len_BT if page_table is None else page_table,
        ),
        split_out,
        grid=(tiles * config.splits, heads, b),
        capability=chip.capability,
        warps=config.warps,
        stages=config.stages,
        C=c,
        R=r,
        S=slots,
        N=0 if page_table is None else page_table.shape[1],
        ROPE_HEADS=k_rope.shape[1],
        LATENT=v is None,
        SCALE=float(scale) * math.log2(math.e),
        TILES=tiles,
        BLOCK_ROWS=config.block_rows,
        BLOCK_TOKENS=config.block_tokens,
        **sizes,
    )
    if config.splits == 1:
        return parts_of_output
    columns = min(
        width, 8192 // _power_of_two(config.splits)
    )  # so that a program holds them all in registers
    return _launch(
        kernels.combine_kernel,
        parts_of_output,
        out,
        grid=(t * m * (width // columns), heads, b),
        capability=chip.capability,
        warps=4,
        stages=1,
        SPLITS_2=_power_of_two(config.splits),
        COLUMNS=columns,
        **sizes,
    )


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _check(parts: Parts, v: jax.Array | None, page_table: jax.Array | None, layout: str) -> tuple[Chip, str]:
    """The chip and its name in JAX, where the kernel takes the call."""
    platform, kind = current_device()
    if platform != "gpu":
        raise NotImplementedError(f"It is for NVIDIA GPUs, not for {kind}.")
    chip = find_chip(kind)
    if chip is None:
        raise NotImplementedError(f"It does not know {kind}; add it to mlra_jax.ops.device.CHIPS.")
    if layout != "token_major":
        raise NotImplementedError(f"It reads token_major caches, not {layout}.")
    arrays = [x for part in parts for x in part] + ([] if v is None else [v])
    types = {x.dtype for x in arrays}
    if len(types) > 1 or types - {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}:
        names = ", ".join(sorted(map(str, types)))
        raise NotImplementedError(f"It takes bfloat16 or float16 for queries and cache alike, not {names}.")
    widths = [x.shape[-1] for x in arrays]
    if any(w < 16 or w & (w - 1) or w > 512 for w in widths):
        raise NotImplementedError(f"Its widths are powers of two from 16 to 512; got {sorted(set(widths))}.")
    if page_table is not None and parts[0][1].shape[2] % 16:
        raise NotImplementedError(f"Its pages hold a multiple of 16 tokens; got {parts[0][1].shape[2]}.")
    return chip, kind


def _import_kernels() -> Any:
    """The kernels, where jax-triton, Triton and JAX fit each other: else they would fail when a program is compiled."""
    bridge, triton = version("jax-triton"), version("triton")
    installed = name(*LIBRARIES)
    if bridge is None or triton is None:
        raise NotImplementedError(f"It needs jax-triton and Triton; there are {installed}: {REMEDY}.")
    if bridge < (0, 3) or triton < (3, 6):
        raise NotImplementedError(
            f"It needs jax-triton 0.3 and Triton 3.6 or later; these are {installed}: {REMEDY}."
        )
    if bridge < (0, 4) and triton >= (3, 7):
        raise NotImplementedError(
            f"jax-triton before 0.4 needs Triton 3.6; these are {installed}: pip install 'triton>=3.6,<3.7'."
        )
    if bridge >= (0, 4) and triton < (3, 7):
        raise NotImplementedError(
            f"jax-triton from 0.4 on needs Triton 3.7 or later; these are {installed}: pip install 'triton>=3.7'."
        )
    if bridge <= (0, 4, 1) and jax.__version_info__ >= (0, 12):
        raise NotImplementedError(
            f"jax-triton up to 0.4.1 needs JAX before 0.12; these are {installed}: pip install 'jax[cuda13]<0.12'."
        )
    with declining(*LIBRARIES, remedy=REMEDY):
        import jax_triton  # noqa: F401

        from mlra_jax.ops.decode import triton_kernels
    try:
        from jaxlib.gpu_triton import TritonKernel  # noqa: F401
    except ImportError as e:
        raise NotImplementedError(
            "It needs JAX's CUDA plugin, of the version of jaxlib; these are "
            f"{name('jaxlib', 'jax-cuda13-plugin')}: pip install --upgrade 'mlra_jax[cuda]'."
        ) from e
    return triton_kernels


def _launch(
    kernel: Any,
    inputs: Sequence[jax.Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    grid: tuple[int, int, int],
    capability: int,
    warps: int,
    stages: int,
    **constants: Any,
) -> Any:
    """Calls a kernel through jax-triton 0.3 or 0.4."""
    import jax_triton

    keywords: dict[str, Any] = {"out_shape": tuple(outputs)}
    if jax_triton.__version_info__ >= (0, 4):
        # Newer Tritons emit PTX newer than CUDA 13.0, the oldest that JAX comes with, understands.
        options = (("ptx_version", 87), ("enable_fp_fusion", True))
        keywords = {"out_type": tuple(outputs), "backend_options": dict(options)}
    with declining(*LIBRARIES, remedy=REMEDY):
        return jax_triton.triton_call(
            *inputs,
            kernel=kernel,
            grid=grid,
            num_warps=warps,
            num_stages=stages,
            compute_capability=capability,
            **keywords,
            **constants,
        )
