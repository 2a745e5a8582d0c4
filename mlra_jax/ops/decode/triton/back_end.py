"""When the Triton kernels apply, and how jax-triton, an optional dependency, launches them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mlra_jax.execution.accelerators import Accelerator
from mlra_jax.ops.columns import decline_columns
from mlra_jax.ops.decode.back_end import DecodeKernel
from mlra_jax.ops.decode.reference import Arguments
from mlra_jax.ops.decode.shape import Shape
from mlra_jax.ops.decode.triton.config import MAX_SPLITS, Config, power_of_two
from mlra_jax.ops.device import require_ampere
from mlra_jax.ops.libraries import declining, name, version

LIBRARIES = ("jax-triton", "triton", "jax")
REMEDY = "pip install --upgrade 'mlra_jax[triton]'"


class Triton(DecodeKernel[Config]):
    """bfloat16 or float16 in and out, float32 softmax and sums; there is no interpreter for it here."""

    name: ClassVar[str] = "triton"
    config_type = Config

    def check(self, args: Arguments) -> Shape:
        """The sizes of a call."""
        self.target()
        if args.layout != "token_major":
            raise NotImplementedError(f"It reads token_major caches, not {args.layout}.")
        decline_columns(args.cached, "It reads")
        types = {x.dtype for x in (*(q for q, _ in args.parts), *args.cached)}
        if len(types) > 1 or types - {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}:
            names = ", ".join(sorted(map(str, types)))
            raise NotImplementedError(
                f"It takes bfloat16 or float16 for queries and cache alike, not {names}."
            )
        shape = Shape.of(args)
        widths = {*shape.widths, shape.v_width}
        if any(w < 16 or w & (w - 1) or w > 512 for w in widths):
            raise NotImplementedError(f"Its widths are powers of two from 16 to 512; got {sorted(widths)}.")
        if shape.row_pages is not None and shape.page_size % 16:
            raise NotImplementedError(f"Its pages hold a multiple of 16 tokens; got {shape.page_size}.")
        return shape

    def target(self) -> Accelerator:
        """The GPU that is compiled for."""
        return require_ampere()[1]

    def adapt(self, config: Config, measured: Mapping[str, Any], shape: Shape) -> Config | None:
        """The configuration, if its blocks fit the pages, with as many programs as were measured, or a few less.

        One more than fit on the GPU would be another wave.
        """
        if not Config.holds_whole_blocks(shape, config.block_tokens):
            return None
        splits = min(MAX_SPLITS, max(1, config.splits * measured["batch"] // shape.batch))
        return dataclasses.replace(config, splits=splits)

    def run(self, shape: Shape, config: Config, args: Arguments) -> tuple[jax.Array, jax.Array]:
        """Launches the kernels.

        Raises:
          NotImplementedError: libraries do not fit each other, or blocks do not fit the pages.
        """
        if not Config.holds_whole_blocks(shape, config.block_tokens):
            raise NotImplementedError(
                f"Its blocks of {config.block_tokens} tokens do not fit whole into pages of {shape.page_size}; use "
                "pages of a multiple of 16 tokens and a block that divides them."
            )
        kernels = _import_kernels()
        args, capability = args.expanded(), self.target().capability
        (q, k), *rest = args.parts
        q_rope, k_rope = rest[0] if rest else (q, k)
        b, t, heads, m, c = q.shape
        width = shape.v_width
        tiles = math.ceil(shape.rows / config.block_rows)
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
        partial = _launch(
            kernels.split_kernel,
            (
                q,
                q_rope,
                k,
                k_rope,
                k if args.v is None else args.v,
                args.kv_len,
                args.kv_len if args.page_table is None else args.page_table,
            ),
            split_out,
            grid=(tiles * config.splits, heads, b),
            capability=capability,
            warps=config.warps,
            stages=config.stages,
            C=c,
            R=q_rope.shape[-1] if rest else 0,
            S=shape.page_size,
            N=shape.row_pages or 0,
            ROPE_HEADS=k_rope.shape[1],
            LATENT=shape.latent,
            SCALE=float(args.scale) * math.log2(math.e),
            TILES=tiles,
            BLOCK_ROWS=config.block_rows,
            BLOCK_TOKENS=config.block_tokens,
            **sizes,
        )
        if config.splits == 1:
            return partial
        columns = min(
            width, 8192 // power_of_two(config.splits)
        )  # so that a program holds them all in registers
        return _launch(
            kernels.combine_kernel,
            partial,
            out,
            grid=(t * m * (width // columns), heads, b),
            capability=capability,
            warps=4,
            stages=1,
            SPLITS_2=power_of_two(config.splits),
            COLUMNS=columns,
            **sizes,
        )


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

        from mlra_jax.ops.decode.triton import kernels
    try:
        from jaxlib.gpu_triton import TritonKernel  # noqa: F401
    except ImportError as e:
        raise NotImplementedError(
            "It needs JAX's CUDA plugin, of the version of jaxlib; these are "
            f"{name('jaxlib', 'jax-cuda13-plugin')}: pip install --upgrade 'mlra_jax[cuda]'."
        ) from e
    return kernels


def _launch(
    kernel: Any,
    inputs: Sequence[Any],
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
