"""All-reduce by a Pallas Mosaic GPU kernel, alone or with residual sum and RMSNorm, for Hopper GPUs of one host.

Each device writes its partial sums into the workspace of every device and adds up what arrives in its own. A word is 8
bytes, a float32 with the number of the call (the epoch), written and read at once: a word that carries the epoch has
arrived, so that there is no barrier, no fence and no flag to reset. The two halves of a workspace take turns. A device
is one call ahead of its peers at most, since a call ends when the words of all have arrived: what it writes then is in
the half that the others no longer read.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils as mosaic_gpu_utils

from mlra_jax.ops.all_reduce.workspace import Workspace
from mlra_jax.ops.hopper import THREADS, HopperKernel, plgpu

MAX_WIDTH = 8192
"""A thread has its elements of a row in registers."""
LOOKS = 1 << 26
"""At a word that does not arrive, about a minute; then the kernel traps, rather than wait for ever."""
REGISTERS = 32
"""Elements that a thread waits for at a time."""


utils: Any = mosaic_gpu_utils  # typed differently in each version of JAX


def _layout(width: int) -> Any:
    """Of a row's elements over the threads of a warpgroup."""
    return plgpu.Layout.WG_STRIDED((width,), vec_size=4 if width % (4 * THREADS) == 0 else 2)


def _exchange(peers: Sequence[Any], words: Sequence[Any], y: jax.Array, epoch: jax.Array) -> jax.Array:
    """Writes y [D] to each of `peers` and returns the sum of what is in `words` once it has arrived.

    Args:
      peers: of each device, the part of its workspace that is this device's: references to int32 [2 * D].
      words: of each device, its part of the own workspace, in the order of the sum.
      y: float32.
      epoch: int32.
    """
    from jax.experimental.mosaic.gpu import FragmentedArray
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, scf

    n, layout = len(peers), _layout(y.shape[-1])
    ref = plgpu.RefType()

    @plgpu.inline_mgpu(
        arg_types=((ref,) * n, (ref,) * n, layout, plgpu.Layout.WG_SPLAT),
        return_type=plgpu.ShapeDtypeStruct(y.shape, jnp.float32, layout=layout),
    )
    def exchange(_: Any, peers: Any, words: Any, y: Any, epoch: Any) -> Any:
        i32, i64, f32 = (*(ir.IntegerType.get_signless(bits) for bits in (32, 64)), ir.F32Type.get())
        constant = lambda value: utils.c(value, i32)
        (epoch,) = epoch.registers.flat
        # A thread has vectors of consecutive elements: two make 16 bytes of words. Their distances are constants in the
        # instructions, for addresses in registers would leave too few for the values.
        first_element = arith.index_cast(i64, next(iter(y.layout.linear_thread_idxs())))
        offset, vector = arith.muli(first_element, utils.c(8, i64)), y.layout.vec_size
        elements = [(i, j) for i in range(y.registers.size) for j in range(0, vector, 2)]
        bytes_to = lambda i, j: 8 * (i * THREADS * vector + j)

        def address(ref: Any) -> Any:
            """Of the first of this thread's words."""
            base = utils.memref_ptr(ref)
            return llvm.inttoptr(base.type, arith.addi(llvm.ptrtoint(i64, base), offset))

        def value(i: int, j: int) -> Any:
            return llvm.extractelement(y.registers[i], constant(j))

        for peer in map(address, peers):
            for i, j in elements:
                utils.inline_ptx(
                    "{ .reg .b64 a, b; mov.b64 a, {$1, $3}; mov.b64 b, {$2, $3};"
                    f" st.relaxed.sys.global.v2.b64 [$0 + {bytes_to(i, j)}], {{a, b}}; }}",
                    peer,
                    *(arith.bitcast(i32, value(i, j + k)) for k in range(2)),
                    epoch,
                    has_side_effects=True,
                )

        def wait(address: Any, elements: Sequence[tuple[int, int]]) -> list[Any]:
            """The values of these pairs of words, when all of them carry the epoch."""
            first = [constant(0)] * (2 * len(elements)) + [constant(1), constant(0)]
            types = [v.type for v in first]
            loop = scf.WhileOp(types, first)
            with ir.InsertionPoint(loop.before.blocks.append(*types)) as at:
                values = list(at.block.arguments)
                scf.condition(arith.cmpi(arith.CmpIPredicate.ne, values[-2], constant(0)), values)
            with ir.InsertionPoint(loop.after.blocks.append(*types)) as at:
                looks = arith.addi(at.block.arguments[-1], constant(1))
                with utils.when(arith.cmpi(arith.CmpIPredicate.ugt, looks, constant(LOOKS))):
                    utils.inline_ptx("trap;", has_side_effects=True)
                found: list[Any] = []
                missing: Any = constant(0)
                for i, j in elements:
                    *pair, first, second = utils.inline_ptx(
                        f"{{ .reg .b64 a, b; ld.relaxed.sys.global.v2.b64 {{a, b}}, [$4 + {bytes_to(i, j)}];"
                        " mov.b64 {$0, $2}, a; mov.b64 {$1, $3}, b; }",
                        address,
                        result_types=[i32] * 4,
                        has_side_effects=True,
                    )
                    found += pair
                    for tag in (first, second):
                        missing = arith.ori(missing, arith.xori(tag, epoch))
                scf.yield_([*found, missing, looks])
            return [arith.bitcast(f32, v) for v in list(loop.results)[:-2]]

        def add(a: Any, b: Any) -> Any:
            # Compilers would put off all sums to the end, and keep what has arrived from every device until then.
            return utils.inline_ptx("add.rn.f32 $0, $1, $2;", a, b, result_types=f32, has_side_effects=True)

        at_a_time = REGISTERS // 2
        batches = [elements[k : k + at_a_time] for k in range(0, len(elements), at_a_time)]
        sums: list[list[Any]] = [[]] * len(batches)
        for source in map(address, words):
            for k, batch in enumerate(batches):
                found = wait(source, batch)
                sums[k] = [add(a, b) for a, b in zip(sums[k], found, strict=True)] if sums[k] else found
        totals = [a for batch in sums for a in batch]
        registers = y.registers.copy()
        for k, (i, j) in enumerate(elements):
            for m in range(2):
                vector = registers[i]
                registers[i] = llvm.insertelement(vector, totals[2 * k + m], constant(j + m))
        return FragmentedArray(_registers=registers, _layout=y.layout, _is_signed=None)

    return exchange(tuple(peers), tuple(words), y, epoch)


def _store_epoch(epoch_ref: Any, epoch: jax.Array) -> None:
    """Stores the epoch in a reference to one int32, once all threads have read what was there."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    # Not by Pallas: it would copy an input that is written to.
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def store(_: Any, ref: Any, epoch: Any) -> None:
        zero = utils.c(0, ir.IntegerType.get_signless(32))
        utils.warpgroup_barrier()
        with utils.when(arith.cmpi(arith.CmpIPredicate.eq, utils.thread_idx(), zero)):
            utils.inline_ptx(
                "st.relaxed.gpu.global.b32 [$0], $1;",
                utils.memref_ptr(ref),
                *epoch.registers.flat,
                has_side_effects=True,
            )

    store(epoch_ref, epoch)


def _reduced(y_ref: Any, epochs_ref: Any, words_ref: Any, axis: str) -> jax.Array:
    """This program's row of y [rows, W], summed over devices."""
    row, me = lax.axis_index("row"), lax.axis_index(axis)
    n, width = words_ref.shape[1], y_ref.shape[-1]
    epoch = epochs_ref[row] + 1
    of_row = words_ref.at[epoch & 1, :, row, : 2 * width]
    # Each starts with another peer.
    peers = [plgpu.remote_ref(of_row.at[me], {axis: lax.rem(me + k, jnp.int32(n))}) for k in range(1, n + 1)]
    words = [of_row.at[k] for k in range(n)]
    total = _exchange(peers, words, plgpu.load(y_ref.at[row], layout=_layout(width)), epoch)
    _store_epoch(epochs_ref.at[row], epoch)
    return total


def _all_reduce_kernel(
    y_ref: Any,  # float32 [rows, W]
    epochs_ref: Any,  # int32 [R]
    words_ref: Any,  # int32 [2, n, R, 2 * D]
    sum_ref: Any,  # float32 [rows, W]
    *,
    axis: str,
) -> None:
    sum_ref[lax.axis_index("row"), :] = _reduced(y_ref, epochs_ref, words_ref, axis)


def _norm_kernel(
    y_ref: Any,  # float32 [rows, D]
    epochs_ref: Any,
    words_ref: Any,
    x_ref: Any,  # float32 [rows, D]
    gain_ref: Any,  # [D]
    sum_ref: Any,  # float32 [rows, D]
    h_ref: Any,  # [rows, D]
    *,
    axis: str,
    eps: float,
) -> None:
    row, width = lax.axis_index("row"), x_ref.shape[-1]
    read = lambda ref: plgpu.load(ref, layout=_layout(width)).astype(jnp.float32)
    y = _reduced(y_ref, epochs_ref, words_ref, axis)
    x = read(x_ref.at[row]) + y.astype(h_ref.dtype).astype(jnp.float32)
    sum_ref[row, :] = x
    h_ref[row, :] = (x * lax.rsqrt(jnp.sum(x * x) / width + eps) * read(gain_ref)).astype(h_ref.dtype)


class _Exchange(HopperKernel[None, None]):
    """What has one tiling, and needs a workspace."""

    def check_rows(self, rows: int, width: int, workspace: Workspace | None) -> None:
        """Whether the kernels take so many rows of this width.

        Raises:
          NotImplementedError: they do not.
        """
        self.target()
        if workspace is None:
            raise NotImplementedError(
                "the Mosaic GPU kernel exchanges through a workspace, and there is none; `Workspace.create` makes one "
                "for 2 to 8 GPUs of one process."
            )
        if width % (2 * THREADS) or width > MAX_WIDTH:
            raise NotImplementedError(
                f"the Mosaic GPU kernel takes rows of up to {MAX_WIDTH} elements, a multiple of {2 * THREADS}; got "
                f"{width}."
            )
        if rows > workspace.rows or width > workspace.width:
            raise NotImplementedError(
                f"the workspace is for {workspace.rows} rows of {workspace.width} elements; got {rows} of {width}."
            )

    def check_type(self, *arrays: jax.Array) -> None:
        """Whether the kernels take arrays of these types.

        Raises:
          NotImplementedError: they do not.
        """
        for a in arrays:
            if a.dtype != jnp.float32:
                raise NotImplementedError(f"the Mosaic GPU kernel sums float32; got {a.dtype}.")

    def launch(
        self, kernel: Any, name: str, out_type: Any, y: jax.Array, workspace: Workspace, *args: jax.Array
    ) -> Any:
        """Runs a program for each row of y [rows, W]."""
        return plgpu.kernel(
            kernel,
            out_type=out_type,
            grid=(len(y),),
            grid_names=("row",),
            # XLA would launch a barrier of all devices before each kernel that reaches others' memory.
            compiler_params=plgpu.CompilerParams(
                lowering_semantics=plgpu.LoweringSemantics.Lane, skip_device_barrier=True
            ),
            kernel_name=name,
        )(y, workspace.epochs[0], workspace.words[0], *args)


class Fitting(_Exchange):
    """See `mlra_jax.ops.all_reduce.fitting`."""

    def check(self, workspace: Workspace | None, rows: int) -> None:
        """Whether it takes a call."""
        self.check_rows(rows, workspace.width if workspace else 0, workspace)

    def run(self, shape: None, config: None, workspace: Workspace, rows: int) -> Workspace:
        """The workspace."""
        return workspace


class AllReduce(_Exchange):
    """Float32, of any width: rows are padded."""

    def check(self, y: jax.Array, workspace: Workspace | None, *, axis: str) -> None:
        """Whether it takes a call."""
        rows, width = math.prod(y.shape[:-1]), y.shape[-1]
        self.check_rows(rows, width + -width % (2 * THREADS), workspace)
        self.check_type(y)

    def run(self, shape: None, config: None, y: jax.Array, workspace: Workspace, *, axis: str) -> jax.Array:
        """Runs the kernel."""
        rows, width = math.prod(y.shape[:-1]), y.shape[-1]
        padded = jnp.pad(y.reshape(rows, width), ((0, 0), (0, -width % (2 * THREADS))))
        out_type = jax.ShapeDtypeStruct(padded.shape, y.dtype)
        kernel = functools.partial(_all_reduce_kernel, axis=axis)
        return self.launch(kernel, "all_reduce", out_type, padded, workspace)[:, :width].reshape(y.shape)


class AllReduceAddRMSNorm(_Exchange):
    """Float32 in, the norm in any type of float."""

    def check(
        self,
        x: jax.Array,
        y: jax.Array,
        gain: jax.Array,
        workspace: Workspace | None,
        *,
        axis: str,
        eps: float,
        dtype: Any,
    ) -> None:
        """Whether it takes a call."""
        self.check_rows(math.prod(x.shape[:-1]), x.shape[-1], workspace)
        self.check_type(x, y)

    def run(
        self,
        shape: None,
        config: None,
        x: jax.Array,
        y: jax.Array,
        gain: jax.Array,
        workspace: Workspace,
        *,
        axis: str,
        eps: float,
        dtype: Any,
    ) -> tuple[jax.Array, jax.Array]:
        """Runs the kernel."""
        flat = lambda a: a.reshape(-1, a.shape[-1])
        out_type = [jax.ShapeDtypeStruct(flat(x).shape, t) for t in (x.dtype, dtype)]
        kernel = functools.partial(_norm_kernel, axis=axis, eps=eps)
        args = flat(y), workspace, flat(x), gain
        total, h = self.launch(kernel, "all_reduce_add_rms_norm", out_type, *args)
        return total.reshape(x.shape), h.reshape(x.shape)
