"""Decode attention: the specification against NumPy, the other back ends against the specification."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_jax.ops.decode import (
    factored_decode_attention,
    grouped_decode_attention,
    latent_decode_attention,
    xla,
)
from mlra_jax.ops.decode.arg_specs import BENCHMARKS, ArgSpec, abstract_call
from tests.ops.common import EDGES, POOLS, in_arrays, kv_lens, make_call, share_queries

EVERYWHERE = ("reference", "xla")


def definition(call):
    """Output and log-sum-exp, one query row at a time, in float64; reads the tokens that the row sees alone."""
    *arrays, kv_len, table = (None if x is None else np.asarray(x) for x in in_arrays(call).args)
    arrays = [x.astype(np.float64) for x in arrays]

    def tokens(cache, row, n):
        """The leading n tokens of a row [L or none, n, W], wherever they lie."""
        cache = cache.swapaxes(-1, -2) if call.static["layout"] == "feature_major" else cache
        if table is None:
            return cache[row][..., :n, :]
        size = cache.shape[-2]
        return np.stack([cache[table[row, i // size]][..., i % size, :] for i in range(n)], axis=-2)

    if call.op is latent_decode_attention:
        q_nope, q_rope, latent, k_rope = arrays
        parts, v = [(q_nope, latent), (q_rope, k_rope)], latent
    else:
        q, k, v = arrays
        parts = [(q, k)]
    b, t, heads, m, _ = parts[0][0].shape
    width, size = v.shape[-2:] if call.static["layout"] == "feature_major" else v.shape[:-3:-1]
    capacity = size if table is None else size * table.shape[1]
    out, lse = np.zeros((b, t, heads, m, width)), np.full((b, t, heads, m), -np.inf)
    for row, i in np.ndindex(b, t):
        if (n := min(kv_len[row, i], capacity)) <= 0:
            continue
        keys, values = [tokens(k, row, n) for _, k in parts], tokens(v, row, n)
        for head in range(heads):
            of_head = lambda x, head=head: x[head] if x.ndim == 3 else x
            scores = sum(
                q[row, i, head] @ of_head(k).T for (q, _), k in zip(parts, keys, strict=True)
            )  # [M, n]
            scores *= call.static["scale"]
            top = scores.max(axis=1, keepdims=True)
            weights = np.exp(scores - top)
            lse[row, i, head] = np.log(weights.sum(axis=1)) + top[:, 0]
            out[row, i, head] = weights @ of_head(values) / weights.sum(axis=1, keepdims=True)
    return out, lse


def run(call, implementation):
    return jax.jit(functools.partial(call, implementation=implementation))(*call.args)


def check(outcome, expected, atol=1e-5):
    for ours, wanted in zip(outcome, expected, strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float32), wanted, rtol=1e-4, atol=atol)


@st.composite
def cases(draw, page):
    """Small calls of either op in either layout, with any kv_len."""
    small = lambda low, high: draw(st.integers(low, high))
    latent = draw(st.booleans())
    case = ArgSpec(
        lengths=(0,) * small(1, 3),
        q_len=small(1, 3),
        heads=small(1, 3),
        rows=small(1, 3),
        width=small(1, 5),
        rope=draw(st.sampled_from([0, 2, 4])) if latent else 0,
        value=None if latent else small(1, 5),
        max_len=small(9, 11),
        page_size=draw(page),
        layout=draw(st.sampled_from(["token_major", "feature_major"])),
    )
    if latent and case.layout == "token_major":
        case = dataclasses.replace(case, pool=draw(st.sampled_from([None, "packed", "engine"])))
    return case, draw(kv_lens(len(case.lengths), case.q_len, case.capacity))


@settings(max_examples=15, deadline=None)
@given(drawn=cases(page=st.none()), seed=st.integers(0, 99))
def test_reference_equals_the_definition_with_any_kv_len_and_nan_where_unseen(drawn, seed):
    case, kv_len = drawn
    call = make_call(case, seed, jnp.float32, scale=0.6, kv_len=kv_len)
    check(run(call, "reference"), definition(call))


@settings(max_examples=15, deadline=None)
@given(drawn=cases(page=st.integers(1, 5)), seed=st.integers(0, 99))
def test_reference_equals_the_definition_with_permuted_pages_and_entries_that_are_no_page(drawn, seed):
    case, kv_len = drawn
    call = make_call(case, seed, jnp.float32, scale=0.6, kv_len=kv_len)
    check(run(call, "reference"), definition(call))


@pytest.mark.parametrize("name", EDGES | POOLS)
def test_xla_equals_the_definition_at_the_limits_of_blocks_and_pages(monkeypatch, name):
    monkeypatch.setattr(xla, "BLOCK_ELEMENTS", 1)  # blocks of 128, the smallest
    call = make_call((EDGES | POOLS)[name], dtype=jnp.float32)
    check(run(call, "xla"), definition(call))


@pytest.mark.parametrize("page", [None, 16, 100, 128, 160])
@pytest.mark.parametrize("layout", ["token_major", "feature_major"])
def test_xla_in_blocks_equals_the_definition_in_both_layouts_whatever_the_page(monkeypatch, page, layout):
    monkeypatch.setattr(xla, "BLOCK_ELEMENTS", 1)
    case = ArgSpec((300, 128, 0, 130), 2, 2, 2, width=4, rope=2, max_len=350, page_size=page, layout=layout)
    call = make_call(case, dtype=jnp.float32)
    check(run(call, "xla"), definition(call))
    if layout == "token_major":
        call = make_call(dataclasses.replace(case, pool="packed"), dtype=jnp.float32)
        check(run(call, "xla"), definition(call))
    any_kv_len = [[2**31 - 1, 300], [-(2**31), 128], [5, 0], [130, 1000]]
    call = make_call(dataclasses.replace(case, rope=0, value=3), dtype=jnp.float32, kv_len=any_kv_len)
    check(run(call, "xla"), definition(call))


@pytest.mark.parametrize("s", [129, 500])
def test_xla_sees_each_slot_once_where_the_last_block_overlaps_the_one_before(monkeypatch, s):
    monkeypatch.setattr(xla, "BLOCK_ELEMENTS", 1)
    call = make_call(ArgSpec((s, s // 2), 2, 2, 2, width=4, rope=2), dtype=jnp.float32)
    check(run(call, "xla"), definition(call))


@pytest.mark.parametrize("page", [None, 32])
def test_xla_reads_no_block_beyond_the_longest_row(monkeypatch, page):
    monkeypatch.setattr(xla, "BLOCK_ELEMENTS", 1)
    specification, blocks = xla.reference.decode_attention, []

    def counted(*args, **kwargs):
        jax.debug.callback(lambda: blocks.append(1))
        return specification(*args, **kwargs)

    monkeypatch.setattr(xla.reference, "decode_attention", counted)
    case = ArgSpec((130, 20), rows=1, width=4, rope=0, value=4, max_len=1000, page_size=page)
    jax.block_until_ready(make_call(case, dtype=jnp.float32)(implementation="xla"))
    jax.effects_barrier()
    assert len(blocks) == 2


@pytest.mark.parametrize("implementation", EVERYWHERE)
@pytest.mark.parametrize("layout", ["token_major", "feature_major"])
@pytest.mark.parametrize("branches", [1, 2, 4])
def test_queries_shared_by_heads_wider_than_keys_and_not_yet_rotated_give_the_same(
    implementation, layout, branches
):
    case = ArgSpec((9, 5), 2, 4, 3, width=4, rope=6, layout=layout)
    short, plain = share_queries(make_call(case, dtype=jnp.float32), branches)
    check(run(short, implementation), run(plain, "reference"))


def test_rotary_queries_whose_heads_do_not_divide_the_latents_are_refused():
    call = abstract_call(ArgSpec((9,), heads=4))
    q_nope, q_rope, *rest = call.args
    with pytest.raises(ValueError, match="q_rope must have the shape"):
        jax.eval_shape(call, q_nope, jax.ShapeDtypeStruct((1, 1, 3, *q_rope.shape[3:]), q_rope.dtype), *rest)


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_nothing_seen_gives_zeros_and_minus_infinity(implementation):
    call = make_call(ArgSpec((0, 0), 2, 2, 3, width=4, rope=2, max_len=5), dtype=jnp.float32)
    out, lse = call(implementation=implementation)
    assert np.all(np.asarray(out) == 0)
    assert np.all(np.asarray(lse) == -np.inf)


def test_outputs_over_two_halves_of_the_cache_merge_to_that_over_all_of_it():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    q, k, v = draw(2, 1, 2, 3, 4), draw(2, 2, 8, 4), draw(2, 2, 8, 4)
    kv_len = jnp.array([[8], [3]])  # the second row has nothing in the second half
    attend = lambda part, n: grouped_decode_attention(q, k[:, :, part], v[:, :, part], n, scale=1.0)
    halves = attend(slice(0, 4), jnp.clip(kv_len, 0, 4)), attend(slice(4, 8), jnp.clip(kv_len - 4, 0, 4))
    check(xla.merge(*halves[0], *halves[1]), grouped_decode_attention(q, k, v, kv_len, scale=1.0))


@pytest.mark.parametrize("implementation", EVERYWHERE)
@pytest.mark.parametrize("sizes", [(2, 1, 4, 4), (2, 3, 4, 1), (1, 5, 1, 4)], ids=str)
def test_bfloat16_is_as_close_to_float32_as_rounding_allows(monkeypatch, implementation, sizes):
    monkeypatch.setattr(xla, "BLOCK_ELEMENTS", 1)
    b, *sizes = sizes
    call = make_call(ArgSpec((150, 70)[:b], *sizes, width=16, rope=8), 1, scale=0.2)
    out, lse = run(call, implementation)
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    exact, exact_lse = definition(call)
    np.testing.assert_allclose(
        np.asarray(out, np.float32), exact, rtol=0, atol=2 * 2**-8 * np.abs(exact).max()
    )
    np.testing.assert_allclose(lse, exact_lse, rtol=1e-5, atol=1e-5)


def factored_call(case, seed, k_rank, v_rank, kv_len=None):
    """A call of the factored op, and the grouped call with the keys and values that its factors make."""
    call, rng = make_call(case, seed, jnp.float32, scale=0.6, kv_len=kv_len), np.random.default_rng(seed)
    q, *caches, kv_len, table = call.args
    turn = lambda x: x.swapaxes(-1, -2) if case.layout == "feature_major" else x
    factors, made = [], []
    for cache, rank in zip(caches, (k_rank, v_rank), strict=True):
        unseen = np.isnan(turn(np.asarray(cache)))  # [P, K, S, W]
        pages, heads, tokens, width = unseen.shape
        a = np.where(unseen[..., :1], np.nan, rng.standard_normal((pages, heads, tokens, rank)))
        b = np.where(unseen[:, 0, :, :1, None], np.nan, rng.standard_normal((pages, tokens, rank, width)))
        made.append(turn(np.einsum("pksr,psrw->pksw", a, b)))
        factors += [turn(a), turn(b.reshape(pages, tokens, rank * width))]
    factors = [jnp.asarray(x, jnp.float32) for x in factors]
    factored = dataclasses.replace(call, op=factored_decode_attention, args=(q, *factors, kv_len, table))
    return factored, dataclasses.replace(call, args=(q, *made, kv_len, table))


@settings(max_examples=15, deadline=None)
@given(
    drawn=cases(page=st.none() | st.integers(1, 5)),
    ranks=st.tuples(*[st.integers(1, 3)] * 2),
    seed=st.integers(0, 99),
)
def test_factored_attention_equals_attention_over_the_keys_and_values_that_the_factors_make(
    drawn, ranks, seed
):
    case, kv_len = drawn
    case = dataclasses.replace(case, rope=0, value=case.value or 3, pool=None)
    factored, grouped = factored_call(case, seed, *ranks, kv_len=kv_len)
    check(run(factored, "reference"), definition(grouped), atol=1e-4)


@pytest.mark.parametrize("page", [None, 100])
@pytest.mark.parametrize("layout", ["token_major", "feature_major"])
def test_factored_attention_in_blocks_equals_the_definition_too(monkeypatch, page, layout):
    monkeypatch.setattr(xla, "BLOCK_ELEMENTS", 1)
    case = ArgSpec(
        (300, 128, 0, 130), 2, 3, 1, 4, rope=0, value=3, max_len=350, page_size=page, layout=layout
    )
    factored, grouped = factored_call(case, 0, 2, 3)
    check(run(factored, "xla"), definition(grouped), atol=1e-4)


@pytest.fixture
def as_users_call():
    """Without the check of annotations, which would speak first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


LATENT = ArgSpec((5, 4), 2, 2, 3, width=4, rope=2)


@pytest.mark.parametrize(
    ("case", "name", "wrong"),
    [
        (LATENT, "q_rope", lambda x: x[:, :1]),
        (LATENT, "kv_latent", lambda x: x[:, :1]),
        (LATENT, "kv_latent", lambda x: x[:1]),  # contiguous: as many pages as rows
        (LATENT, "kv_latent", lambda x: x[..., :3]),
        (LATENT, "k_rope", lambda x: x[:, :3]),
        (LATENT, "k_rope", lambda x: x[..., :1]),
        (LATENT, "kv_len", lambda x: x[:, :1]),
        (dataclasses.replace(LATENT, layout="feature_major"), "kv_latent", lambda x: x[:, :, :3]),
        (dataclasses.replace(LATENT, layout="feature_major"), "k_rope", lambda x: x[..., :3]),
        (
            dataclasses.replace(LATENT, page_size=2),
            "k_rope",
            lambda x: x[1:],
        ),  # a pool of as many pages for both
        (dataclasses.replace(LATENT, page_size=2), "page_table", lambda x: x[:1]),
        (dataclasses.replace(LATENT, rope=0, value=4), "k", lambda x: x[..., :3]),
        (dataclasses.replace(LATENT, rope=0, value=4), "v", lambda x: x[:, :, :3]),
        (dataclasses.replace(LATENT, rope=0, value=4), "v", lambda x: x[:, :1]),
    ],
)
@pytest.mark.usefixtures("as_users_call")
def test_an_array_that_does_not_belong_to_the_others_is_named(case, name, wrong):
    call = make_call(case, dtype=jnp.float32)
    names = ("q", "k", "v") if case.value else ("q_nope", "q_rope", "kv_latent", "k_rope")
    args = [
        wrong(x) if n == name else x for n, x in zip((*names, "kv_len", "page_table"), call.args, strict=True)
    ]
    with pytest.raises(ValueError, match=f"^{name} must have the shape"):
        call(*args)


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("a_k", lambda x: x[:, :1], "^a_k must have the shape"),
        ("b_k", lambda x: x[..., :4], "^b_k must have the shape"),
        ("a_v", lambda x: x[:, :, :3], "^a_v must have the shape"),
        ("b_v", lambda x: x[..., :5], "^b_v must be 2 factors wide, as many as a_v has; 5 is no multiple"),
        ("b_v", lambda x: x[:, :3], "^b_v must have the shape"),
    ],
)
@pytest.mark.usefixtures("as_users_call")
def test_a_factor_that_does_not_belong_to_the_others_is_named(name, wrong, said):
    call, _ = factored_call(dataclasses.replace(LATENT, rope=0, value=3), 0, 2, 2)
    names = ("q", "a_k", "b_k", "a_v", "b_v", "kv_len", "page_table")
    with pytest.raises(ValueError, match=said):
        call(*(wrong(x) if n == name else x for n, x in zip(names, call.args, strict=True)))


@pytest.mark.usefixtures("as_users_call")
def test_an_unknown_layout_is_refused_with_the_known_ones():
    call = make_call(LATENT, dtype=jnp.float32)
    with pytest.raises(ValueError, match="token_major or feature_major; got 'head_major'"):
        call.op(*call.args[:-1], scale=1.0, layout="head_major")


def test_a_case_is_what_it_says_that_the_queries_see():
    case = ArgSpec((3, 0, 5), q_len=2, heads=2, rows=1, width=4, rope=2, page_size=2)
    call = make_call(case)
    *_, latent, k_rope, kv_len, table = call.args
    np.testing.assert_array_equal(kv_len, [[2, 3], [0, 0], [4, 5]])
    assert (np.isfinite(latent).sum(), np.isfinite(k_rope).sum()) == (8 * 2 * 4, 8 * 2)
    np.testing.assert_array_equal(
        (np.asarray(table) >= 0) & (np.asarray(table) < 9), [[1, 1, 0], [0] * 3, [1] * 3]
    )
    shape = lambda x: (x.shape, x.dtype)
    assert jax.tree.map(shape, call.args) == jax.tree.map(shape, abstract_call(case).args)
    assert BENCHMARKS["mlra_4 1x2M"].cache_bytes == 2 * (128 + 64) * 2**21
