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
from mlra_jax.cli.collectives import CollectivesArgs
from mlra_jax.cli.configs import load_config
from mlra_jax.config import MeshConfig, ModelConfig
from mlra_jax.execution.collectives import Collective, parse_collectives
from mlra_jax.generation.collectives import step_collectives, table
from mlra_jax.generation.sampling import GREEDY, Sampling
from mlra_jax.model import Transformer
from mlra_jax.sharding import decode_rules, make_mesh


def documented(text):
    """(arguments of the command, lines of the table without the last column) for each table in the text."""
    for command, rows in re.findall(r"`python -m mlra_jax\.cli\.collectives (.*?)`\n\n((?:\|.*\n)+)", text):
        yield command, [line.rsplit("|", 2)[0] + "|" for line in rows.splitlines()]


def compiled(args):
    config = dataclasses.replace(load_config(args.config).model, n_layers=args.layers)
    mesh = make_mesh(args.mesh, jax.devices()[: math.prod(dataclasses.asdict(args.mesh).values())])
    collectives = step_collectives(
        config,
        mesh,
        split_heads=args.split_heads,
        batch=args.batch,
        max_len=args.max_len,
        sampling=Sampling(1.0) if args.sample else GREEDY,
    )
    return config, mesh, collectives


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
        config, mesh, collectives = compiled(args)
        assert table(collectives, config.n_layers) == lines, command
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
    collectives = step_collectives(
        config_of(variant), mesh, split_heads=True, batch=4, max_len=64, sampling=GREEDY
    )
    assert {c.kind for c in collectives} == {"all-reduce"}
    assert len(collectives) == 2 * 2 + 2


def test_one_device_exchanges_nothing(config_of):
    mesh = make_mesh(MeshConfig(1), jax.devices()[:1])
    options = {"split_heads": True, "batch": 1, "max_len": 64, "sampling": GREEDY}
    assert step_collectives(config_of("mlra_4"), mesh, **options) == []


def test_on_a_tpu_the_exchanges_are_the_same_in_bfloat16():
    pytest.importorskip("libtpu")
    from mlra_jax.execution.topologies import compile_decode_step

    config = ModelConfig(n_layers=1)
    program = compile_decode_step(config, "v5e:2x2", MeshConfig(1, 1, 4, 1), batch=64, max_len=4096)
    assert {str(c) for c in parse_collectives(program.as_text())} == {
        "all-reduce | 4 | f32[64,1,3072]",
        "all-reduce | 4 | bf16[64,1,3072]",
        "all-gather | 4 | bf16[64,24,192]",
        "reduce-scatter | 4 | f32[64,1,6,128]",
        "all-reduce | 4 | f32[64,4,2]",
    }


def test_every_way_to_name_the_devices_is_read():
    hlo = """
  %a = f32[8,3]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
  %b = bf16[4,6]{1,0:T(8,128)} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={1}
  %c = f32[2]{0} reduce-scatter(%x), replica_groups=mesh['a'=2,'b'=3,'c'=5] {'a','c'}, dimensions={0}
  ROOT %d = (f32[4]{0}, s32[]) all-reduce(%x, %y), replica_groups={{0,1,2}}, to_apply=%add
  %e = u8[7]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
  %f = f32[9]{0} all-reduce(%x), replica_groups={{0},{1}}, to_apply=%add
  %h = ((bf16[16,3]{1,0}), bf16[16,3]{1,0}) all-reduce-start(%x), replica_groups=mesh['a'=4] {'a'}, to_apply=%add
  %g = f32[9]{0} add(%a, %all-reduce.3), metadata={op_name="all-reduce"}
"""
    assert parse_collectives(hlo) == [
        Collective("all-reduce", 2, (("f32", (8, 3)),)),
        Collective("all-gather", 4, (("bf16", (4, 6)),)),
        Collective("reduce-scatter", 10, (("f32", (2,)),)),
        Collective("all-reduce", 3, (("f32", (4,)), ("s32", ()))),
        Collective("collective-permute", 4, (("u8", (7,)),)),
        Collective("all-reduce", 4, (("bf16", (16, 3)),)),
    ]
    assert [c.bytes for c in parse_collectives(hlo)] == [96, 48, 80, 20, 7, 96]
    with pytest.raises(NotImplementedError, match="not understood"):
        parse_collectives("  %a = f32[8]{0} all-reduce(%x), replica_groups=?, to_apply=%add")
