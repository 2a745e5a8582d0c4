"""The end of every attention: the gate, the output projection, and the exchange between devices when decoding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from mlra_jax.attention.head_shards import HeadShards
from mlra_jax.config import ModelConfig
from mlra_jax.model.layers import (
    DecodeLeaves,
    Layout,
    Relayout,
    WithLayout,
    decode_product,
    normal,
    output_init,
    parameter,
    product,
    weight,
)
from mlra_jax.sharding import AxisRules, Names


class Output(WithLayout):
    """W_o (gate * y), with gate = sigmoid(W_g x) or nothing.

    When decoding, each device has the outputs of its KV-head shards, and devices sum them in one of two ways. With the
    query heads split, `sum_shards` leaves each device with y of its own heads (by a reduce-scatter, or without moving
    anything if its shards serve exactly these heads), and `finish` applies the gate and W_o, whose product is
    all-reduced. With the query heads whole (`HeadShards.projected`), `sum_shards` applies gate and W_o to each device's
    summands, and one all-reduce ends the layer.

    Args:
      config: the model's configuration.
      d_value: width of a head's output (H).
      rngs: for the initial parameters.
      rules: the table of logical axis names; without a mesh nothing is split.
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
        self.w_o = parameter(rngs, rules, *out, output_init(config), dtype, layout)
        gated = config.gated_attention
        self.w_gate = parameter(rngs, rules, *gate, normal(config), dtype, layout) if gated else None

    @staticmethod
    def decode_leaves(config: ModelConfig) -> DecodeLeaves:
        """How the decode layout makes the parameters that differ from the training layout's."""
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

    def __call__(self, x_BTD: jax.Array, y_BTNH: jax.Array, *, reduce: bool = True) -> jax.Array:
        """The block's output [B, T, D] from its input and the heads' output, both in the compute type.

        In the decode layout without `reduce`: each device's part of it (`decode_product`).
        """
        gate_BTNH = self.gate(x_BTD)
        if gate_BTNH is not None:
            y_BTNH = y_BTNH * gate_BTNH
        out = ("batch", "length", None)
        # N is split over `tensor`: the product over it all-reduces.
        if self.layout == "decode":
            w_DNH = weight(self.rules, self.w_o, y_BTNH.dtype)
            return decode_product(self.rules, y_BTNH, w_DNH, out, summed=("heads", None), reduce=reduce)
        return product(self.rules, "BTNH,NHD->BTD", y_BTNH, self.w_o, out=out)

    def shard_inputs(self, x_BTD: jax.Array, shards: HeadShards) -> tuple[jax.Array | None, jax.Array | None]:
        """The inputs of `sum_shards` on each device: the gate [B, T, N, H] and W_o [D, N, H], or None."""
        if not shards.projected:
            return None, None
        return self.gate(x_BTD), weight(self.rules, self.w_o, self.compute_dtype)

    def shard_input_names(self, shards: HeadShards) -> tuple[Names | None, Names | None]:
        """Logical axes of `shard_inputs`."""
        gated = self.w_gate is not None and shards.projected
        return ("batch", None, None, None) if gated else None, (None,) * 3 if shards.projected else None

    def shard_output_names(self, shards: HeadShards, reduce: bool = True) -> Names:
        """Logical axes of the result of `sum_shards`."""
        part = () if reduce else ("kv_head_shards",)
        return (*part, "batch", None, None) if shards.projected else ("batch", None, "heads", None)

    def sum_shards(
        self,
        shards: HeadShards,
        y_BTUMH: jax.Array,
        gate_BTNH: jax.Array | None,
        w_DNH: jax.Array | None,
        scale: float = 1.0,
        reduce: bool = True,
    ) -> jax.Array:
        """Inside `shard_map`: sums the outputs of this device's KV-head shards, over shards and devices.

        Args:
          shards: the assignment of query heads to cached heads.
          y_BTUMH: outputs of the local shards' query heads, [B, T, U, M / r, H].
          gate_BTNH: from `shard_inputs`.
          w_DNH: from `shard_inputs`.
          scale: multiplies y after it is summed over shards.
          reduce: whether the devices' products with W_o are summed; if not, each returns its own, [1, B, T, D] in
            float32.
        """
        y_BTNH = shards.scatter(y_BTUMH)
        if not shards.projected:
            if shards.scattered:
                y_BTNH = self.rules.psum_scatter(y_BTNH, "heads", axis=2)
            elif not shards.aligned:
                y_BTNH = self.rules.own_part(self.rules.psum(y_BTNH, "kv_head_shards"), "heads", axis=2)
            return y_BTNH.astype(self.compute_dtype) * scale
        # In this order XLA fuses the cast with the product before, and the scale with the one after.
        y_BTNH = y_BTNH.astype(self.compute_dtype) * scale
        if gate_BTNH is not None:
            y_BTNH = y_BTNH * gate_BTNH
        assert w_DNH is not None
        out_BTD = jnp.einsum("BTNH,DNH->BTD", y_BTNH, w_DNH, preferred_element_type=jnp.float32)
        if not reduce:
            return out_BTD[None]
        return self.rules.psum(out_BTD, "kv_head_shards").astype(self.compute_dtype)

    def finish(
        self, x_BTD: jax.Array, summed: jax.Array, shards: HeadShards, reduce: bool = True
    ) -> jax.Array:
        """The block's output [B, T, D] from its input and the result of `sum_shards`; or each device's part of it."""
        with jax.named_scope("output"):
            return summed if shards.projected else self(x_BTD, summed, reduce=reduce)
