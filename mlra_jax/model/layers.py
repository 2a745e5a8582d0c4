"""The layers around attention: parameters, RMSNorm, SwiGLU, rotary frequencies, the tied embedding."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mlra_jax.config import ModelConfig, require
from mlra_jax.model.lookup import take_rows
from mlra_jax.ops.all_reduce import Workspace, all_reduce_add_rms_norm
from mlra_jax.ops.device import current_device
from mlra_jax.ops.dispatch import chosen
from mlra_jax.ops.norm import add_rms_norm
from mlra_jax.ops.norm.reference import rms_norm
from mlra_jax.ops.remat import HIDDEN, MLP, PRODUCT
from mlra_jax.ops.rotary import Frequencies, frequencies, interpolated, ntk_base, yarn, yarn_magnitude
from mlra_jax.ops.skinny_gemm import has_kernel, skinny_gemm, swiglu
from mlra_jax.sharding import AxisRules, Names, current_mesh

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]

Layout = Literal["train", "decode"]
"""How a module keeps its parameters: for whole sequences, or for cached decoding (docs/architecture.md).

In the decode layout, cached heads are laid out by KV-head shard, matrices that multiply the same input are joined, and
the axis that a product sums over comes last: with few tokens, a product is as fast as its weights are read, which is
fastest once and in memory order.
"""

STORAGE_AXES = ("embed", "rank")
"""Logical axes along which parameters are stored split but used whole."""


class Relayout(NamedTuple):
    """How one layer's parameter of the decode layout is made from parameters of the training layout."""

    sources: tuple[str, ...]
    """Dotted names in the module."""
    make: Callable[..., jax.Array]
    """Makes the parameter from the values of the sources."""


DecodeLeaves = Mapping[str, Relayout]
"""The parameters of a module that the decode layout changes, by dotted name; all others stay as they are."""


def nested(name: str, leaves: DecodeLeaves) -> DecodeLeaves:
    """The same leaves as seen from a module that holds their module as attribute `name`."""
    prefix = lambda path: f"{name}.{path}"
    return {prefix(k): Relayout(tuple(map(prefix, v.sources)), v.make) for k, v in leaves.items()}


def check(config: ModelConfig, layout: Layout) -> None:
    """Checks a module's arguments before it allocates anything.

    Raises:
      ConfigError: lists every fault of `config`, or `layout` is not one.
    """
    config.validate()
    require(Layout, layout=layout)


class WithLayout(nnx.Module):
    """A module whose parameters have a `Layout`."""

    layout: Layout

    def require_layout(self, needed: Layout) -> None:
        """Checks that the module, its parts and their parameters have the layout that a call needs.

        Raises:
          NotImplementedError: `layout` is not `needed`; the message says what to do.
          ValueError: a parameter has been given a value of the other layout since the module was made.
        """
        if self.layout != needed:
            raise NotImplementedError(
                "A module in the decode layout runs `decode`; build one with layout='train'."
                if needed == "train"
                else "A module in the training layout cannot decode; convert it with `to_decode`."
            )
        for name, param in vars(self).items():
            if isinstance(param, nnx.Param) and (stored(param).shape, needed) != param.get_metadata(
                "made", None
            ):
                raise ValueError(
                    f"{type(self).__name__}.{name} holds a parameter of another layout, {stored(param).shape}: this "
                    f"module is in the {needed} layout; convert a model or layer with `to_decode`."
                )
            if isinstance(param, WithLayout):
                param.require_layout(needed)


def lay_out_for_decoding(
    rules: AxisRules, abstract: nnx.State, given: Mapping[Any, jax.Array], relayouts: DecodeLeaves
) -> dict[Any, jax.Array]:
    """The parameters of one module in the decode layout, by path.

    Args:
      rules: the decoding table.
      abstract: abstract state of the module in the decode layout.
      given: parameters of the training layout, by path.
      relayouts: the module's `decode_leaves`.
    """

    def lay_out(path: Any, names: Names) -> jax.Array:
        name = ".".join(path)
        relayout = relayouts.get(name, Relayout((name,), lambda value: value))
        values = (given[tuple(source.split("."))] for source in relayout.sources)
        return jax.jit(lambda *values: rules.constrain(relayout.make(*values), *names))(*values)

    return {path: lay_out(path, x.get_metadata("out_sharding")) for path, x in nnx.to_flat_state(abstract)}


def parameter(
    rngs: nnx.Rngs,
    rules: AxisRules,
    shape: tuple[int, ...],
    names: tuple[str | None, ...],
    init: Initializer,
    dtype: str,
    layout: Layout | None = None,
) -> nnx.Param:
    """A parameter with logical axis names, created already split over the current mesh, if there is one.

    The names are stored as Flax's `out_sharding` metadata. Flax's own eager sharding is off because it does not work
    without a mesh.
    """
    value = rules.constrain(init(rngs.params(), shape, jnp.dtype(dtype)), *names)
    return nnx.Param(value, out_sharding=names, eager_sharding=False, made=(shape, layout))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Summed:
    """A parameter's value with the float32 sum to which its gradients are added.

    The "gradient" with respect to `total` is `total` plus the gradient with respect to `value`; `value` itself has
    none. Whatever computes a gradient can thus accumulate it right away, as products on a single device do.
    """

    value: jax.Array
    total: jax.Array


@jax.custom_vjp
def adding(value: jax.Array, total: jax.Array) -> jax.Array:
    """`value`, with its gradient added to `total` (`Summed`)."""
    return value


adding.defvjp(
    lambda value, total: (value, total), lambda total, gradient: (None, total + gradient.astype(total.dtype))
)


def stored(param: nnx.Param, dtype: jnp.dtype | None = None) -> jax.Array:
    """The parameter's value, cast if a type is given."""
    value = param.get_value()
    value = adding(value.value, value.total) if isinstance(value, Summed) else value
    return value if dtype is None else value.astype(dtype)


def weight(rules: AxisRules, param: nnx.Param, dtype: jnp.dtype | None = None) -> jax.Array:
    """The parameter as products use it: cast, then gathered where only its storage is split (FSDP)."""
    value = stored(param, dtype)
    # Without the leading "layers" of a stacked parameter.
    names = param.get_metadata("out_sharding")[-value.ndim :]
    return rules.gather(value, names, tuple(None if name in STORAGE_AXES else name for name in names))


def _one_row_on_gpu(rules: AxisRules, x: jax.Array) -> bool:
    """Whether the device is a GPU with a single row of x [B, T, ...]."""
    return x.shape[0] * x.shape[1] == rules.size("batch") and current_device()[0] == "gpu"


def _runs_op(op: str, rules: AxisRules, x: jax.Array) -> bool:
    """Whether each device multiplies the rows of x [B, T, ...] by `op`, instead of one XLA product over all devices."""
    return chosen(op) is not None or has_kernel(x.shape[0] * x.shape[1] // rules.size("batch"), x.dtype)


def decode_product(
    rules: AxisRules,
    x: jax.Array,
    w: jax.Array,
    out: Names,
    dtype: jnp.dtype | None = None,
    *,
    summed: Names = (None,),
    reduce: bool = True,
    elementwise: bool = False,
) -> jax.Array:
    """Products of the rows x [B, T, *I] with a matrix of the decode layout, w [*O, *I]: [B, T, *O].

    For few rows on a Hopper GPU, and where `choose` names implementations of the op `skinny_gemm`, each device
    multiplies its own part with that op, and partial sums are added in float32; otherwise it is one einsum.

    Args:
      rules: the decoding table.
      x: in the compute type.
      w: in the compute type.
      out: logical axes of the result.
      dtype: type of the result; None: that of `x`.
      summed: logical axes of I.
      reduce: whether the partial sums of the devices that split I are added. If not, the result is [P, B, T, *O] in
        float32, each of P devices' own.
      elementwise: multiply and sum in float32, without a matrix product.
    """
    dtype, axes = jnp.dtype(dtype or x.dtype), len(summed)
    names = [name for name in summed if name is not None]
    runs_op = not elementwise and _runs_op("skinny_gemm", rules, x)
    i = "I" if axes == 1 else "NH"

    def multiply(x: jax.Array, w: jax.Array, dtype: jnp.dtype) -> jax.Array:
        if elementwise:
            x = jnp.expand_dims(x.astype(jnp.float32), tuple(range(2, w.ndim - axes + 2)))
            return (x * w.astype(jnp.float32)).sum(axis=tuple(range(-axes, 0))).astype(dtype)
        if runs_op:
            flat = lambda a: a.reshape(-1, math.prod(a.shape[-axes:]))
            return skinny_gemm(flat(x), flat(w), dtype=dtype).reshape(*x.shape[:2], *w.shape[:-axes])
        return jnp.einsum(f"BT{i},...{i}->BT...", x, w, preferred_element_type=dtype)

    if reduce and elementwise:
        return rules.constrain(multiply(x, w, dtype), *out)
    if reduce and not runs_op:
        return rules.einsum(f"BT{i},...{i}->BT...", x, w, out=out, preferred_element_type=dtype)
    split = any(rules.size(name) > 1 for name in names)
    part = jnp.dtype(jnp.float32) if split or not reduce else dtype

    def on_device(x: jax.Array, w: jax.Array) -> jax.Array:
        y = multiply(x, w, part)
        if not reduce:
            return y[None]
        for name in names:
            y = rules.psum(y, name)
        return y.astype(dtype)

    result = out if reduce else (names[0], *out)
    return rules.shard_map(on_device, ((*out[:2], *summed), (*out[2:], *summed)), result)(x, w)


def row_product(
    rules: AxisRules,
    x_BTI: jax.Array,
    w: jax.Array,
    out: Names,
    dtype: jnp.dtype | None = None,
    *,
    summed: str | None = None,
    reduce: bool = True,
) -> jax.Array:
    """`decode_product` with a large matrix, w [*O, I].

    A single row on a GPU is multiplied elementwise and summed, in float32: XLA then reads an MLP's weights at 2.9 TB/s
    on an H100, and in matrix products at 2.6 (docs/decoding.md). With small matrices XLA does so by itself. `choose`
    does not change this.
    """
    one_row = _one_row_on_gpu(rules, x_BTI)
    return decode_product(rules, x_BTI, w, out, dtype, summed=(summed,), reduce=reduce, elementwise=one_row)


def product(rules: AxisRules, equation: str, x: jax.Array, param: nnx.Param, *, out: Names) -> jax.Array:
    """`einsum` of `x` and a parameter, in the type of `x`, with the logical axes `out`.

    Each axis must occur in at least two of `x`, the parameter and the result.
    """
    if _sums(param):
        return _summed_products(rules, x, (equation, param, out))[0]
    return rules.einsum(equation, x, weight(rules, param, x.dtype), out=out)


def products(rules: AxisRules, x: jax.Array, *factors: tuple[str, nnx.Param, Names]) -> list[jax.Array]:
    """`product`s of `x` [..., D] with parameters [D, ...], each with its equation and the axes of the result.

    Where products accumulate the gradients of the parameters (`Summed`), on one device, the gradient of `x` is a single
    product.
    """
    if all(_sums(param) for _, param, _ in factors):
        return _summed_products(rules, x, *factors)
    return [product(rules, equation, x, param, out=out) for equation, param, out in factors]


def _sums(param: nnx.Param) -> bool:
    """Whether products with `param` add to its sum of gradients themselves."""
    if not isinstance(param.get_value(), Summed):
        return False
    # Devices that split tokens must sum their gradients first.
    mesh = current_mesh()
    return mesh is None or mesh.size == mesh.shape.get("tensor", 1)


def _summed_products(
    rules: AxisRules, x: jax.Array, *factors: tuple[str, nnx.Param, Names]
) -> list[jax.Array]:
    equations, params, outs = zip(*factors, strict=True)
    values = [param.get_value() for param in params]
    results = _of_summed(rules, equations, outs, x, [v.value for v in values], [v.total for v in values])
    # Remat policies do not see products inside a function with a custom derivative.
    return [checkpoint_name(y, PRODUCT) for y in results]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _of_summed(
    rules: AxisRules,
    equations: tuple[str, ...],
    outs: tuple[Names, ...],
    x: jax.Array,
    values: list[jax.Array],
    totals: list[jax.Array],
) -> list[jax.Array]:
    factors = zip(equations, values, outs, strict=True)
    return [rules.einsum(equation, x, w.astype(x.dtype), out=out) for equation, w, out in factors]


def _summed_forward(*args: Any) -> tuple[list[jax.Array], Any]:
    return _of_summed(*args), args[3:]


def _summed_backward(
    rules: AxisRules,
    equations: tuple[str, ...],
    outs: tuple[Names, ...],
    saved: Any,
    gradients: list[jax.Array],
) -> tuple[jax.Array, None, list[jax.Array]]:
    del rules, outs
    x, values, totals = saved
    like = lambda a: {"out_sharding": spec} if any(spec := jax.typeof(a).sharding.spec) else {}
    added = []
    for equation, total, g in zip(equations, totals, gradients, strict=True):
        of_x, of_value, output = equation.replace("->", ",").split(",")
        # On GPUs the product itself can add to the sum if its result has the sum's type.
        back, dtype = f"{of_x},{output}->{of_value}", total.dtype
        added.append(total + jnp.einsum(back, x, g, preferred_element_type=dtype, **like(total)))
    mesh = current_mesh()
    if len(values) > 1 and (mesh is None or mesh.size == 1):
        equations = ("BTD,DF->BTF",)
        gradients = [jnp.concatenate([g.reshape(*x.shape[:-1], -1) for g in gradients], axis=-1)]
        values = [jnp.concatenate([w.reshape(x.shape[-1], -1) for w in values], axis=-1)]
    d_x = []
    for equation, w, g in zip(equations, values, gradients, strict=True):
        of_x, of_value, output = equation.replace("->", ",").split(",")
        d_x.append(jnp.einsum(f"{output},{of_value}->{of_x}", g, w.astype(x.dtype), **like(x)))
    return functools.reduce(operator.add, d_x), None, added


_of_summed.defvjp(_summed_forward, _summed_backward)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis, with a gain of the given `shape` over the last axes.

    Statistics are float32; the normalised input is rounded to its own type before the gain, and the product with the
    float32 gain is float32, as in the official code.
    """

    def __init__(
        self,
        config: ModelConfig,
        shape: tuple[int, ...],
        names: tuple[str | None, ...],
        *,
        rngs: nnx.Rngs,
        rules: AxisRules,
    ):
        self.eps = config.norm_eps
        self.rules, self.compute_dtype = rules, jnp.dtype(config.compute_dtype)
        ones = lambda key, shape, dtype: jnp.ones(shape, dtype)
        self.gain = parameter(rngs, rules, shape, names, ones, config.param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises `x` [..., *shape]; returns float32."""
        return rms_norm(x, weight(self.rules, self.gain), self.eps)

    def of_sum(
        self,
        x_BTD: jax.Array,
        y_BTD: jax.Array,
        names: Names = ("batch", None, None),
        workspace: Workspace | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """x + y in float32, and its norm.

        Args:
          x_BTD: the residual stream, float32.
          y_BTD: what is added, in the type of the norm; or, with a workspace, each device's part of it,
            [P, B, T, D] in float32.
          names: the residual stream's logical axes.
          workspace: through which the devices exchange their parts.
        """
        row, gain = names, weight(self.rules, self.gain)
        if workspace is None:
            add = lambda *args: add_rms_norm(*args, eps=self.eps)
            return self.rules.shard_map(add, (row, row, (None,)), (row, row))(x_BTD, y_BTD, gain)
        (axis,) = self.rules.mesh_axes("mlp")  # as all that is summed (`Workspace.shapes`)
        options: Any = {"axis": axis, "eps": self.eps, "dtype": self.compute_dtype}
        add = lambda x, y, *args: all_reduce_add_rms_norm(x, y[0], *args, **options)
        part = ("mlp",)
        # All devices return the same; the check cannot infer that.
        mapped = self.rules.shard_map(
            add, (row, (*part, *row), (None,), Workspace(part, part)), (row, row), check_vma=False
        )
        return mapped(x_BTD, y_BTD, gain, workspace)


def rotary_frequencies(config: ModelConfig, width: int) -> Frequencies:
    """The frequencies of a rotary vector of width R; a configuration's only say in how positions rotate."""
    base, scaling = config.rope_base, config.rotary_scaling
    if scaling.method == "linear":
        return interpolated(width, base, scaling.factor)
    if scaling.method == "ntk":
        return frequencies(width, ntk_base(width, base, scaling.factor))
    if scaling.method == "yarn":
        of = functools.partial(yarn_magnitude, scaling.factor)
        return yarn(
            width,
            base,
            scaling.factor,
            original_max_position=scaling.original_max_position,
            beta_fast=scaling.beta_fast,
            beta_slow=scaling.beta_slow,
            magnitude=of(scaling.mscale) / of(scaling.mscale_all_dim),
        )
    return frequencies(width, base)


def softmax_scale(config: ModelConfig, width: int) -> float:
    """What scores of queries and keys of this width are multiplied by: 1/sqrt(width), and more with YaRN."""
    scaling = config.rotary_scaling
    sharper = yarn_magnitude(scaling.factor, scaling.mscale_all_dim) ** 2 if scaling.method == "yarn" else 1.0
    return sharper / math.sqrt(width)


def normal(config: ModelConfig) -> Initializer:
    """N(0, init_std**2)."""
    return lambda key, shape, dtype: config.init_std * jax.random.normal(key, shape, dtype)


def uniform(bound: float) -> Initializer:
    """Uniform between -bound and bound."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def output_init(config: ModelConfig) -> Initializer:
    """Initialiser of attention's and the MLP's output projections: zeros in the paper, normal in its ablation."""
    zeros: Initializer = lambda key, shape, dtype: jnp.zeros(shape, dtype)
    return zeros if config.output_init == "zeros" else normal(config)


MLP_UNIT = 128
"""In the decode layout the MLP's width on a device is zero-padded to a multiple of this: compilers split the sum over
it, and would otherwise copy the weights at every step to pad them."""


class SwiGLU(WithLayout):
    """W_down (silu(W_gate x) * (W_up x)).

    Args:
      config: the model's configuration.
      rngs: for the initial parameters.
      rules: the table of logical axis names; without a mesh nothing is split.
      layout: `train` has w_gate and w_up [D, F], w_down [F, D]; `decode` has w_in [2, F, D] with the first two, and
        w_down [D, F], F rounded up.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, rules: AxisRules, layout: Layout = "train"):
        d, f, dtype = config.d_model, config.d_ff, config.param_dtype
        self.rules, self.layout = rules, layout
        self.compute_dtype = jnp.dtype(config.compute_dtype)
        if layout == "train":
            self.w_gate = parameter(rngs, rules, (d, f), ("embed", "mlp"), normal(config), dtype, layout)
            self.w_up = parameter(rngs, rules, (d, f), ("embed", "mlp"), normal(config), dtype, layout)
            self.w_down = parameter(rngs, rules, (f, d), ("mlp", "embed"), output_init(config), dtype, layout)
        else:
            unit = MLP_UNIT * rules.size("mlp")
            f = -(-f // unit) * unit
            self.w_in = parameter(
                rngs, rules, (2, f, d), (None, "mlp", "embed"), normal(config), dtype, layout
            )
            self.w_down = parameter(rngs, rules, (d, f), ("embed", "mlp"), output_init(config), dtype, layout)

    @staticmethod
    def decode_leaves(config: ModelConfig, rules: AxisRules) -> DecodeLeaves:
        """How the decode layout makes the parameters that differ from the training layout's."""
        parts = rules.size("mlp")
        padding = -(config.d_ff // parts) % MLP_UNIT

        def pad(w_FD: jax.Array) -> jax.Array:
            # On each device separately, so that nothing moves.
            by_device = lambda w_FD: jnp.pad(w_FD, ((0, padding), (0, 0)))
            return rules.shard_map(by_device, (("mlp", None),), ("mlp", None))(w_FD)

        return {
            "w_in": Relayout(("w_gate", "w_up"), lambda gate, up: jnp.stack([pad(gate.T), pad(up.T)])),
            "w_down": Relayout(("w_down",), lambda down: pad(down).T),
        }

    def __call__(self, x_BTD: jax.Array, *, reduce: bool = True) -> jax.Array:
        """[B, T, D] to [B, T, D] in the compute type; without `reduce`, see `decode_product`."""
        self.require_layout(self.layout)
        rules, dtype = self.rules, self.compute_dtype
        x_BTD = x_BTD.astype(dtype)
        hidden, out = ("batch", "length", "mlp"), ("batch", "length", None)
        # F is split over `tensor`: the product that sums over it all-reduces.
        if self.layout == "decode":
            hidden_BTF = self._hidden(x_BTD, weight(rules, self.w_in, dtype))
            w_down = weight(rules, self.w_down, dtype)
            return row_product(rules, hidden_BTF, w_down, out, summed="mlp", reduce=reduce)
        gate_BTF = product(rules, "BTD,DF->BTF", x_BTD, self.w_gate, out=hidden)
        up_BTF = product(rules, "BTD,DF->BTF", x_BTD, self.w_up, out=hidden)
        gate_BTF, up_BTF = checkpoint_name(gate_BTF, MLP), checkpoint_name(up_BTF, MLP)
        hidden_BTF = checkpoint_name(jax.nn.silu(gate_BTF) * up_BTF, HIDDEN)
        return product(rules, "BTF,FD->BTD", hidden_BTF, self.w_down, out=out)

    def _hidden(self, x_BTD: jax.Array, w_ZFD: jax.Array) -> jax.Array:
        """silu(W_gate x) * (W_up x) [B, T, F] in the decode layout."""
        rules, row = self.rules, ("batch", "length", None)
        if not _runs_op("swiglu", rules, x_BTD) or _one_row_on_gpu(rules, x_BTD):
            in_BTZF = row_product(rules, x_BTD, w_ZFD, (*row, "mlp"))
            return jax.nn.silu(in_BTZF[:, :, 0]) * in_BTZF[:, :, 1]

        def on_device(x_BTD: jax.Array, w_ZFD: jax.Array) -> jax.Array:
            b, t, d = x_BTD.shape
            return swiglu(x_BTD.reshape(b * t, d), w_ZFD).reshape(b, t, -1)

        mapped = rules.shard_map(on_device, (row, (None, "mlp", None)), ("batch", "length", "mlp"))
        return mapped(x_BTD, w_ZFD)


class Embedding(nnx.Module):
    """The tied token matrix: its rows embed tokens, and their products with the last hidden state are the logits."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, rules: AxisRules):
        self.rules = rules
        self.compute_dtype = jnp.dtype(config.compute_dtype)
        shape = (config.vocab_size, config.d_model)
        self.table = parameter(rngs, rules, shape, ("vocab", "embed"), normal(config), config.param_dtype)

    def encode(self, tokens_BT: jax.Array, *, reduce: bool = True) -> jax.Array:
        """Rows of the token ids [B, T], as float32 [B, T, D]; ids must be in [0, vocab_size).

        Without `reduce` (only to decode): of each device that splits the vocabulary what it has of them, zeros
        elsewhere, [P, B, T, D].
        """
        rules = self.rules

        stored = rules.within("embed", "batch")

        def lookup(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
            # The table stays where it is: each device looks up, for all the devices among which D is split, its own
            # part of D in the rows that it holds, and they exchange what they found.
            table_VD = rules.vary(table_VD, "batch", "length")
            tokens_BT = rules.all_gather(tokens_BT, stored, axis=0)
            # Elsewhere XLA's own gradient has the same bits each time too.
            take = take_rows if current_device()[0] == "gpu" else operator.getitem
            if not rules.mesh_axes("vocab"):
                x_BTD = take(table_VD, tokens_BT)
            else:
                rows = table_VD.shape[0]
                local_BT = tokens_BT - rules.axis_index("vocab") * rows
                held_BT = (local_BT >= 0) & (local_BT < rows)
                x_BTD = jnp.where(held_BT[..., None], take(table_VD, jnp.clip(local_BT, 0, rows - 1)), 0)
                if not reduce:
                    return x_BTD[None].astype(jnp.float32)
                x_BTD = rules.psum(x_BTD, "vocab")
            return rules.all_to_all(x_BTD, stored, split=0, joined=2).astype(jnp.float32)

        token_names = ("batch", "length")
        part = () if reduce else ("vocab",)
        mapped = rules.shard_map(lookup, (("vocab", stored), token_names), (*part, *token_names, None))
        return mapped(self.table[...], tokens_BT)

    def decode(self, x: jax.Array) -> jax.Array:
        """Float32 logits [B, T, V] of the hidden states [B, T, D]."""
        table = weight(self.rules, self.table, self.compute_dtype)
        names = ("batch", "length", "vocab")
        x = x.astype(self.compute_dtype)
        return row_product(self.rules, x, table, names, jnp.dtype(jnp.float32))
