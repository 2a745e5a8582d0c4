"""What tests of several back ends draw with Hypothesis."""

from hypothesis import strategies as st


def kv_lens(batch, q_len, capacity):
    """Any that the decode ops take, [batch][q_len]: none, some, all and more than there is, in any order."""
    edges = [0, 1, capacity - 1, capacity, capacity + 1, capacity + 70, 2**31 - 1, -1, -(2**31)]
    query = st.one_of(st.integers(0, capacity), st.sampled_from(edges))
    of = lambda what, n: st.lists(what, min_size=n, max_size=n)
    return of(of(query, q_len), batch)
