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
class Joined:
    """Arguments of `causal_attention`: queries [B, T, N, H], keys [B, S, K, H] and values [B, S, K, V], all whole."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    scale: float
    q_start: jax.Array | int

    def require_gpu_library(self) -> None:
        """Declines what GPU libraries do not take: other types than half precision, other queries than keys.

        Raises:
          NotImplementedError: such arguments.
        """
        if self.q.dtype not in (jnp.bfloat16, jnp.float16):
            raise NotImplementedError(f"It takes bfloat16 and float16; got {self.q.dtype}.")
        first = isinstance(self.q_start, int | np.integer) and self.q_start == 0
        if not first or self.q.shape[1] != self.k.shape[1]:
            raise NotImplementedError("It takes as many queries as keys, from position 0 on.")


@dataclasses.dataclass(frozen=True)
class Joins(BackEnd):
    """A back end of `Joined` arguments as one of parts."""

    back_end: BackEnd

    def __call__(
        self, parts: Parts, v: jax.Array | None, *, scale: float, q_start: jax.Array | int
    ) -> jax.Array:
        """Joins the parts and calls the back end."""
        args = Joined(*join(parts, v), scale, q_start)
        out = self.back_end(args)
        return out.reshape(*out.shape[:2], args.k.shape[2], -1, out.shape[-1])
