"""The end of every attention: the gate, the output projection, and the exchange between devices when decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from mlra_jax.config import ModelConfig
from mlra_jax.models.attention.slots import Slots
from mlra_jax.models.layers import (
    DecodeLeaves,
    Layout,
    Relayout,
    decode_product,
    normal,
    output_init,
    parameter,
    product,
    weight,
)
from mlra_jax.sharding import AxisRules, Names

if TYPE_CHECKING:
    from mlra_jax.decoding.cache import LayerCache


class Output(nnx.Module):
    """W_o (gate * y), with gate = sigmoid(W_g x) or nothing.

    Args:
      config: of the model.
      d_value: width of a head's output (H).
      rngs: for the initial parameters.
      rules: table of logical axis names. Without a mesh nothing is split.
      layout: `train` has w_o [N, H, D] and w_gate [D, N, H], `decode` [D, N, H] and [N, H, D].
    """

    def __init__(
        self, config: ModelConfig, d_value: int, *, rngs: nnx.Rngs, rules: AxisRules, layout: Layout = "train"
    ):
        d, n, dtype = config.d_model, config.n_heads, config.param_dtype
        self.rules, self.layout = rules, layout
        self.compute_dtype = jnp.dtype(config.compute_dtype)
        out: tuple[tuple[int, ...], Names] = (n, d_value, d), ("heads", None, "embed")
        gate: tuple[tuple[int, ...], Names] = (d, n, d_value), ("embed", "heads", None)
        if layout == "decode":
            out, gate = gate, out
        self.w_o = parameter(rngs, rules, *out, output_init(config), dtype)
        self.w_gate = parameter(rngs, rules, *gate, normal(config), dtype) if config.gated_attention else None

    @staticmethod
    def decode_leaves(config: ModelConfig) -> DecodeLeaves:
        """What decoding keeps in another way."""
        leaves = {"w_o": Relayout(("w_o",), lambda w_NHD: w_NHD.transpose(2, 0, 1))}
        if config.gated_attention:
            leaves["w_gate"] = Relayout(("w_gate",), lambda w_DNH: w_DNH.transpose(1, 2, 0))
        return leaves

    def gate(self, x_BTD: jax.Array) -> jax.Array | None:
        """sigmoid(W_g x) as [B, T, N, H], or None without a gate."""
        if self.w_gate is None:
            return None
        equation = "BTD,DNH->BTNH" if self.layout == "train" else "BTD,NHD->BTNH"
        names = ("batch", "length", "heads", None)
        return jax.nn.sigmoid(product(self.rules, equation, x_BTD, self.w_gate, out=names))

    def __call__(self, x_BTD: jax.Array, y_BTNH: jax.Array) -> jax.Array:
        """The block's output [B, T, D] from its input and the heads' output, both in the compute type."""
        gate_BTNH = self.gate(x_BTD)
        if gate_BTNH is not None:
            y_BTNH = y_BTNH * gate_BTNH
        out = ("batch", "length", None)
        # N is split over `tensor`: the product over it all-reduces.
        if self.layout == "decode":
            w_DNH = weight(self.rules, self.w_o, y_BTNH.dtype)
            return decode_product(self.rules, y_BTNH, w_DNH, out, summed=("heads", None))
        return product(self.rules, "BTNH,NHD->BTD", y_BTNH, self.w_o, out=out)

    def over_slots(
        self,
        x_BTD: jax.Array,
        slots: Slots,
        attend: Callable[..., jax.Array],
        cache: LayerCache,
        inputs: Sequence[tuple[jax.Array, Names]],
        start_B: jax.Array,
        n_new_B: jax.Array,
        scale: float = 1.0,
    ) -> jax.Array:
        """Cached attention on every device for its own slots, and the block's output from what they give.

        Args:
          x_BTD: the input of the block, in the compute type.
          slots: how query heads meet cached heads.
          attend: runs inside `shard_map`: of the cache, `start_B`, `n_new_B` and the inputs, each device's own, the
            outputs y [B, T, U, M / r, H] of its slots.
          cache: of this layer, the new tokens in it.
          inputs: arrays, with the logical names of their axes.
          start_B: tokens in the cache before the new ones.
          n_new_B: new tokens of each row.
          scale: multiplies y, once it is summed over slots.

        Returns:
          [B, T, D] in the compute type.
        """
        projected = slots.projected
        gate = self.gate(x_BTD) if projected else None
        w_o = weight(self.rules, self.w_o, self.compute_dtype) if projected else None

        def on_device(
            cache: LayerCache,
            start: jax.Array,
            n_new: jax.Array,
            inputs: Sequence[jax.Array],
            gate: jax.Array | None,
            w_o: jax.Array | None,
        ) -> jax.Array:
            return self.from_slots(slots, attend(cache, start, n_new, *inputs), gate, w_o, scale)

        arrays, names = zip(*inputs, strict=True)
        gate_names = None if gate is None else ("batch", None, None, None)
        w_o_names = None if w_o is None else (None, None, None)
        y_names = ("batch", None, None) if projected else ("batch", None, "heads", None)
        in_names = (cache.specs(), ("batch",), ("batch",), names, gate_names, w_o_names)
        y = self.rules.shard_map(on_device, in_names, y_names)(cache, start_B, n_new_B, arrays, gate, w_o)
        with jax.named_scope("output"):
            return y if projected else self(x_BTD, y)

    def from_slots(
        self,
        slots: Slots,
        y_BTUMH: jax.Array,
        gate_BTNH: jax.Array | None,
        w_DNH: jax.Array | None,
        scale: float,
    ) -> jax.Array:
        """Inside `shard_map`: sums what the local slots give, over slots and devices.

        With the query heads split, the result is this device's part of y [B, T, N, H]: nothing moves if the slots are
        aligned, else it is a reduce-scatter, and `__call__` goes on from there. With the query heads whole
        (`slots.projected`), the gate and W_o are applied first, and the one all-reduce gives the output [B, T, D].
        """
        y_BTNH = slots.scatter(y_BTUMH)
        if not slots.projected:
            if not slots.aligned:
                y_BTNH = self.rules.psum_scatter(y_BTNH, "heads", axis=2)
            return y_BTNH.astype(self.compute_dtype) * scale
        # In this order the cast belongs to the product before, and the scale to the one after.
        y_BTNH = y_BTNH.astype(self.compute_dtype) * scale
        if gate_BTNH is not None:
            y_BTNH = y_BTNH * gate_BTNH
        assert w_DNH is not None
        out_BTD = jnp.einsum("BTNH,DNH->BTD", y_BTNH, w_DNH, preferred_element_type=jnp.float32)
        return self.rules.psum(out_BTD, "latent_slots").astype(self.compute_dtype)
