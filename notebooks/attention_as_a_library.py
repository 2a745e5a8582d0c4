# %% [markdown]
# # The attention as a library
#
# `LatentAttention` is MLA, GLA and MLRA in one Flax NNX module; `mlra_jax.ops.decode` has the kernels that
# read its cache. Here you use both in a small model of your own, on a mesh of eight devices simulated by the
# CPU; the same code runs on eight real ones. The notebook needs no accelerator and takes a minute or two.

# %%
import os

# Before JAX starts; leave both out on eight real devices.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from mlra_jax import (
    LatentAttention,
    LatentAttentionConfig,
    ModelConfig,
    decode_rules,
    explain,
    latent_decode_attention,
)

QUICK = False  # True: a few steps only, to see that everything runs

mesh = jax.make_mesh((2, 4), ("data", "tensor"), (AxisType.Explicit,) * 2)
jax.set_mesh(mesh)
print(f"JAX {jax.__version__}, {mesh}")

# %% [markdown]
# ## Your own model
#
# The attention takes a `ModelConfig`, of which it uses only the sizes that it needs, and a table from
# logical axis names to mesh axes: here the library's own, which splits sequences over `data` and query heads
# over `tensor`. You can define your own, such as `AxisRules.of(batch="data", heads="tensor")`. Without a
# mesh nothing is split and the table has no effect.
#
# Letters: B sequences, T and S positions, D model width, V vocabulary, N query heads, L latent heads, C
# their width, H and R the widths of a head without and with rotary position
# ([docs/notation.md](../docs/notation.md)).

# %%
config = ModelConfig(
    vocab_size=32,
    d_model=64,
    n_heads=4,
    attention=LatentAttentionConfig(
        n_latent_heads=4, n_branches=4, q_lora_rank=32, kv_lora_rank=64, d_nope=16, d_rope=16
    ),
    compute_dtype="float32",
)


class Recaller(nnx.Module):
    """An embedding, one attention, and a projection to the logits of the next token."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (config.vocab_size, config.d_model)))
        self.attention = LatentAttention(config, rngs=rngs)
        self.head = nnx.Param(0.1 * jax.random.normal(rngs.params(), (config.d_model, config.vocab_size)))

    def embed(self, tokens_BT):
        """On a mesh with explicit axes a lookup says how its result is laid out."""
        return self.embedding[...].at[tokens_BT].get(out_sharding=P("data"))

    def __call__(self, tokens_BT):
        """Logits [B, T, V]."""
        x_BTD = self.embed(tokens_BT)
        return (x_BTD + self.attention(x_BTD)) @ self.head[...]


model = Recaller(config, rngs=nnx.Rngs(0))

# %% [markdown]
# ## Where arrays are
#
# The type of an array says how it is split. `visualize_array_sharding` draws arrays of up to two axes, so
# the pictures show two axes of each: a number is a device, and a box is the part that it holds.

# %%
for name, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    print(f"{'.'.join(name):24}", jax.typeof(param[...]))

print("W_qb, query rank down, query heads across: training splits the query heads")
jax.debug.visualize_array_sharding(model.attention.w_qb[...][:, :, 0])

tokens = jax.device_put(np.zeros((8, 16), np.int32), P("data"))
print("what the attention gives, sequences down, positions across")
forward = jax.jit(lambda model, tokens: model.attention(model.embed(tokens)))
jax.debug.visualize_array_sharding(forward(model, tokens)[:, :, 0])

# %% [markdown]
# ## Train it
#
# The task is a random half, followed by the same half again. Guessing costs log 32 = 3.47 nats per token; a
# model that looks back by half the length pays nothing for the second half.

# %%
LENGTH, BATCH, STEPS = 16, 64, 3 if QUICK else 150
optimizer = optax.adam(3e-3)


def batch(rng, n=BATCH):
    half = rng.integers(0, config.vocab_size, (n, LENGTH // 2), dtype=np.int32)
    return jax.device_put(np.concatenate([half, half], axis=1), P("data"))


def second_half_loss(model, tokens_BT):
    log_p = jax.nn.log_softmax(model(tokens_BT[:, :-1]))
    chosen = jax.nn.one_hot(tokens_BT[:, 1:], config.vocab_size) * log_p
    return -chosen[:, LENGTH // 2 - 1 :].sum(axis=-1).mean()


@functools.partial(jax.jit, donate_argnums=(0, 1))
def train_step(model, optimizer_state, tokens_BT):
    graph, params = nnx.split(model)
    loss, grads = jax.value_and_grad(lambda p: second_half_loss(nnx.merge(graph, p), tokens_BT))(params)
    updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
    return nnx.merge(graph, optax.apply_updates(params, updates)), optimizer_state, loss


rng = np.random.default_rng(0)
optimizer_state = optimizer.init(nnx.state(model))
for step in range(STEPS):
    model, optimizer_state, loss = train_step(model, optimizer_state, batch(rng))
    if step % 25 == 0 or step == STEPS - 1:
        print(f"step {step:4}: {float(loss):.3f} nats per token of the second half")

# %% [markdown]
# ## Decode it
#
# A layer's cache has two arrays: `kv_latent` [B, L, S, C], and `k_rope` [B, S, R] for all heads. Decoding
# splits the *latent heads* over `tensor`: `to_decode` lays out the layer's parameters accordingly on the
# current mesh, and `init_cache` makes an empty cache. In `decode`, each device attends over its own latent
# head with the kernel, and one sum over `tensor` ends the layer.

# %%
decoder = model.attention.to_decode(decode_rules(split_heads=False))
tokens = batch(rng, n=8)
x_BTD = model.embed(tokens)
cache, new = decoder.init_cache(batch=8, max_len=LENGTH), jnp.ones(8, jnp.int32)
step = jax.jit(lambda decoder, *args: decoder.decode(*args), donate_argnums=2)
outputs = []
for t in range(LENGTH):
    y_B1D, cache = step(decoder, x_BTD[:, t : t + 1], cache, jnp.full(8, t), new)
    outputs.append(np.asarray(y_B1D))

# %% [markdown]
# Token by token, it computes what the module computes for the whole sequence.

# %%
expected = np.asarray(forward(model, tokens))
np.testing.assert_allclose(
    np.concatenate(outputs, axis=1), expected, rtol=0, atol=1e-4 * np.abs(expected).max()
)
print("decoding agrees with the whole sequence")

print("kv_latent, sequences down, latent heads across: each device has its own latent head")
jax.debug.visualize_array_sharding(cache["kv_latent"][:, :, 0, 0])
print("k_rope, sequences down, positions across: the devices along tensor have the same")
jax.debug.visualize_array_sharding(cache["k_rope"][:, :, 0])

# %% [markdown]
# ## Which kernel
#
# The op uses the fastest implementation that accepts the arguments; `explain` says which one that is and why
# the others decline. On an H100 it would be `mosaic_gpu`, on a TPU `mosaic_tpu`.
# `implementation="reference"` selects one by name.

# %%
bfloat16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
with jax.set_mesh(jax.make_mesh((1,), ("one",), (AxisType.Auto,), devices=jax.devices()[:1])):
    reasons = explain(
        latent_decode_attention,
        bfloat16((1, 1, 1, 24, 128)),  # one latent head of the paper's MLRA-4
        bfloat16((1, 1, 1, 24, 64)),
        bfloat16((1, 1, 4096, 128)),
        bfloat16((1, 4096, 64)),
        jax.ShapeDtypeStruct((1, 1), jnp.int32),
        scale=192**-0.5,
    )
for name, reason in reasons["latent_decode_attention"].items():
    print(f"{name:12} {reason or 'takes it'}")

# %% [markdown]
# `mlra_jax.Transformer`, `to_decode` and `Cache` do all this for the whole model,
# for every attention of the paper, and with pages, ragged batches and a split along the tokens:
# [docs/sharding.md](../docs/sharding.md), [docs/decoding.md](../docs/decoding.md).
