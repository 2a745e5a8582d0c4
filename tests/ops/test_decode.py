"""Decode attention: the specification against NumPy, the other back ends against the specification."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from mlra_jax.ops.decode import grouped_decode_attention, latent_decode_attention, xla


def by_hand(parts, v, kv_len, scale):
    """Output and log-sum-exp, one query row at a time, in float64; sees the leading `kv_len` slots alone."""
    b, t, heads, m, _ = parts[0][0].shape
    out, lse = np.zeros((b, t, heads, m, v.shape[-1])), np.full((b, t, heads, m), -np.inf)
    for at in np.ndindex(b, t, heads, m):
        row, i, head, _ = at
        if n := kv_len[row, i]:
            keys = [(q[at], (k[row, head] if k.ndim == 4 else k[row])[:n]) for q, k in parts]
            scores = scale * sum(k.astype(np.float64) @ q for q, k in keys)
            weights = np.exp(scores - scores.max())
            lse[at] = np.log(weights.sum()) + scores.max()
            out[at] = weights / weights.sum() @ v[row, head, :n]
    return out, lse


def latent_case(seed, b, t, heads, m, c, r, s, kv_len=None):
    """Arguments of the latent op; what no query of a row sees is NaN."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    q_nope, q_rope, latent, k_rope = (
        draw(b, t, heads, m, c),
        draw(b, t, heads, m, r),
        draw(b, heads, s, c),
        draw(b, s, r),
    )
    kv_len = rng.integers(0, s + 1, (b, t)).astype(np.int32) if kv_len is None else kv_len
    unseen = np.arange(s) >= kv_len.max(axis=1)[:, None]
    latent[np.broadcast_to(unseen[:, None], latent.shape[:3])] = np.nan
    k_rope[unseen] = np.nan
    return q_nope, q_rope, latent, k_rope, kv_len


def put(*arrays):
    return [jnp.asarray(x) for x in arrays]


def check(outcome, expected, atol=1e-5):
    for ours, wanted in zip(outcome, expected, strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float32), wanted, rtol=1e-4, atol=atol)


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 99),
    b=st.integers(1, 2),
    t=st.integers(1, 3),
    heads=st.integers(1, 3),
    m=st.integers(1, 3),
    c=st.integers(1, 6),
    r=st.sampled_from([0, 2, 4]),
    s=st.integers(1, 9),
)
def test_reference_equals_the_definition_with_ragged_lengths_and_nan_in_unseen_slots(
    seed, b, t, heads, m, c, r, s
):
    args = latent_case(seed, b, t, heads, m, c, r, s)
    q_nope, q_rope, latent, k_rope, kv_len = args
    run = functools.partial(latent_decode_attention, scale=0.6, implementation="reference")
    outcome = jax.jit(run)(*put(*args))
    check(outcome, by_hand([(q_nope, latent), (q_rope, k_rope)], latent, kv_len, 0.6))


@pytest.mark.parametrize("s", [128, 129, 300, 384, 500])
def test_xla_in_blocks_equals_the_definition(monkeypatch, s):
    monkeypatch.setattr(xla, "BLOCK_ELEMENTS", 1)  # blocks of 128, the smallest
    kv_len = np.array([[0, 0], [0, min(s, 128)], [s, s // 2]], np.int32)  # row 0 sees nothing at all
    args = latent_case(s, 3, 2, 2, 2, 4, 2, s, kv_len)
    q_nope, q_rope, latent, k_rope, _ = args
    outcome = jax.jit(functools.partial(latent_decode_attention, scale=0.6, implementation="xla"))(
        *put(*args)
    )
    check(outcome, by_hand([(q_nope, latent), (q_rope, k_rope)], latent, kv_len, 0.6))


def test_xla_reads_no_block_beyond_the_longest_row(monkeypatch):
    monkeypatch.setattr(xla, "BLOCK_ELEMENTS", 1)
    specification, runs = xla.reference.decode_attention, []

    def counted(*args, **kwargs):
        jax.debug.callback(lambda: runs.append(1))
        return specification(*args, **kwargs)

    monkeypatch.setattr(xla.reference, "decode_attention", counted)
    q, kv = jnp.ones((2, 1, 1, 1, 4)), jnp.ones((2, 1, 1000, 4))
    kv_len = jnp.array([[130], [20]])
    jax.block_until_ready(grouped_decode_attention(q, kv, kv, kv_len, scale=1.0, implementation="xla"))
    jax.effects_barrier()
    assert len(runs) == 2


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_grouped_attention_equals_the_definition_with_values_of_another_width(monkeypatch, implementation):
    monkeypatch.setattr(xla, "BLOCK_ELEMENTS", 1)
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    q, k, v = draw(2, 3, 2, 4, 6), draw(2, 2, 200, 6), draw(2, 2, 200, 5)
    kv_len = np.array([[0, 1, 150], [128, 129, 200]], np.int32)
    k[0, :, 150:], v[0, :, 150:] = np.nan, np.nan
    outcome = grouped_decode_attention(*put(q, k, v, kv_len), scale=0.5, implementation=implementation)
    check(outcome, by_hand([(q, k)], v, kv_len, 0.5))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_nothing_seen_gives_zeros_and_minus_infinity(implementation):
    args = latent_case(0, 2, 2, 2, 3, 4, 2, 5)
    args[2][:], args[3][:], args[4][:] = np.nan, np.nan, 0
    out, lse = latent_decode_attention(*put(*args), scale=1.0, implementation=implementation)
    assert np.all(np.asarray(out) == 0)
    assert np.all(np.asarray(lse) == -np.inf)


def test_outputs_over_two_halves_of_the_cache_merge_to_that_over_all_of_it():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    q, k, v = draw(2, 1, 2, 3, 4), draw(2, 2, 8, 4), draw(2, 2, 8, 4)
    kv_len = jnp.array([[8], [3]])  # the second row has nothing in the second half
    run = lambda part, n: grouped_decode_attention(q, k[:, :, part], v[:, :, part], n, scale=1.0)
    halves = run(slice(0, 4), jnp.clip(kv_len, 0, 4)), run(slice(4, 8), jnp.clip(kv_len - 4, 0, 4))
    check(xla.merge(*halves[0], *halves[1]), grouped_decode_attention(q, k, v, kv_len, scale=1.0))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("sizes", [(2, 1, 4, 4), (2, 3, 4, 1), (1, 5, 1, 4)], ids=str)
def test_bfloat16_is_as_close_to_float32_as_rounding_allows(monkeypatch, implementation, sizes):
    monkeypatch.setattr(xla, "BLOCK_ELEMENTS", 1)
    q_nope, q_rope, latent, k_rope, kv_len = latent_case(1, *sizes, 16, 8, 150)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (q_nope, q_rope, latent, k_rope)]
    q_nope, q_rope, latent, k_rope = (np.asarray(x, np.float32) for x in low)
    out, lse = latent_decode_attention(*low, jnp.asarray(kv_len), scale=0.2, implementation=implementation)
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    exact, exact_lse = by_hand([(q_nope, latent), (q_rope, k_rope)], latent, kv_len, 0.2)
    np.testing.assert_allclose(
        np.asarray(out, np.float32), exact, rtol=0, atol=2 * 2**-8 * np.abs(exact).max()
    )
    np.testing.assert_allclose(lse, exact_lse, rtol=1e-5, atol=1e-5)


def test_arguments_that_do_not_belong_together_are_named():
    q_nope, q_rope, latent, k_rope, kv_len = latent_case(0, 2, 2, 2, 3, 4, 2, 5)
    wrong = {
        "q_rope": (q_nope, q_rope[:, :, :1], latent, k_rope, kv_len),
        "kv_latent": (q_nope, q_rope, latent[:, :1], k_rope, kv_len),
        "k_rope": (q_nope, q_rope, latent, k_rope[:, :3], kv_len),
        "kv_len": (q_nope, q_rope, latent, k_rope, kv_len[:, :1]),
    }
    for name, args in wrong.items():
        with pytest.raises((ValueError, TypeCheckError), match=name):
            latent_decode_attention(*put(*args), scale=1.0)
