"""Compares the Triton kernels, run on the CPU by Triton's interpreter, with the specification.

A program, not a test module: the interpreter must be chosen before Triton is imported. `test_triton.py` runs it.
"""

import functools
import os
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_jax.ops import device
from mlra_jax.ops.decode.arg_specs import ArgSpec
from mlra_jax.ops.decode.triton import Config, Triton, back_end, kernels
from tests.ops.common import EDGES, in_float32, kv_lens, make_call


class HostArray:
    """A NumPy array with what the interpreter asks of a torch tensor."""

    def __init__(self, array):
        self.array = array
        self.dtype = {"float16": "fp16", "float32": "fp32", "int32": "i32"}[str(array.dtype)]

    def data_ptr(self):
        return self.array.ctypes.data

    def itself(self, *_, **__):
        return self

    untyped_storage = cpu = new_empty = set_ = copy_ = storage_offset = size = stride = itself


def launch(kernel, inputs, outputs, *, grid, capability, warps, stages, **constants):
    inputs = [HostArray(np.array(x)) for x in inputs]
    outputs = [HostArray(np.full(x.shape, np.nan, x.dtype)) for x in outputs]  # what is not written shows
    kernel[grid](*inputs, *outputs, **constants)
    return tuple(jnp.asarray(x.array) for x in outputs)


def check(case, config, seed=0, kv_len=None):
    call = make_call(
        case, seed, jnp.float16, kv_len=kv_len
    )  # the interpreter multiplies bfloat16 as if it were integers
    out, lse = call(implementation=Triton(config=config))
    wide = in_float32(call)
    exact, exact_lse = jax.jit(functools.partial(wide, implementation="reference"))(*wide.args)
    exact = np.asarray(exact)
    np.testing.assert_allclose(
        np.asarray(out), exact, rtol=0, atol=2**-10 * np.abs(exact).max(), err_msg=str(case)
    )
    np.testing.assert_allclose(lse, exact_lse, rtol=1e-6, atol=1e-5, err_msg=str(case))


@st.composite
def sizes(draw):
    """Those of a call and of its tiling."""
    power = lambda low, high: draw(st.sampled_from([2**i for i in range(low, high + 1)]))
    small = lambda low, high: draw(st.integers(low, high))
    latent, block_tokens = draw(st.booleans()), power(4, 5)
    case = {
        "lengths": (0,) * small(1, 3),
        "q_len": small(1, 4),
        "heads": small(1, 2),
        "rows": small(1, 20),
        "width": power(4, 6),
        "rope": draw(st.sampled_from([0, 16, 32])) if latent else 0,
        "value": None if latent else power(4, 6),
        "max_len": small(100, 110),
        "page_size": draw(st.sampled_from([None, block_tokens, 2 * block_tokens])),
    }
    case = ArgSpec(**case)
    config = Config(power(4, 5), block_tokens, splits=small(1, 6), warps=4, stages=2)
    return case, config, draw(kv_lens(len(case.lengths), case.q_len, case.capacity))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(drawn=sizes(), seed=st.integers(0, 99))
def check_any(drawn, seed):
    case, config, kv_len = drawn
    check(case, config, seed, kv_len)


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the time
    with (
        # jax-triton refuses to be imported without JAX's CUDA plugin, and launches nothing here.
        mock.patch.object(back_end, "_import_kernels", return_value=kernels),
        mock.patch.object(back_end, "_launch", launch),
        mock.patch.object(device, "current_device", return_value=("gpu", "NVIDIA L4")),
    ):
        for case in EDGES.values():
            check(case, Config(block_rows=64, block_tokens=64, splits=3, warps=4, stages=2))
        beyond = ArgSpec((0,) * 3, 2, rows=4, width=16, rope=16, max_len=70)
        config = Config(block_rows=16, block_tokens=32, splits=2, warps=4, stages=2)
        check(beyond, config, kv_len=[[76, 2**31 - 1], [-100, 3], [-(2**31), -70]])
        check_any()
