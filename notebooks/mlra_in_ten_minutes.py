# %% [markdown]
# # MLRA in ten minutes
#
# [Multi-Head Low-Rank Attention](https://arxiv.org/abs/2603.02188) (MLRA) caches as little as Multi-Head
# Latent Attention (MLA), but unlike MLA's, its cache can be split over devices. This notebook shows the idea
# in pictures and in one equation, then trains a small model on a few plays by Shakespeare and generates
# text. Any of Colab's accelerators will do, and so will a CPU, in a few minutes.

# %%
import dataclasses
import inspect

import jax
import matplotlib.pyplot as plt
import numpy as np

import mlra_jax as mlra
from mlra_jax import reference
from mlra_jax.attention.kv_cache import values_per_token
from mlra_jax.cli.plot import draw_run

QUICK = False  # True: a few steps only, to see that everything runs

mesh = mlra.MeshConfig(data=-1)  # all devices; each trains on its part of a batch
print(f"JAX {jax.__version__} on {jax.device_count()} x {jax.devices()[0].device_kind}")

# %% [markdown]
# ## Which heads read what
#
# For each token that it has seen, an attention layer keeps some values: the *cache*. Multi-head attention
# caches a key and a value for each head. MLA caches one *latent* vector, from which the keys and values of
# all heads are computed when needed, and a small rotary key with the position, which all heads share.
#
# MLRA splits the latent into L *latent heads*. Each query head reads J of them, its *branches*; J is the
# number in MLRA-2 and MLRA-4. GLA splits the latent too, but each query head reads only one part.

# %%
variants = {
    name: mlra.load_config(run).model
    for name, run in {"MLA": "mla", "GLA-2": "gla_2", "MLRA-2": "mlra_2", "MLRA-4": "mlra_4"}.items()
}


def draw_readers(axes, name, model, n_heads=8):
    """Query heads above, latent heads below as wide as they are, a line wherever one reads the other."""
    a = model.attention
    colors = plt.cm.viridis(np.linspace(0.1, 0.85, a.n_latent_heads))
    width = n_heads / a.n_latent_heads
    for latent in range(a.n_latent_heads):
        axes.bar((latent + 0.5) * width, 0.25, 0.9 * width, bottom=-0.25, color=colors[latent])
        for head in range(n_heads):
            group = head // (n_heads // a.n_groups)
            if latent % a.n_groups == group:
                axes.plot([head + 0.5, (latent + 0.5) * width], [1, 0], color=colors[latent], linewidth=1)
    axes.plot(np.arange(n_heads) + 0.5, np.ones(n_heads), "o", color="black", markersize=8)
    axes.set_title(f"{name}: L = {a.n_latent_heads}, J = {a.n_branches}")
    axes.axis("off")


figure, panels = plt.subplots(1, len(variants), figsize=(14, 2.5), layout="constrained")
for axes, (name, model) in zip(panels, variants.items(), strict=True):
    draw_readers(axes, name, model)
plt.show()

# %% [markdown]
# Black dots are query heads (8 of the 24), and bars are cached latents. Imagine each bar on its own device:
# MLA has one bar, which every device must copy; MLRA-4 has four, and every query head still reads the whole
# cache.
#
# ## What each device caches
#
# The number of values per token and layer in the paper's models of 2.9 billion parameters, read off the
# cache that decoding would allocate.

# %%
models = {"MHA": mlra.load_config("mha").model, **variants}
devices = (1, 2, 4, 8)
table = {name: [values_per_token(model, n) for n in devices] for name, model in models.items()}
print("devices " + "".join(f"{n:>7}" for n in devices))
for name, values in table.items():
    print(f"{name:8}" + "".join(f"{v:>7}" for v in values))

figure, axes = plt.subplots(figsize=(9, 3.5), layout="constrained")
for i, (name, values) in enumerate(table.items()):
    bars = axes.bar(np.arange(len(devices)) + (i - 2) * 0.17, values, 0.16, label=name)
    axes.bar_label(bars, fontsize=7)
axes.set_xticks(range(len(devices)), devices)
axes.set_yscale("log", base=2)
axes.set_ylim(bottom=64)
axes.set_xlabel("devices that split the heads")
axes.set_ylabel("cached values on each")
axes.legend(ncols=3)
plt.show()

# %% [markdown]
# ## The equation
#
# Query head $n$ attends once in each of its branches $l$, and the results are summed *after* the softmax:
#
# $$y_n = \frac{1}{\sqrt J} \sum_{l} \mathrm{softmax}\left(\frac{q_n \cdot k_{l,n}}{\sqrt{H + R}}\right) v_{l,n}
# \qquad k_{l,n} = [W^{UK}_{l,n} c_l \,;\, k^{rope}] \qquad v_{l,n} = W^{UV}_{l,n} c_l$$
#
# $c_l$ is latent head $l$. MLA sums inside the key, before its single softmax, which is why its latent
# cannot be split: a device with a part of it could not compute the softmax. In MLRA each device computes
# the softmaxes of its latent heads, and only the sum crosses devices.
#
# Here is the same in code, for any L and J, from the [file](../mlra_jax/reference.py) with the equations of
# all attentions of the paper, which the tests compare the model with. Letters: B sequences, T and S positions, D
# model width, N query heads, L latent heads, C their width, J branches, A query rank, H and R the widths of
# a head without and with rotary position ([docs/notation.md](../docs/notation.md)).

# %%
for part in (reference.latent, reference.softmax_weights, reference.attention):
    print(inspect.getsource(part))

# %% [markdown]
# ## Train a small model
#
# `tiny` is an MLRA-4 of 1.3 million parameters that reads and writes bytes; its corpus of seven plays, and
# an eighth held out, comes with the package. Progress is printed as it trains. If you run the cell again,
# it continues from the last checkpoint, or finds that there is nothing left to do.

# %%
config = dataclasses.replace(mlra.load_config("tiny"), out="runs/mlra_in_ten_minutes", mesh=mesh)
micro_batch = max(1, config.data.global_batch // jax.device_count())
config = dataclasses.replace(config, data=dataclasses.replace(config.data, micro_batch=micro_batch))
if QUICK:
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, n_layers=1, d_model=64, d_ff=64),
        log=dataclasses.replace(config.log, every=1, eval_sequences=8, tensorboard=False),
        steps=3,
        compilation_cache="",
    )
result = mlra.train(config)

# %%
figure, axes = plt.subplots(figsize=(8, 4))
draw_run(axes, config.run_dir, "step", smooth=0.0)
axes.set_xlabel("step")
axes.set_ylabel("loss (nats per byte)")
axes.legend()
plt.show()
print(f"held-out loss after {result.step} steps: {result.eval_loss} nats per byte")

# %% [markdown]
# ## Look inside
#
# These are the attention weights of the first layer's first query head, one picture for each latent head
# that it reads: four softmaxes where MLA has one.

# %%
loaded = mlra.load_model(config.run_dir, layout="train")
text = "ROMEO:\nBut soft, what light"
tokens = np.array([loaded.tokenizer.encode(text)])
with jax.set_mesh(loaded.mesh):
    weights = mlra.attention_weights(loaded.model, tokens, layer=0)

figure, panels = plt.subplots(1, len(weights), figsize=(16, 4.5), layout="constrained")
for latent, axes in enumerate(panels):
    axes.imshow(weights[latent, 0, 0], cmap="magma")
    axes.set_title(f"latent head {latent}")
    for ticks in (axes.set_xticks, axes.set_yticks):
        ticks(range(len(text)), [repr(c)[1:-1] for c in text], fontsize=7)
panels[0].set_ylabel("the byte that looks")
plt.show()

# %% [markdown]
# ## Generate text
#
# The generator loads the checkpoint, prefills the cache with the prompt, and then generates a token at a
# time. It attends to the latents themselves: `W^UK` is applied to the query, and `W^UV` after the softmax,
# so that keys and values are never built.

# %%
generator, prompt = mlra.Generator.from_checkpoint(config.run_dir), "ROMEO:"
print(prompt, end="")
for event in generator.stream(prompt, max_new_tokens=8 if QUICK else 400, temperature=0.7, seed=1):
    if isinstance(event, mlra.Delta):
        print(event.text, end="", flush=True)
    else:
        stats = event.stats
print(f"\n\n{stats.cache_bytes_per_device:,} bytes of cache for {stats.cache_tokens_per_row} tokens")

# %% [markdown]
# On four devices, the same call with `mesh=mlra.MeshConfig(data=1, tensor=4)` gives each of them one latent
# head of the cache.
#
# Next: [the attention as a library](attention_as_a_library.ipynb), [the paper's own
# weights](official_weights.ipynb), and the [documentation](../README.md).
