"""How an implementation is picked, and how it declines."""

import contextlib
import dataclasses
import functools
import importlib
import logging
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlra_jax.config import MeshConfig
from mlra_jax.execution.accelerators import described_device
from mlra_jax.execution.back_ends import BackEnds
from mlra_jax.ops.attention import causal_attention
from mlra_jax.ops.back_end import Function, Kernel
from mlra_jax.ops.decode import IMPLEMENTATIONS as DECODE
from mlra_jax.ops.decode.arg_specs import ArgSpec, abstract_call
from mlra_jax.ops.dispatch import choose, dispatch, explain
from mlra_jax.ops.norm import add_rms_norm
from mlra_jax.ops.skinny_gemm import has_kernel, skinny_gemm
from mlra_jax.sharding import abstract_mesh
from tests.ops.common import make_call

HOPPER = abstract_mesh(MeshConfig(1, 1, 1, 1), described_device("h100"))


def declines(x, *, limit):
    raise NotImplementedError(f"takes no more than {limit}")


DECLINES = Function(declines)
IMPLEMENTATIONS = {"fast": DECLINES, "plain": Function(lambda x, *, limit: ("plain", x, limit))}


def test_none_takes_the_first_that_does_not_decline_and_says_once_why_it_passed_one_over(caplog):
    with caplog.at_level(logging.INFO, logger="mlra_jax"):
        for _ in range(2):
            assert dispatch("double", IMPLEMENTATIONS, None, 3, limit=7) == ("plain", 3, 7)
    assert [r.getMessage() for r in caplog.records] == ["double: fast declines: takes no more than 7"]


def test_a_name_takes_that_one_or_fails():
    assert dispatch("op", IMPLEMENTATIONS, "plain", 3, limit=1)[0] == "plain"
    with pytest.raises(NotImplementedError, match="takes no more than 1"):
        dispatch("op", IMPLEMENTATIONS, "fast", 3, limit=1)


def test_what_is_chosen_stands_for_none_and_ends_with_its_context():
    take = lambda op, implementation=None: dispatch(op, IMPLEMENTATIONS, implementation, 3, limit=1)[0]
    with choose(op="plain"):
        assert take("op") == "plain"
        with choose(op="fast", other="plain"):
            assert take("other") == take("op", "plain") == "plain"
            with pytest.raises(NotImplementedError, match="takes no more than 1"):
                take("op")
        assert take("op") == "plain"
    with pytest.raises(ExceptionGroup):
        dispatch("op", {"a": DECLINES, "b": DECLINES}, None, 3, limit=1)


def test_the_former_name_of_an_op_still_chooses_and_says_the_new_one(caplog):
    x = jnp.ones((2, 4))
    with (
        choose(product="mosaic_gpu"),
        pytest.raises(NotImplementedError, match=r"Hopper|needs JAX|work with"),
    ):
        skinny_gemm(x, x)
    assert "'product' is called 'skinny_gemm' now" in caplog.text


@dataclasses.dataclass(frozen=True)
class Tiled(Kernel[int, int]):
    """A back end of up to nine numbers, whose tiling is a number."""

    name = "tiled"

    def check(self, x, *, limit):
        if len(x) > 9:
            raise NotImplementedError(f"takes up to 9; got {len(x)}")
        return len(x)

    def heuristic(self, shape):
        return 2 * shape

    def run(self, shape, config, x, *, limit):
        return shape, config


def test_a_back_end_is_an_implementation_like_its_name_and_runs_with_its_own_tiling():
    take = lambda implementation, n=3: dispatch("op", IMPLEMENTATIONS, implementation, jnp.ones(n), limit=1)
    assert take(Tiled()) == (3, 6)
    assert take([Tiled(config=5), "plain"]) == (3, 5)
    assert take([Tiled(), "plain"], 10)[0] == "plain"
    with pytest.raises(NotImplementedError, match="up to 9; got 10"):
        take(Tiled(), 10)
    with choose(op=Tiled(config=7)):
        assert take(None) == (3, 7)
    said = explain(functools.partial(double, implementation=[Tiled(), "plain"]), jnp.ones(10))
    assert said == {"double": {"tiled": "takes up to 9; got 10", "plain": None}}


def test_a_sequence_is_tried_in_order_and_all_reasons_are_given():
    assert dispatch("op", IMPLEMENTATIONS, ("fast", "plain"), 3, limit=1)[0] == "plain"
    with pytest.raises(ExceptionGroup) as error:
        dispatch("op", {"a": DECLINES, "b": DECLINES}, ("a", "b"), 3, limit=1)
    assert [str(e) for e in error.value.exceptions] == ["takes no more than 1"] * 2


def test_an_unknown_name_is_refused_with_the_known_ones_before_anything_runs():
    with pytest.raises(ValueError, match="op has no implementation 'quick'; choose from fast, plain"):
        dispatch("op", IMPLEMENTATIONS, ("plain", "quick"), 3, limit=1)
    x = jnp.ones((1, 1, 1, 2))
    with pytest.raises(ValueError, match="choose from mosaic_gpu, tokamax, cudnn, splash, xla, reference"):
        causal_attention(x, x, x, scale=1.0, implementation="flash")


def test_other_errors_of_an_implementation_are_not_taken_for_declining():
    with pytest.raises(ZeroDivisionError):
        dispatch("op", {"broken": Function(lambda: 1 / 0), "plain": Function(lambda: 1)}, None)


def test_a_module_that_does_not_import_declines_and_is_explained(monkeypatch):
    """Such as Mosaic GPU's on a platform whose JAX has no such part."""
    for op in ("attention", "decode", "norm", "skinny_gemm", "append"):
        importlib.import_module(f"mlra_jax.ops.{op}")
        monkeypatch.setitem(sys.modules, f"mlra_jax.ops.{op}.mosaic_gpu", None)
    call = abstract_call(ArgSpec((300, 7)))
    with jax.sharding.use_abstract_mesh(HOPPER):
        said = explain(call, *call.args)["latent_decode_attention"]
        assert (
            f"mlra_jax.ops.decode.mosaic_gpu does not work with JAX {jax.__version__}" in said["mosaic_gpu"]
        )
        assert said["xla"] is None
        assert not has_kernel(8, jnp.dtype("bfloat16"))
        x = jax.ShapeDtypeStruct((1, 4), jnp.float32)
        jax.eval_shape(lambda x: add_rms_norm(x, x, x[0], eps=1e-6), x)
        q = jax.ShapeDtypeStruct((1, 4, 1, 2), jnp.float32)
        jax.eval_shape(lambda q: causal_attention(q, q, q, scale=1.0), q)


def test_attention_without_the_kernel_for_its_device_is_warned_of_once_and_the_summary_names_all():
    """For a Hopper GPU, before JAX 0.11 because of the version, later because of the type; for a CPU there is none."""
    q = jax.ShapeDtypeStruct((1, 4, 1, 2), jnp.float32)
    said = []
    for mesh in (None, HOPPER, HOPPER):
        context = jax.sharding.use_abstract_mesh(mesh) if mesh else contextlib.nullcontext()
        before = sys.modules.get("mlra_jax.ops.attention.splash")
        with context, BackEnds(said.append) as back_ends:
            jax.eval_shape(lambda q: causal_attention(q, q, q, scale=1.0), q)
            jax.eval_shape(lambda q: causal_attention(2 * q, q, q, scale=1.0), q)
            x = jax.ShapeDtypeStruct((1, 4), jnp.float32)
            jax.eval_shape(lambda x: add_rms_norm(x, x, x[0], eps=1e-6), x)
        assert str(back_ends) == "Back ends: causal_attention xla, add_rms_norm reference."
        assert sys.modules.get("mlra_jax.ops.attention.splash") is before  # made for another device
    assert len(said) == 2
    assert said[0].startswith(
        "warning: causal_attention runs as xla; mosaic_gpu, which is made for the NVIDIA H100 80GB HBM3, would be "
        "faster, but: the Mosaic GPU kernel"
    )


@pytest.mark.parametrize(
    "hidden", ["jax.experimental.pallas.mosaic_gpu", "jax.experimental.pallas.ops.tpu.splash_attention"]
)
def test_no_op_needs_a_kernel_library_to_be_imported(hidden):
    program = (
        f"import sys; sys.modules[{hidden!r}] = None\n"
        "import mlra_jax.generation.engine, mlra_jax.training.loop\n"
        "import jax.numpy as jnp\n"
        "from mlra_jax.ops.attention import causal_attention\n"
        "x = jnp.ones((1, 4, 1, 2))\n"
        "assert causal_attention(x, x, x, scale=1.0).shape == x.shape\n"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def double(x, *, limit=1, implementation=None):
    return dispatch("double", IMPLEMENTATIONS, implementation, x, limit=limit)[1]


def test_explain_names_all_in_the_order_in_which_they_are_tried_with_their_reasons():
    assert explain(double, jnp.ones(3), limit=7) == {
        "double": {"fast": "takes no more than 7", "plain": None}
    }
    assert list(explain(double, 3, implementation=("plain", "fast"))["double"]) == ["plain", "fast"]


def test_explain_raises_as_the_call_would_and_forgets():
    with pytest.raises(NotImplementedError, match="takes no more than 1"):
        explain(double, 3, implementation="fast")
    assert double(3) == 3
    assert explain(jnp.sin, 0.5) == {}


def test_explain_reports_the_ops_that_a_function_calls_and_runs_nothing():
    ran = []

    def model(q, k):
        jax.debug.callback(lambda: ran.append(1))
        return causal_attention(q, k, k, scale=1.0)

    shape = jax.ShapeDtypeStruct((1, 128, 2, 16), jnp.float32)
    assert explain(model, shape, shape)["causal_attention"]["reference"] is None
    jax.effects_barrier()
    assert not ran


def test_explain_says_why_other_back_ends_of_decode_attention_leave_the_cpu_to_xla():
    call = abstract_call(ArgSpec((300, 7), page_size=64))
    with jax.default_device(jax.devices("cpu")[0]):
        reasons = explain(call, *call.args)["latent_decode_attention"]
    assert list(reasons) == list(DECODE)
    preferred = list(reasons.values())[: list(reasons).index("xla")]
    assert all(preferred)
    assert (reasons["xla"], reasons["reference"]) == (None, None)


def test_a_named_implementation_of_decode_attention_runs_though_another_is_preferred():
    call = make_call(ArgSpec((3, 1), rows=2, width=4, rope=2), dtype=jnp.float32)
    np.testing.assert_allclose(call(implementation="reference")[0], call()[0], rtol=1e-5, atol=1e-6)
    assert explain(call, *call.args)["latent_decode_attention"]["reference"] is None
