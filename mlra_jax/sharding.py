"""The device mesh, and the tables that map logical axis names to mesh axes.

Axes of parameters and activations have logical names ("batch", "heads", "kv_head_shards"...). An `AxisRules` table says
which mesh axes split each name. Training and decoding run the same modules under two tables: training splits the query
heads, decoding the latent heads (docs/sharding.md).

Everything also works without a mesh (nothing is split), on a mesh with Auto axes (the table becomes constraints for the
partitioner), and on a mesh with other axis names under the caller's own table. Names that the table or the mesh lacks
are not split.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mlra_jax.config import ConfigError, MeshConfig, ModelConfig, TrainConfig
from mlra_jax.ops.shard_map_utils import varying

MESH_AXES = ("data", "fsdp", "tensor", "context")

Names = tuple[str | None, ...]


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the explicit axes `data`, `fsdp`, `tensor` and `context` over `devices` (default: all).

    Where the devices form several slices (TPU slices, hosts of GPUs) with a slower network between them, slices are
    laid along `data`, and along `fsdp` where `data` is too small; `tensor` and `context` stay inside a slice.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or do not fit the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.resolve(len(devices))
    shape = tuple(getattr(sizes, axis) for axis in MESH_AXES)
    types = (AxisType.Explicit,) * len(MESH_AXES)
    n_slices = len({getattr(device, "slice_index", None) for device in devices})
    if n_slices == 1:
        try:
            return jax.make_mesh(shape, MESH_AXES, types, devices=devices)
        except NotImplementedError:  # a mesh axis is not a product of the slice's axes, such as 8 on 4x4x4
            laid_out = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        except AssertionError:  # a TPU whose chips are two devices each, which JAX does not lay out
            laid_out = np.array(devices).reshape(shape)
        return Mesh(laid_out, MESH_AXES, axis_types=types)
    between = _slices_along(sizes, n_slices)
    within = tuple(size // n for size, n in zip(shape, between, strict=True))
    laid_out = mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    return Mesh(laid_out, MESH_AXES, axis_types=types)


def _slices_along(sizes: MeshConfig, n_slices: int) -> tuple[int, int, int, int]:
    """The number of slices along each of `MESH_AXES`."""
    along_data = math.gcd(sizes.data, n_slices)
    along_fsdp = n_slices // along_data
    if sizes.fsdp % along_fsdp:
        raise ConfigError(
            f"mesh.data={sizes.data} x mesh.fsdp={sizes.fsdp} cannot be laid out on {n_slices} slices (TPU slices "
            f"or hosts of GPUs): tensor and context stay inside a slice; use --mesh.data {n_slices} or a multiple."
        )
    return along_data, along_fsdp, 1, 1


def abstract_mesh(
    config: MeshConfig, device: AbstractDevice | None = None, n_slices: int = 1
) -> AbstractMesh:
    """A mesh of these sizes without devices, for `jax.sharding.use_abstract_mesh` and `jax.eval_shape`.

    Args:
      config: sizes, none of them -1.
      device: what programs are traced for; None: JAX's default device.
      n_slices: slices that the devices form; see `make_mesh`.

    Raises:
      ConfigError: the sizes do not fit the slices.
    """
    _slices_along(config, n_slices)
    sizes = tuple(getattr(config, axis) for axis in MESH_AXES)
    types = (AxisType.Explicit,) * len(MESH_AXES)
    return AbstractMesh(sizes, MESH_AXES, axis_types=types, abstract_device=device)


def current_mesh() -> AbstractMesh | None:
    """The mesh of the enclosing `jax.set_mesh`, or None outside one and inside `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.are_all_axes_manual else mesh


def on_mesh(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The `ShapeDtypeStruct`s of `jax.eval_shape` under `mesh`, laid out on it."""

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = x.sharding.spec if x.sharding is not None else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """A table from logical axis names to the mesh axes that split them.

    It is frozen and hashable, so that a module that holds one can be an argument of a compiled function.
    """

    table: tuple[tuple[str, tuple[str, ...]], ...] = ()
    zigzag: bool = False
    """Whether each of n devices that split `length` has two runs of tokens, numbers i and 2n - 1 - i of 2n, so that
    causal attention is as much work on each; else one. Sequences then are in the order of `in_order`."""

    @classmethod
    def of(cls, **rules: str | tuple[str, ...] | None) -> AxisRules:
        """`AxisRules.of(batch=("data", "fsdp"), heads="tensor", mlp=None)`."""
        if "latent_slots" in rules:
            warnings.warn("latent_slots is called kv_head_shards now.", DeprecationWarning, stacklevel=2)
            rules["kv_head_shards"] = rules.pop("latent_slots")
        as_tuple = {k: (v,) if isinstance(v, str) else v or () for k, v in rules.items()}
        return cls(tuple(sorted(as_tuple.items())))

    def mesh_axes(self, name: str | None) -> tuple[str, ...]:
        """Axes of the current mesh that split the logical axis `name`."""
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or name is None:
            return ()
        return tuple(axis for axis in dict(self.table).get(name, ()) if axis in mesh.axis_names)

    def spec(self, *names: str | None) -> PartitionSpec:
        """The `PartitionSpec` of an array whose axes have these logical names (None: not split)."""
        axes = [self.mesh_axes(name) for name in names]
        return PartitionSpec(*(a[0] if len(a) == 1 else a or None for a in axes))

    def size(self, name: str) -> int:
        """Number of parts into which the current mesh splits `name`."""
        mesh = jax.sharding.get_abstract_mesh()
        return math.prod(mesh.shape[axis] for axis in self.mesh_axes(name))

    def fitting(self, name: str, size: int) -> str | None:
        """`name` if its mesh axes divide `size`, else None: for axes that are kept whole where they do not divide."""
        return name if size % self.size(name) == 0 else None

    def constrain(self, x: jax.Array, *names: str | None) -> jax.Array:
        """`x` laid out by the table: resharded on an explicit mesh, constrained on an Auto mesh, else unchanged."""
        mesh = current_mesh()
        if mesh is None:
            return x
        if mesh.are_all_axes_explicit:
            return jax.sharding.reshard(x, self.spec(*names))
        return jax.lax.with_sharding_constraint(x, self.spec(*names))

    def gather(self, x: jax.Array, stored: Names, used: Names) -> jax.Array:
        """Gathers a weight from the layout in which it is `stored`, split over more mesh axes, to the one that is
        `used`.

        On an explicit mesh, its gradient is summed and scattered over the axes that split the storage, and then summed
        over the other axes that split tokens, so that each device gets its part. Where the weight's type says that it
        is `reduced` over these other axes, the last sum is left to the caller. Without this, the compiler would sum the
        whole gradient on every device.
        """
        mesh = current_mesh()
        own = {axis for name in used for axis in self.mesh_axes(name)}
        summed = {*self.mesh_axes("batch"), *self.mesh_axes("length")} - own
        split = {axis for name in stored for axis in self.mesh_axes(name)} - own
        explicit = mesh is not None and mesh.are_all_axes_explicit
        if not explicit or not (split or jax.typeof(x).sharding.spec.reduced) or not split <= summed:
            return self.constrain(x, *used)
        parts = PartitionSpec(*self.spec(*stored), reduced=summed - split)
        whole = PartitionSpec(*self.spec(*used), reduced=summed)
        return jax.sharding.reshard(jax.sharding.reshard(x, parts), whole)

    def einsum(self, equation: str, *operands: jax.Array, out: Names, **kwargs: Any) -> jax.Array:
        """`jnp.einsum` whose result has the logical axes `out`.

        If a contracted axis is split, the all-reduce (or reduce-scatter) happens here.
        """
        mesh = current_mesh()
        if mesh is not None and mesh.are_all_axes_explicit:
            return jnp.einsum(equation, *operands, out_sharding=self.spec(*out), **kwargs)
        return self.constrain(jnp.einsum(equation, *operands, **kwargs), *out)

    def shard_map(self, f: Callable, in_names: Any, out_names: Any, **kwargs: Any) -> Callable:
        """`f` run on each device's part of its arguments; without a mesh, `f` itself.

        Args:
          f: a function of local arrays; communicates through this table's `axis_index`, `psum` and so on.
          in_names: for each argument, a tuple of logical names or a pytree of `PartitionSpec`s.
          out_names: the same for the result.
        """
        if current_mesh() is None:
            return f

        def to_specs(tree: Any) -> Any:
            is_names = lambda x: isinstance(x, tuple) and all(n is None or isinstance(n, str) for n in x)
            is_leaf = lambda x: isinstance(x, PartitionSpec) or is_names(x)
            as_spec = lambda x: x if isinstance(x, PartitionSpec) else self.spec(*x)
            return jax.tree.map(as_spec, tree, is_leaf=is_leaf)

        in_specs, out_specs = to_specs(in_names), to_specs(out_names)
        # Outside a compiled function, plain `shard_map` would compile every operation separately, at every call.
        mapped = jax.jit(jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, **kwargs))

        def call(*args: Any) -> Any:
            mesh = current_mesh()
            if mesh is not None and mesh.are_all_axes_explicit:
                args = jax.sharding.reshard(args, in_specs)
            return mapped(*args)

        return call

    # Where tokens are:

    def in_order(self, x: jax.Array, axis: int) -> jax.Array:
        """`x` with its tokens along `axis` in the order in which devices hold them, which matters to attention alone.

        Args:
          x: in natural order; an axis before `axis` is the batch.
          axis: of tokens; their number is a multiple of 2n.
        """
        n = self.size("length") if self.zigzag else 1
        if n == 1:
            return x
        names = ["batch" if i == axis - 1 else None for i in range(x.ndim)]
        x = self.constrain(x, *names)
        first, last = jnp.split(x.reshape(*x.shape[:axis], 2 * n, -1, *x.shape[axis + 1 :]), 2, axis)
        ordered = jnp.stack([first, jnp.flip(last, axis)], axis + 1).reshape(x.shape)
        return self.constrain(ordered, *["length" if i == axis else name for i, name in enumerate(names)])

    def positions(self, length: int) -> jax.Array:
        """The position of each of `length` tokens, laid out as they are."""
        return self.constrain(self.in_order(jnp.arange(length), 0), "length")

    # Inside `shard_map`:

    def runs(self, length: int) -> list[tuple[jax.Array | int, slice]]:
        """The runs of successive tokens among a device's `length`: the first one's position, and where they are."""
        i, n = self.axis_index("length"), self.size("length")
        if not self.zigzag or n == 1:
            return [(i * length, slice(None))]
        half = length // 2
        return [(i * half, slice(half)), ((2 * n - 1 - i) * half, slice(half, None))]

    def axis_index(self, name: str) -> jax.Array | int:
        """The index of this device's part of the logical axis; 0 where it is not split."""
        axes = self.mesh_axes(name)
        return jax.lax.axis_index(axes) if self.size(name) > 1 else 0

    def vary(self, x: jax.Array, *names: str) -> jax.Array:
        """`x` marked as varying between the devices that split any of `names`: its gradient is summed over them."""
        axes = dict.fromkeys(axis for name in names for axis in self.mesh_axes(name))
        return varying(x, frozenset(axes)) if axes else x

    def within(self, name: str, other: str) -> str | None:
        """`name` if `other` is split over all of its mesh axes too, so that `shard_map` may gather it; else None."""
        return name if set(self.mesh_axes(name)) <= set(self.mesh_axes(other)) else None

    def all_gather(self, x: jax.Array, name: str | None, axis: int) -> jax.Array:
        """Gathers `axis`, which `name` splits; the gradient is summed and scattered."""
        axes = self.mesh_axes(name)
        return jax.lax.all_gather(x, axes, axis=axis, tiled=True) if axes else x

    def all_to_all(self, x: jax.Array, name: str | None, split: int, joined: int) -> jax.Array:
        """All-to-all over the devices that split `name`: axis `split` is split, axis `joined` becomes whole."""
        axes = self.mesh_axes(name)
        return jax.lax.all_to_all(x, axes, split, joined, tiled=True) if axes else x

    def all_tokens(self, x: jax.Array) -> jax.Array:
        """Gathers keys and values (or their inputs) [B, T, ...] over T, of which devices have parts, in natural order.

        Every query attends to all earlier tokens, so this is what context parallelism moves; gradients are scattered.
        """
        x, n = self.all_gather(self.vary(x, "heads"), "length", axis=1), self.size("length")
        if not self.zigzag or n == 1:
            return x
        first, last = jnp.moveaxis(x.reshape(x.shape[0], n, 2, -1, *x.shape[2:]), 2, 0)
        return jnp.concatenate([first, jnp.flip(last, 1)], axis=1).reshape(x.shape)

    def psum(self, x: Any, name: str) -> Any:
        """Sum over the devices that split `name`."""
        axes = self.mesh_axes(name)
        return jax.lax.psum(x, axes) if axes else x

    def psum_scatter(self, x: jax.Array, name: str, axis: int) -> jax.Array:
        """Sum over the devices that split `name`, each keeping its part of `axis`."""
        axes = self.mesh_axes(name)
        return jax.lax.psum_scatter(x, axes, scatter_dimension=axis, tiled=True) if axes else x

    def own_part(self, x: jax.Array, name: str, axis: int) -> jax.Array:
        """The part of `axis`, whole on each device, that this one holds where `name` splits it."""
        size = x.shape[axis] // self.size(name)
        return jax.lax.dynamic_slice_in_dim(x, self.axis_index(name) * size, size, axis)

    def pmax(self, x: Any, name: str) -> Any:
        """Maximum over the devices that split `name`."""
        axes = self.mesh_axes(name)
        return jax.lax.pmax(x, axes) if axes else x


TRAIN_RULES = AxisRules.of(
    batch=("data", "fsdp"),
    length="context",
    embed="fsdp",
    rank="fsdp",
    mlp="tensor",
    vocab="tensor",
    heads="tensor",
    kv_heads="tensor",
)
"""Training: sequences over data and fsdp, tokens over context, query heads, MLP and vocabulary over tensor."""
ZIGZAG_RULES = dataclasses.replace(TRAIN_RULES, zigzag=True)
"""The same with tokens in zigzag order, which is how the train step has them."""


def decode_rules(split_heads: bool = True, *, split_tokens: bool = False) -> AxisRules:
    """The decoding table: latent heads over `tensor`, the cache's tokens over `context`, sequences over `data`.

    Args:
      split_heads: whether the query heads of W_qb and W_o are split over `tensor` too. If split, a device reads fewer
        weights; if not, MLRA-4 needs one exchange between devices per attention layer instead of three.
      split_tokens: whether `tensor` splits the cache's tokens instead of its heads, and the weights as usual: decode
        context parallelism, for fewer latent heads than devices (MLA).
    """
    return AxisRules.of(
        batch="data",
        cache_length=("context", "tensor") if split_tokens else "context",
        mlp="tensor",
        vocab="tensor",
        heads="tensor" if split_heads else None,
        kv_head_shards=None if split_tokens else "tensor",
    )


def _divides(what: str, size: int, axis: str, by: int, hint: str = "") -> list[str]:
    if size % by == 0:
        return []
    sizes = [str(d) for d in range(1, size + 1) if size % d == 0 and d <= 64]
    return [
        f"{what}={size} is not divisible by mesh axis {axis}={by}; use --mesh.{axis} {', '.join(sizes)}{hint}."
    ]


def train_layout_faults(m: ModelConfig, mesh: MeshConfig) -> list[str]:
    """One sentence for each size of the model that the mesh does not divide in the training layout."""
    return [
        *_divides("model.n_heads", m.n_heads, "tensor", mesh.tensor),
        *_divides("model.d_ff", m.d_ff, "tensor", mesh.tensor),
        *_divides("model.vocab_size", m.vocab_size, "tensor", mesh.tensor),
        *_divides("model.d_model", m.d_model, "fsdp", mesh.fsdp),
    ]


def check_train_layout(config: TrainConfig, mesh: MeshConfig) -> None:
    """Checks that the model and the batch can be laid out on a resolved mesh, before anything is allocated.

    Raises:
      ConfigError: lists every size that does not divide.
    """
    faults = train_layout_faults(config.model, mesh)
    length, context = config.data.seq_len, mesh.context
    if context > 1 and length % (2 * context):
        sizes = ", ".join(str(d) for d in range(1, 65) if d == 1 or length % (2 * d) == 0)
        faults.append(
            f"data.seq_len={length} is not divisible by twice mesh axis context={context}, whose devices take two runs "
            f"of tokens each; use --mesh.context {sizes}."
        )
    if config.execution.gather == "step" and mesh.tensor * mesh.context > 1:
        faults.append(
            f"execution.gather=step needs mesh.tensor and mesh.context of 1, not {mesh.tensor} and {mesh.context}; use "
            "--execution.gather layer."
        )
    try:
        config.data.accumulation(mesh.data * mesh.fsdp)
    except ConfigError as e:
        faults += e.faults
    if faults:
        raise ConfigError(faults)


def cached_head_faults(config: ModelConfig, tensor: int) -> list[str]:
    """Why the cached heads cannot be laid out over `tensor` devices; empty if they can.

    `tensor` must divide the number of latent (or KV) heads, or be a multiple of it that divides their query heads.
    """
    heads, per_latent = config.cached_heads, config.heads_per_latent
    fits = lambda t: heads % t == 0 or (t % heads == 0 and per_latent % (t // heads) == 0)
    if fits(tensor):
        return []
    legal = filter(fits, range(1, heads * per_latent + 1))
    plural = "s" if per_latent > 1 else ""
    return [
        f"model.{config.attention.cached_heads_field}={heads} (each read by {per_latent} query head{plural}) cannot be "
        f"laid out on mesh axis tensor={tensor}; use --mesh.tensor {', '.join(map(str, legal))} and --mesh.context for "
        "more devices."
    ]


def check_decode_layout(config: ModelConfig, mesh: MeshConfig, split_heads: bool = True) -> None:
    """Checks that the model can decode on a resolved mesh, before anything is allocated.

    Raises:
      ConfigError: lists every size that does not fit.
    """
    t = mesh.tensor
    faults = cached_head_faults(config, t)
    if split_heads and config.attention.cached_heads_field != "n_heads":  # else that fault is listed already
        faults += _divides("model.n_heads", config.n_heads, "tensor", t)
    faults += _divides("model.d_ff", config.d_ff, "tensor", t)
    faults += _divides("model.vocab_size", config.vocab_size, "tensor", t)
    if mesh.fsdp != 1:
        faults.append(
            f"mesh.fsdp={mesh.fsdp}: decoding does not split parameters over fsdp; use --mesh.data, --mesh.tensor or "
            "--mesh.context."
        )
    if faults:
        raise ConfigError(faults)
