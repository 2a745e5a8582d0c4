"""When the decode kernel for Hopper GPUs applies."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from mlra_jax.ops.columns import Columns
from mlra_jax.ops.decode.back_end import DecodeKernel
from mlra_jax.ops.decode.mosaic_gpu.config import Config
from mlra_jax.ops.decode.mosaic_gpu.kernel import Static, attend
from mlra_jax.ops.decode.reference import Arguments
from mlra_jax.ops.decode.shape import Shape
from mlra_jax.ops.hopper import SHARED_MEMORY, HopperKernel, require_bfloat16
from mlra_jax.ops.shard_map_utils import unchecked


class MosaicGPU(HopperKernel[Shape, Config], DecodeKernel[Config]):
    """bfloat16 in and out, float32 softmax and sums."""

    config_type = Config

    def check(self, args: Arguments) -> Shape:
        """The sizes of a call; it rotates the queries of a single token, if shared memory has room for that."""
        self.target()
        if args.layout != "token_major":
            raise NotImplementedError(
                f"the Mosaic GPU kernel reads token-major caches; this one is {args.layout}."
            )
        require_bfloat16((*(q for q, _ in args.parts), *args.cached))
        shape = Shape.of(args)
        if shape.q_len > 1 or shape.widths[0] >= 512:
            shape = dataclasses.replace(shape, rotary=False)
        if any(w != 32 and w % 64 for w in shape.widths) or shape.v_width not in (64, 128, 256, 512):
            raise NotImplementedError(
                "the Mosaic GPU kernel takes keys of 32 or a multiple of 64 features and values of 64, 128, 256 or "
                f"512; got {' + '.join(map(str, shape.widths))} and {shape.v_width}."
            )
        small = shape.row_pages is not None and shape.page_size in (16, 32)
        if shape.page_size % 64 and not small:
            raise NotImplementedError(
                "the Mosaic GPU kernel takes pages of 16, 32 or a multiple of 64 tokens, and contiguous caches of a "
                f"multiple of 64; got {shape.page_size}."
            )
        for x in args.cached:
            if isinstance(x, Columns):
                tile = min(64, x.width)
                if not x.evenly_spaced or any(start % tile for start in x.starts):
                    raise NotImplementedError(
                        "the Mosaic GPU kernel takes columns that start at equal distances and multiples of "
                        f"{tile}; got {list(x.starts)}."
                    )
                if x.token_width % tile:  # copies of tiles want whole ones
                    raise NotImplementedError(
                        f"the Mosaic GPU kernel takes pools of a multiple of {tile} columns; got {x.token_width}."
                    )
        return shape

    def adapt(self, config: Config, measured: Mapping[str, Any], shape: Shape) -> Config | None:
        """The configuration, if it fits; one program for each sequence suits only the batch that was measured."""
        balanced = config.n_splits > 1 or measured["batch"] == shape.batch
        return config if balanced and config.fits(shape) else None

    def run(self, shape: Shape, config: Config, args: Arguments) -> tuple[jax.Array, jax.Array]:
        """Runs the kernels.

        Raises:
          NotImplementedError: the configuration takes too much shared memory.
        """
        if (needed := config.shared_bytes(shape)) > SHARED_MEMORY:
            raise NotImplementedError(
                f"the Mosaic GPU kernel needs {needed} bytes of shared memory for these widths; there are "
                f"{SHARED_MEMORY}."
            )
        args = args if shape.rotary else args.rotated()
        arrays, tree = jax.tree.flatten(
            (tuple(map(tuple, args.parts)), args.v, args.kv_len, args.page_table, args.rotary)
        )

        static = Static(shape, config, args.scale, self.interpret)
        call = lambda _, *arrays: attend(static, *jax.tree.unflatten(tree, arrays))
        return unchecked(call)(None, *arrays)
