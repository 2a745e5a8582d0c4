"""Perplexity: every token once, the paper's share of them, bytes, and the same on every mesh."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlra_jax.config import ConfigError, MeshConfig
from mlra_jax.data.shards import DataError, ShardWriter
from mlra_jax.data.tokenizers import ByteTokenizer
from mlra_jax.evaluation.perplexity import count_bytes, evaluate, mean, open_parts, paper_sequences
from mlra_jax.generation.sampling import NotFiniteError
from mlra_jax.sharding import make_mesh

T = 32
LENGTHS = {"a": 33, "b": 500, "c": 20, "d": 193}
"""Tokens of shards: a whole window; many and a tail; a tail alone; a batch of the paper's protocol and a token."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards of bytes and ends of text, one for each of `LENGTHS`."""
    out = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(1)
    for name, n in LENGTHS.items():
        with ShardWriter(out, name, "val") as writer:
            writer.write(np.where(rng.random(n) < 0.1, 256, rng.integers(0, 256, n)))
    return out


def shard(folder, name):
    return str(folder / f"{name}_val_000000.bin")


def tokens_of(folder, name):
    return np.fromfile(shard(folder, name), "<u2")[512:].astype(np.int64)


@pytest.fixture
def data(evaluated):
    return dataclasses.replace(evaluated().config.data, seq_len=T)


def by_definition(tokens, log_probabilities, n_predicted):
    """Sum of nats, counted one window at a time as the paper's code reads them."""
    nats = 0.0
    for o in range(0, n_predicted, T):
        y = tokens[o + 1 : o + 1 + T]
        rows = log_probabilities(tokens[o : o + len(y)])
        nats -= rows[np.arange(len(y)), y].sum()
    return nats


@pytest.mark.parametrize(("sizes", "batch_size"), [((1, 1, 1, 1), 5), ((2, 2, 1, 2), 3)])
def test_every_token_but_the_first_is_predicted_once_on_any_mesh(
    sizes, batch_size, folder, data, evaluated, log_probabilities
):
    model = evaluated(sizes, batch_size, T)
    results = list(evaluate(model, open_parts([str(folder)], data, 264), ByteTokenizer().byte_lengths()))
    assert [r.name for r in results] == [shard(folder, name) for name in LENGTHS]
    for result, name in zip(results, LENGTHS, strict=True):
        tokens = tokens_of(folder, name)
        nats = by_definition(tokens, log_probabilities, len(tokens) - 1)
        n_bytes = int(np.sum(tokens[1:] != 256))
        assert (result.tokens, result.n_bytes) == (len(tokens) - 1, n_bytes)
        assert result.nats_per_token == pytest.approx(nats / (len(tokens) - 1), rel=1e-5)
        assert result.perplexity == math.exp(result.nats_per_token)
        assert result.bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
    average = mean(results)
    assert average["perplexity"] == pytest.approx(np.mean([r.perplexity for r in results]))


def test_a_cross_entropy_that_is_no_number_is_an_error_that_names_the_shard(folder, data, evaluated):
    model = evaluated((2, 2, 2, 1))
    model.params["final_norm"]["gain"] *= jnp.nan
    parts = open_parts([str(folder)], data, 264)
    with pytest.raises(NotFiniteError, match=rf"{parts[0].name}: the cross-entropy is nan"):
        list(evaluate(model, parts))


def test_the_papers_protocol_takes_whole_batches_of_six(folder, data, evaluated, log_probabilities):
    paths = [shard(folder, "d"), shard(folder, "b")]
    results = list(evaluate(evaluated(batch_size=4, seq_len=T), open_parts(paths, data, 264, "paper")))
    for result, name, batches in zip(results, "db", (1, 2), strict=True):
        n = batches * 6 * T
        tokens = tokens_of(folder, name)
        means = [
            by_definition(tokens[i * 6 * T :], log_probabilities, 6 * T) / (6 * T) for i in range(batches)
        ]
        assert (result.tokens, result.n_bytes, result.bits_per_byte) == (n, None, None)
        assert result.nats_per_token == pytest.approx(np.mean(means), rel=1e-5)
    assert mean(results)["bits_per_byte"] is None


def test_the_papers_full_shards_give_its_own_number_of_tokens():
    assert paper_sequences(10**8, 2048) * 2048 == 99_999_744 == 8138 * 12288
    assert paper_sequences(12288, 2048) == 0  # the last of them would have no target
    assert paper_sequences(12289, 2048) == 6


def test_without_paths_the_runs_own_held_out_shards_are_taken(folder, data):
    parts = open_parts([], dataclasses.replace(data, path=str(folder)), 264)
    assert [p.name for p in parts] == [shard(folder, name) for name in LENGTHS]
    (part,) = open_parts([], data, 264)
    assert part.name == "the embedded corpus (val)"
    assert open_parts(["embedded"], dataclasses.replace(data, path="nowhere"), 264)[0].name == part.name


@pytest.mark.parametrize(
    ("paths", "protocol", "vocab_size", "words"),
    [
        (["nowhere"], "exact", 264, "no file or folder nowhere; expected a shard"),
        (["a", "c"], "paper", 264, r"c_val_000000.bin has 20 tokens; the paper protocol needs at least 193"),
        (["b"], "exact", 100, "model.vocab_size=100; the shards were made with another tokenizer"),
    ],
)
def test_what_cannot_be_evaluated_is_named(paths, protocol, vocab_size, words, folder, data):
    found = [shard(folder, p) if p in LENGTHS else p for p in paths]
    with pytest.raises(DataError, match=words):
        open_parts(found, data, vocab_size, protocol)
    with pytest.raises(
        ConfigError, match=r"protocol='papers' must be one of exact, paper\. Did you mean paper"
    ):
        open_parts(found, data, vocab_size, "papers")


def test_positions_that_do_not_count_have_no_bytes():
    targets = jnp.array([[0, -1, 2], [-1, 1, -1]])
    with jax.set_mesh(make_mesh(MeshConfig(1), jax.devices()[:1])):
        assert count_bytes(np.array([1, 10, 100], np.int32))(targets) == 111
