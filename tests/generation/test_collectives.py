"""The compiled decode step moves what docs/decoding.md lists, and that is activations only."""

import dataclasses
import math
import re
import shlex

import jax
import pytest
import tyro
from flax import nnx

from mlra_jax.attention.kv_cache import Cache
from mlra_jax.cli.collectives import CollectivesArgs, collectives_table, step_collectives
from mlra_jax.cli.configs import load_config
from mlra_jax.config import MeshConfig, ModelConfig
from mlra_jax.execution.collectives import executed_collectives
from mlra_jax.generation.engine import compile_step
from mlra_jax.model import Transformer
from mlra_jax.sharding import decode_rules, make_mesh


def documented(text):
    """(arguments of the command, lines of the table without the last column) for each table in the text."""
    for command, rows in re.findall(r"`python -m mlra_jax\.cli\.collectives (.*?)`\n\n((?:\|.*\n)+)", text):
        yield command, [line.rsplit("|", 2)[0] + "|" for line in rows.splitlines()]


def test_the_tables_in_the_documentation_are_what_the_compiler_says(repository):
    tables = list(documented((repository / "docs" / "decoding.md").read_text(encoding="utf-8")))
    arguments = [command for command, _ in tables]
    assert [("--no-split-heads" in a, "context" in a) for a in arguments[:3]] == [
        (False, False),
        (True, False),
        (False, True),
    ]
    for command, lines in tables:
        args = tyro.cli(CollectivesArgs, args=shlex.split(command))
        config = dataclasses.replace(load_config(args.config).model, n_layers=args.layers)
        mesh = make_mesh(args.mesh, jax.devices()[: math.prod(dataclasses.asdict(args.mesh).values())])
        collectives = step_collectives(args, mesh)
        assert collectives_table(collectives, config.n_layers) == lines, command
        assert max(c.bytes for c in collectives) < smallest_held(config, mesh, args)


def smallest_held(config, mesh, args):
    """Bytes of the smallest weight matrix or cache array of a layer on one device, the weights in bfloat16."""
    rules = decode_rules(args.split_heads)
    config = dataclasses.replace(config, param_dtype="bfloat16")
    with jax.set_mesh(mesh):
        model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), rules=rules, layout="decode"))
        cache = jax.eval_shape(lambda: Cache.create(config, rules, args.batch, args.max_len))
    held = [
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for path, leaf in jax.tree.leaves_with_path((model, cache.layers))
        if "gain" not in jax.tree_util.keystr(path)
    ]
    return min(held)


@pytest.mark.parametrize("variant", ["mla", "gla_2"])
def test_replicated_latent_heads_need_no_exchange_of_queries(variant, config_of):
    mesh = make_mesh(MeshConfig(1, 1, 4, 1), jax.devices()[:4])
    program = compile_step(config_of(variant), decode_rules(), mesh, batch=4, max_len=64)
    collectives = executed_collectives(program.as_text())
    assert {c.kind for c in collectives} == {"all-reduce"}
    assert sum(collectives.values()) == 2 * 2 + 2


def test_one_device_exchanges_nothing(config_of):
    mesh = make_mesh(MeshConfig(1), jax.devices()[:1])
    program = compile_step(config_of("mlra_4"), decode_rules(), mesh, batch=1, max_len=64)
    assert executed_collectives(program.as_text()) == {}


def test_on_a_tpu_the_exchanges_are_the_same_in_bfloat16():
    pytest.importorskip("libtpu")
    from mlra_jax.execution.topologies import topology_mesh

    config = ModelConfig(n_layers=1)
    mesh = topology_mesh("v5e:2x2", MeshConfig(1, 1, 4, 1))
    program = compile_step(config, decode_rules(), mesh, batch=64, max_len=4096)
    assert {" | ".join(c.cells) for c in executed_collectives(program.as_text())} == {
        "all-reduce | 4 | f32[64,1,3072]",
        "all-reduce | 4 | bf16[64,1,3072]",
        "all-gather | 4 | bf16[64,24,192]",
        "reduce-scatter | 4 | f32[64,1,6,128]",
        "all-reduce | 4 | f32[64,4,2]",
    }
