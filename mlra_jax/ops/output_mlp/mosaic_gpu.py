"""Output projection, MLP, exchanges and norms of one decoded row in one persistent Pallas Mosaic GPU kernel (Hopper).

Every processor runs one program, and each of its warps multiplies rows of the matrices. A warp streams its rows of all
three matrices through a ring in shared memory, in the order in which it needs them: while it waits for the input of a
phase, the first rows of that phase arrive. Between phases, values travel as words that carry the number of the call
(see `all_reduce.mosaic_gpu`): sums over devices as float32 in words of 8 bytes, which each warp writes to every device,
and the hidden values of the MLP as bfloat16 in words of 4, on the own device. So a phase begins as soon as its input is
there: grid barrier, all-reduce, residual sum and norm are one.

| phase | input | rows | output |
| --- | --- | --- | --- |
| project | the heads' output y | W_o | partial sums, to all devices |
| expand | norm(x + sums) | W_gate and W_up | silu(gate) * up |
| contract | the hidden values | W_down | partial sums, to all devices |
| end | x + sums + sums | | the sum, and its norm |
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mlra_jax.ops.hopper import check_device, plgpu

WARPS = 8
THREADS = 32 * WARPS
SLOT = 6144
"""Most bytes of a copy: a row, or a part of one."""
SOURCES = 4
"""Devices whose sums a thread waits for at a time."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiling."""

    stages: int = 4
    """Copies of a warp under way, a power of two."""


@dataclasses.dataclass(frozen=True)
class Phase:
    """A product of all rows of a matrix with one vector."""

    rows: int
    """Of the matrix; of each of the two, if `gated`."""
    depth: int
    """What is summed over."""
    gated: bool = False

    @property
    def parts(self) -> int:
        """Copies of a row: as few as fit their slots, of whole 16 bytes."""
        parts = -(-2 * self.depth // SLOT)
        while self.depth % (8 * parts):
            parts += 1
        return parts

    @property
    def matrices(self) -> int:
        """Rows that are multiplied together."""
        return 2 if self.gated else 1

    @property
    def copies(self) -> int:
        """Of a unit of work."""
        return self.parts * self.matrices

    @property
    def elements(self) -> int:
        """Of a copy."""
        return self.depth // self.parts


def _kernel(
    *refs: Any,
    phases: tuple[Phase, ...],
    config: Config,
    n: int,
    axis: str | None,
    programs: int,
    eps: float,
) -> None:
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, gpu, llvm, scf

    names = (
        "x y w_o gain w_in w_down next_gain epochs sums hidden total h ring barriers values squares".split()
    )
    me = lax.axis_index(axis) if axis else jnp.int32(0)
    sums_ref = refs[names.index("sums")]
    peers = tuple(
        plgpu.remote_ref(sums_ref, {axis: lax.rem(me + k, jnp.int32(n))}) if axis else sums_ref
        for k in range(1, n + 1)
    )
    ref, scalar = plgpu.RefType(), plgpu.Layout.WG_SPLAT
    project, expand, contract = phases
    width, hidden_width = expand.depth, contract.depth
    stages, all_warps = config.stages, WARPS * programs

    @plgpu.inline_mgpu(arg_types=((ref,) * len(names), (ref,) * n, scalar, scalar))
    def body(_: Any, given: Any, peers: Any, program: Any, me: Any) -> None:
        i1, i16, i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (1, 16, 32, 64))
        f32, bf16 = ir.F32Type.get(), ir.BF16Type.get()
        of = dict(zip(names, map(utils.memref_ptr, given), strict=True))
        peers = [utils.memref_ptr(p) for p in peers]
        (program,), (me,) = program.registers.flat, me.registers.flat
        c = lambda v: utils.c(v, i32) if isinstance(v, int) else v
        zero_f = utils.c(0.0, f32)
        add = lambda *vs: functools.reduce(lambda a, b: arith.addi(c(a), c(b)), vs)
        sub, mul = (lambda a, b: arith.subi(c(a), c(b))), (lambda a, b: arith.muli(c(a), c(b)))
        div, rem = (lambda a, b: arith.divui(c(a), c(b))), (lambda a, b: arith.remui(c(a), c(b)))
        less = lambda a, b: arith.cmpi(arith.CmpIPredicate.ult, c(a), c(b))
        equal = lambda a, b: arith.cmpi(arith.CmpIPredicate.eq, c(a), c(b))
        ptx = functools.partial(utils.inline_ptx, has_side_effects=True)

        def at(pointer: Any, offset: Any) -> Any:
            """`pointer` plus bytes."""
            return llvm.getelementptr(
                pointer.type, pointer, [c(offset)], [-2147483648], ir.IntegerType.get_signless(8),
                llvm.GEPNoWrapFlags.none,
            )  # fmt: skip

        def far(pointer: Any, offset: Any, row: Any, size: int) -> Any:
            """`pointer` plus rows of so many bytes and an offset, in 64 bits."""
            wide = lambda v: arith.extui(i64, c(v))
            total = arith.addi(arith.muli(wide(row), utils.c(size, i64)), wide(offset))
            return llvm.getelementptr(
                pointer.type, pointer, [total], [-2147483648], ir.IntegerType.get_signless(8),
                llvm.GEPNoWrapFlags.none,
            )  # fmt: skip

        def load(type_: Any, lanes: int, pointer: Any) -> list[Any]:
            v = llvm.load(ir.VectorType.get((lanes,), type_), pointer)
            return [llvm.extractelement(v, c(i)) for i in range(lanes)]

        def store(values: Sequence[Any], pointer: Any) -> None:
            v = llvm.mlir_undef(ir.VectorType.get((len(values),), values[0].type))
            for i, value in enumerate(values):
                v = llvm.insertelement(v, value, c(i))
            llvm.store(v, pointer)

        low = lambda w: arith.bitcast(f32, arith.shli(w, c(16)))  # of two bfloat16
        high = lambda w: arith.bitcast(f32, arith.andi(w, c(-65536)))
        pack = lambda a, b: ptx("cvt.rn.bf16x2.f32 $0, $1, $2;", b, a, result_types=i32)
        rounded = lambda v: arith.extf(f32, arith.truncf(bf16, v))
        thread = utils.thread_idx()
        lane, warp = rem(thread, 32), div(thread, 32)
        sync = gpu.barrier

        def warp_sum(value: Any) -> Any:
            for distance in (16, 8, 4, 2, 1):
                value = arith.addf(value, utils.shfl_bfly(value, distance))
            return value

        # The ring of this warp.

        ring, barriers = at(of["ring"], mul(warp, stages * SLOT)), at(of["barriers"], mul(warp, 8 * stages))
        # Every other phase is dealt out from the last warp on, so that who got less gets more.
        worker = add(mul(warp, programs), program)
        dealt = [worker if i % 2 == 0 else sub(all_warps - 1, worker) for i in range(3)]
        units = [
            div(add(p.rows, sub(all_warps - 1, d)), all_warps) for p, d in zip(phases, dealt, strict=True)
        ]
        ends: list[Any] = [c(0)]
        for p, count in zip(phases, units, strict=True):
            ends.append(add(ends[-1], mul(count, p.copies)))

        def issue(number: Any) -> None:
            """Starts this warp's copy of that number, if there is one; one lane does."""
            slot = rem(number, stages)
            for i, p in enumerate(phases):
                here = arith.andi(
                    less(number, ends[i + 1]), arith.xori(less(number, ends[i]), utils.c(1, i1))
                )
                with utils.when(here):
                    k = sub(number, ends[i])
                    unit, copy = div(k, p.copies), rem(k, p.copies)
                    row = add(dealt[i], mul(unit, all_warps), mul(div(copy, p.parts), p.rows))
                    size = 2 * p.elements
                    matrix = of[("w_o", "w_in", "w_down")[i]]
                    ptx(
                        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;",
                        at(barriers, mul(slot, 8)),
                        c(size),
                    )
                    ptx(
                        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];",
                        at(ring, mul(slot, SLOT)),
                        far(matrix, mul(rem(copy, p.parts), size), row, 2 * p.depth),
                        c(size),
                        at(barriers, mul(slot, 8)),
                    )

        with utils.when(equal(lane, 0)):
            for i in range(stages):
                ptx("mbarrier.init.shared::cta.b64 [$0], 1;", at(barriers, 8 * i))
            ptx("fence.mbarrier_init.release.cluster;")
            for i in range(stages):
                issue(c(i))
        sync()

        def part(p: Phase, number: Any, offset: int, accs: list[Any]) -> list[Any]:
            """Adds the products of a copy with the input's elements from `offset` on."""
            slot, turn = rem(number, stages), div(number, stages)
            ptx(
                "{ .reg .pred p; WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; @!p bra WAIT; }",
                at(barriers, mul(slot, 8)),
                rem(turn, 2),
            )
            base = at(ring, mul(slot, SLOT))
            for k in range(-(-p.elements // 256)):
                there, left = None, p.elements - 256 * k
                first = add(mul(lane, 16), 512 * k)
                if left < 256:
                    there = less(mul(lane, 8), left)
                    first = arith.select(there, first, mul(lane, 0))
                w, x = load(i32, 4, at(base, first)), load(i32, 4, at(of["values"], add(first, 2 * offset)))
                for a, b in zip(w, x, strict=True):
                    if there is not None:
                        b = arith.select(there, b, c(0))
                    accs[0] = llvm.intr_fma(low(a), low(b), accs[0])
                    accs[1] = llvm.intr_fma(high(a), high(b), accs[1])
                    accs = accs[2:] + accs[:2]
            utils.warp_barrier()
            with utils.when(equal(lane, 0)):
                issue(add(number, stages))
            return accs

        def multiply(i: int, number: Any, send: Callable[..., None]) -> Any:
            """All of this warp's rows of a phase; `send` takes a row's number and its sums."""
            p = phases[i]

            def unit(j: Any, number: Any) -> Any:
                found = []
                for m in range(p.matrices):
                    accs = [zero_f] * 4
                    for k in range(p.parts):
                        accs = part(p, add(number, m * p.parts + k), k * p.elements, accs)
                    found.append(warp_sum(functools.reduce(arith.addf, accs)))
                send(add(dealt[i], mul(j, all_warps)), *found)
                return add(number, p.copies)

            return utils.fori(units[i], number)(unit).result

        # Words.

        (epoch,) = load(i32, 1, of["epochs"])
        epoch = add(epoch, 1)
        half = rem(epoch, 2)
        # sums [2 phases, 2 halves, n, D, 2], hidden [2 halves, F]
        place = lambda phase, source: mul(add(mul(add(mul(half, 1), 2 * phase), n), source), 8 * width)
        hidden = at(of["hidden"], mul(half, 4 * hidden_width))

        def send_sums(phase: int) -> Callable[..., None]:
            def send(row: Any, total: Any) -> None:
                for k, peer in enumerate(peers):
                    with utils.when(equal(lane, k)):
                        ptx(
                            "{ .reg .b64 a; mov.b64 a, {$1, $2}; st.relaxed.sys.global.b64 [$0], a; }",
                            at(peer, add(place(phase, me), mul(row, 8))),
                            arith.bitcast(i32, total),
                            epoch,
                        )

            return send

        tag = arith.andi(epoch, c(65535))

        def send_hidden(row: Any, gate: Any, up: Any) -> None:
            power = ptx(
                "ex2.approx.f32 $0, $1;",
                arith.mulf(gate, utils.c(-1.4426950408889634, f32)),
                result_types=f32,
            )
            sigmoid = ptx("rcp.approx.f32 $0, $1;", arith.addf(power, utils.c(1.0, f32)), result_types=f32)
            value = arith.mulf(arith.mulf(gate, sigmoid), up)
            word = arith.ori(arith.andi(pack(zero_f, value), c(-65536)), tag)
            with utils.when(equal(lane, 0)):
                ptx("st.relaxed.gpu.global.b32 [$0], $1;", at(hidden, mul(row, 4)), word)

        def poll(pointers: Sequence[Any], scope: str, stale: Callable[..., Any]) -> list[list[Any]]:
            """The 4 int32 at each of the pointers, once none of them is stale."""
            init = [c(0)] * (4 * len(pointers)) + [c(1)]
            types = [v.type for v in init]
            loop = scf.WhileOp(types, init)
            with ir.InsertionPoint(loop.before.blocks.append(*types)) as point:
                arguments = list(point.block.arguments)
                scf.condition(arith.cmpi(arith.CmpIPredicate.ne, arguments[-1], c(0)), arguments)
            with ir.InsertionPoint(loop.after.blocks.append(*types)):
                found, missing = [], c(0)
                for pointer in pointers:
                    words = ptx(
                        "{ .reg .b64 a, b; ld.relaxed." + scope + ".global.v2.b64 {a, b}, [$4];"
                        " mov.b64 {$0, $1}, a; mov.b64 {$2, $3}, b; }",
                        pointer,
                        result_types=[i32] * 4,
                    )
                    found += words
                    missing = arith.ori(missing, stale(*words))
                scf.yield_([*found, missing])
            results = list(loop.results)[:-1]
            return [results[i : i + 4] for i in range(0, len(results), 4)]

        pairs = [add(thread, THREADS * k) for k in range(width // 2 // THREADS)]

        def sums(phase: int) -> list[Any]:
            """The summed output of a phase in bfloat16: 2 values for each of this thread's pairs."""
            stale = lambda a, ea, b, eb: arith.ori(arith.xori(ea, epoch), arith.xori(eb, epoch))
            total: list[Any] = []
            for start in range(0, n, SOURCES):
                sources = range(start, min(n, start + SOURCES))
                pointers = [at(of["sums"], add(place(phase, k), mul(q, 16))) for k in sources for q in pairs]
                found = [arith.bitcast(f32, word[k]) for word in poll(pointers, "sys", stale) for k in (0, 2)]
                for i in range(0, len(found), 2 * len(pairs)):
                    values = found[i : i + 2 * len(pairs)]
                    total = (
                        [arith.addf(a, b) for a, b in zip(total, values, strict=True)] if total else values
                    )
            return [rounded(v) for v in total]

        def read_gains(gain: Any) -> list[Any]:
            return [v for q in pairs for v in load(f32, 2, at(gain, mul(q, 8)))]

        def normalised(residual: Sequence[Any], gains: Sequence[Any]) -> list[Any]:
            """The norm of the residual, which all threads of the program hold together."""
            square = zero_f
            for v in residual:
                square = llvm.intr_fma(v, v, square)
            square = warp_sum(square)
            with utils.when(equal(lane, 0)):
                store([square], at(of["squares"], mul(warp, 4)))
            sync()
            squares = load(f32, 4, of["squares"]) + load(f32, 4, at(of["squares"], 16))
            mean = arith.mulf(functools.reduce(arith.addf, squares), utils.c(1 / width, f32))
            scale = ptx("rsqrt.approx.f32 $0, $1;", arith.addf(mean, utils.c(eps, f32)), result_types=f32)
            return [arith.mulf(arith.mulf(v, scale), g) for v, g in zip(residual, gains, strict=True)]

        # The phases.

        for k in range(-(-project.depth // 8 // THREADS)):
            q = add(thread, THREADS * k)
            with utils.when(less(q, project.depth // 8)):
                store(load(i32, 4, at(of["y"], mul(q, 16))), at(of["values"], mul(q, 16)))
        residual = [v for q in pairs for v in load(f32, 2, at(of["x"], mul(q, 8)))]
        gains = read_gains(of["gain"])
        sync()
        number = multiply(0, c(0), send_sums(0))

        residual = [arith.addf(a, b) for a, b in zip(residual, sums(0), strict=True)]
        h = normalised(residual, gains)  # all warps are done with the values when its barrier is passed
        for k, q in enumerate(pairs):
            store([pack(h[2 * k], h[2 * k + 1])], at(of["values"], mul(q, 4)))
        sync()
        number = multiply(1, number, send_hidden)

        sync()
        stale = lambda *words: arith.andi(
            functools.reduce(arith.ori, [arith.xori(w, tag) for w in words]), c(65535)
        )
        places = [add(thread, THREADS * k) for k in range(-(-hidden_width // 4 // THREADS))]
        there = [less(q, hidden_width // 4) for q in places]
        inside = [arith.select(t, q, c(0)) for t, q in zip(there, places, strict=True)]
        found = poll([at(hidden, mul(q, 16)) for q in inside], "gpu", stale)
        for t, q, (a, b, d, e) in zip(there, places, found, strict=True):
            both = lambda a, b: arith.ori(arith.shrui(a, c(16)), arith.andi(b, c(-65536)))
            with utils.when(t):
                store([both(a, b), both(d, e)], at(of["values"], mul(q, 8)))
        sync()
        multiply(2, number, send_sums(1))

        with utils.when(equal(program, 0)):
            gains = read_gains(of["next_gain"])
            residual = [arith.addf(a, b) for a, b in zip(residual, sums(1), strict=True)]
            h = normalised(residual, gains)
            for k, q in enumerate(pairs):
                store(residual[2 * k : 2 * k + 2], at(of["total"], mul(q, 8)))
                store([pack(h[2 * k], h[2 * k + 1])], at(of["h"], mul(q, 4)))
            with utils.when(equal(thread, 0)):
                ptx("st.relaxed.gpu.global.b32 [$0], $1;", of["epochs"], epoch)

    body(tuple(refs), peers, lax.axis_index("program"), me)


def workspace_shapes(n: int, width: int, hidden: int) -> tuple[Any, ...]:
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.int32)
    return shape(1), shape(2, 2, n, 2 * width), shape(2, hidden)


def output_mlp(
    x: jax.Array,  # float32 [D]
    y: jax.Array,  # bfloat16 [K]
    w_o: jax.Array,  # [D, K]
    gain: jax.Array,  # float32 [D]
    w_in: jax.Array,  # [2, F, D]
    w_down: jax.Array,  # [D, F]
    next_gain: jax.Array,
    workspace: tuple[jax.Array, jax.Array, jax.Array],
    *,
    axis: str | None,
    eps: float,
    config: Config = Config(),
) -> tuple[jax.Array, jax.Array]:
    programs = check_device(None)[1]
    (d, k), f = w_o.shape, w_in.shape[1]
    phases = Phase(d, k), Phase(f, d, gated=True), Phase(d, f)
    n = workspace[1].shape[2]
    smem = lambda shape, dtype: plgpu.SMEM(shape, dtype)
    return plgpu.kernel(
        functools.partial(
            _kernel,
            phases=phases,
            config=config,
            n=n,
            axis=axis if n > 1 else None,
            programs=programs,
            eps=eps,
        ),
        out_type=[jax.ShapeDtypeStruct((d,), jnp.float32), jax.ShapeDtypeStruct((d,), jnp.bfloat16)],
        scratch_types=[
            smem((WARPS, config.stages, SLOT // 2), jnp.bfloat16),
            smem((2 * WARPS * config.stages,), jnp.int32),
            smem((max(k, d, f),), jnp.bfloat16),
            smem((WARPS,), jnp.float32),
        ],
        grid=(programs,),
        grid_names=("program",),
        num_threads=2,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, skip_device_barrier=True
        ),
        kernel_name="output_mlp",
    )(x, y, w_o, gain, w_in, w_down, next_gain, *workspace)
