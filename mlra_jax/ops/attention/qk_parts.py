"""Keys in parts, some shared by several heads; scores are the sum over parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mlra_jax.ops.back_end import BackEnd

Parts = Sequence[tuple[jax.Array, jax.Array]]
"""Queries [B, T, heads, M, W] with keys [B, S, heads, W]; scores are their sum.

Of L heads, head l reads entry l mod `heads` of a part: a part's queries or keys may have fewer than L.
"""


def heads_of(parts: Parts, v_BSLV: jax.Array | None) -> int:
    """L, the number of KV heads: that of the values, which are the keys of the first part if `v_BSLV` is None."""
    return (parts[0][1] if v_BSLV is None else v_BSLV).shape[2]


def join(parts: Parts, v_BSLV: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same as queries [B, T, L * M, H], keys [B, S, L, H] and values [B, S, L, V], with H the sum of the widths."""
    heads = heads_of(parts, v_BSLV)
    whole = lambda x: jnp.tile(x, (1, 1, heads // x.shape[2], *[1] * (x.ndim - 3)))
    q_BTLMH = jnp.concatenate([whole(q) for q, _ in parts], axis=-1)
    k_BSLH = jnp.concatenate([whole(k) for _, k in parts], axis=-1)
    b, t, _, m, h = q_BTLMH.shape
    return q_BTLMH.reshape(b, t, heads * m, h), k_BSLH, parts[0][1] if v_BSLV is None else v_BSLV


@dataclasses.dataclass(frozen=True)
class Joined(BackEnd):
    """A back end of joined queries, keys and values as one of parts."""

    back_end: BackEnd

    def __call__(
        self, parts: Parts, v: jax.Array | None, *, scale: float, q_start: jax.Array | int
    ) -> jax.Array:
        """Joins the parts and calls the back end."""
        q, k, values = join(parts, v)
        out = self.back_end(q, k, values, scale=scale, q_start=q_start)
        return out.reshape(*out.shape[:2], k.shape[2], -1, out.shape[-1])


def check_square(q_BTNH: jax.Array, k_BSKH: jax.Array, q_start: jax.Array | int) -> None:
    """Declines what GPU libraries do not take: other types than half precision, other queries than keys.

    Raises:
      NotImplementedError: such arguments.
    """
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"It takes bfloat16 and float16; got {q_BTNH.dtype}.")
    if not (isinstance(q_start, int | np.integer) and q_start == 0) or q_BTNH.shape[1] != k_BSKH.shape[1]:
        raise NotImplementedError("It takes as many queries as keys, from position 0 on.")
