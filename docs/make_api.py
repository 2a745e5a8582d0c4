"""Writes docs/api.md from the docstrings of what `import mlra_jax as mlra` offers, and the examples below.

python docs/make_api.py

The examples run one after another in one namespace (`tests/test_docs.py`).
"""

import ast
import dataclasses
import inspect
import itertools
import pathlib
import re
import runpy
from typing import Any

import mlra_jax as mlra

PAGE = pathlib.Path(__file__).with_name("api.md")
configuration = runpy.run_path(str(PAGE.with_name("make_configuration.py")))
field_texts = configuration["field_texts"]

INTRODUCTION = """\
# The Python interface

<!-- Written by docs/make_api.py from the code: change the texts there, then run it. -->

```python
import mlra_jax as mlra
```

provides the names on this page; each is imported when it is first used. The examples are tested, in this order, on a
CPU. Letters in shapes are those of [notation.md](notation.md). Names that are not listed here may change between
versions.
"""

CONFIG_ERROR = """
try:
    dataclasses.replace(config, steps=0, seed=-1).validate()
except mlra.ConfigError as error:
    assert len(error.faults) == 2  # one sentence for each
"""

TRAIN = """
result = mlra.train(config)
assert isinstance(result, mlra.TrainResult) and result.step == 2
"""

LOAD_CONFIG = """
paper = mlra.load_config("mlra_4")  # a file of configs/, or a path
assert paper.model.attention.n_branches == 4
"""

CONFIGURATIONS = """
import dataclasses
import functools

import jax
import numpy as np
from flax import nnx

import mlra_jax as mlra

model = mlra.ModelConfig(
    vocab_size=384,
    n_layers=1,
    d_model=32,
    n_heads=4,
    d_ff=64,
    attention=mlra.LatentAttentionConfig(
        n_latent_heads=4, n_branches=4, q_lora_rank=16, kv_lora_rank=32, d_nope=8, d_rope=8
    ),
    output_init="normal",
    init_std=0.1,
    compute_dtype="float32",
)
config = mlra.TrainConfig(
    name="small_one",
    model=model,
    execution=mlra.ExecutionConfig(remat="none"),
    data=mlra.DataConfig(seq_len=32, global_batch=8),
    optim=mlra.OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=1, decay_steps=2),
    mesh=mlra.MeshConfig(data=-1),
    checkpoint=mlra.CheckpointConfig(every=2),
    log=mlra.LogConfig(eval_sequences=8, tensorboard=False),
    steps=2,
    compilation_cache="",
)
config.validate()
yarn = mlra.RotaryScalingConfig("yarn", factor=4.0, original_max_position=32)
longer = dataclasses.replace(model, rotary_scaling=yarn)  # for sequences of 128 tokens
"""

OTHER_ATTENTIONS = """
gqa = dataclasses.replace(model, attention=mlra.GroupedAttentionConfig(n_kv_heads=2, d_head=8))
gta = dataclasses.replace(model, attention=mlra.TiedAttentionConfig(n_tied_heads=2, d_head=8))
tpa = dataclasses.replace(model, attention=mlra.TensorProductAttentionConfig(rank=2, q_rank=3, d_head=8))
assert all(isinstance(m.attention, mlra.AttentionConfig) for m in (model, gqa, gta, tpa))
[m.attention.cache_arrays() for m in (model, gqa, gta, tpa)]
"""

LAYER = """
attention = jax.jit(lambda: mlra.LatentAttention(model, rngs=nnx.Rngs(0)))()
x_BTD = np.random.default_rng(0).normal(size=(2, 6, model.d_model)).astype(np.float32)
y_BTD = jax.jit(lambda attention, x: attention(x))(attention, x_BTD)  # whole sequences

decoder, cache = attention.to_decode(), attention.init_cache(batch=2, max_len=6)
assert isinstance(attention, mlra.Attention) and isinstance(cache, mlra.LayerCache)
step, new = jax.jit(lambda decoder, *args: decoder.decode(*args)), np.array([3, 3])
first, cache = step(decoder, x_BTD[:, :3], cache, np.array([0, 0]), new)  # three tokens of each row
second, cache = step(decoder, x_BTD[:, 3:], cache, np.array([3, 3]), new)  # and three more
np.testing.assert_allclose(np.concatenate([first, second], axis=1), y_BTD, atol=1e-4)
"""

OTHER_LAYERS = """
for layer, m in ((mlra.GroupedAttention, gqa), (mlra.TiedAttention, gta), (mlra.TensorProductAttention, tpa)):
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: layer(m, rngs=nnx.Rngs(0))), nnx.Param))
    print(layer.__name__, jax.tree.map(lambda w: w.shape, shapes))
"""

MODEL = """
transformer = jax.jit(lambda: mlra.Transformer(model, rngs=nnx.Rngs(0)))()
tokens_BT = np.arange(12).reshape(2, 6)
logits_BTV = jax.jit(lambda transformer, tokens: transformer(tokens))(transformer, tokens_BT)
"""

WEIGHTS = """
weights = mlra.attention_weights(transformer, tokens_BT)
assert weights.shape == (1, 4, 2, 4, 6, 6)  # layers, branches, sequences, heads, queries, keys
one_layer = mlra.attention_weights(attention, x_BTD)
"""

CACHE = """
cache = mlra.Cache.create(model, mlra.decode_rules(), batch=2, max_len=6)
cache.capacity, cache.bytes_per_device()
"""

LOAD = """
loaded = mlra.load_model("runs/small_one", layout="train")
assert isinstance(loaded, mlra.Loaded) and loaded.config.model == model
with jax.set_mesh(loaded.mesh):
    first_layer = mlra.attention_weights(loaded.model, tokens_BT, layer=0)
"""

MESH = """
mesh = mlra.make_mesh(mlra.MeshConfig(data=1), jax.devices()[:1])
with jax.set_mesh(mesh):
    print(mlra.TRAIN_RULES.spec("batch", "length", "heads", None))  # of queries in training
    print(mlra.decode_rules().spec("batch", "kv_head_shards", "cache_length", None))  # of a cache
# For a mesh of your own:
rules = mlra.AxisRules.of(batch="replica", heads="model", mlp="model", vocab="model")
"""

LATENT_OP = """
B, T, L, M, C, R, S = 2, 1, 4, 4, 8, 8, 64
random = lambda *shape: np.random.default_rng(0).normal(size=shape).astype(np.float32)
q_nope, q_rope = random(B, T, L, M, C), random(B, T, L, M, R)
kv_latent, k_rope = random(B, L, S, C), random(B, S, R)
kv_len = np.array([[10], [64]])  # what the new token of each row sees
decode = functools.partial(mlra.latent_decode_attention, scale=0.25)
out, lse = jax.jit(decode)(q_nope, q_rope, kv_latent, k_rope, kv_len)
"""

COLUMNS = """
tokens = np.concatenate([*kv_latent.swapaxes(0, 1), k_rope], axis=2)  # side by side, [B, S, L * C + R]
pool, pages = tokens.reshape(8, 16, -1), np.arange(8).reshape(B, 4)  # as pages of 16 tokens
latents, keys = mlra.Columns(pool, (0, 8, 16, 24), width=C), mlra.Columns(pool, (32,), width=R)
paged, _ = jax.jit(decode)(q_nope, q_rope, latents, keys, kv_len, page_table=pages)
np.testing.assert_allclose(paged, out, atol=1e-5)
"""

GROUPED_OP = """
q, k, v = random(B, T, 2, 4, 8), random(B, 2, S, 8), random(B, 2, S, 8)
out, lse = jax.jit(functools.partial(mlra.grouped_decode_attention, scale=0.35))(q, k, v, kv_len)
"""

FACTORED_OP = """
q, a, b = random(B, T, 4, 1, 8), random(B, 4, S, 2), random(B, S, 2 * 8)
out, lse = jax.jit(functools.partial(mlra.factored_decode_attention, scale=0.35))(q, a, b, a, b, kv_len)
"""

EXPLAIN = """
why = mlra.explain(decode, q_nope, q_rope, kv_latent, k_rope, kv_len)
assert why["latent_decode_attention"]["xla"] is None  # it takes the call
"""

CHOOSE = """
with mlra.choose(latent_decode_attention="reference"):
    same, _ = jax.jit(decode)(q_nope, q_rope, kv_latent, k_rope, kv_len)
"""

GENERATE = """
generator = mlra.Generator.from_checkpoint("runs/small_one")
prompts = ["ROMEO:", [74, 85, 76, 73, 69, 84, 58]]  # text, or token ids
texts = generator.generate(prompts, max_new_tokens=4, temperature=0.8, top_p=0.95)
assert len(texts) == 2
"""

OPTIONS = """
sampling = mlra.Sampling(temperature=0.8, top_p=0.95)
options = mlra.GenerationOptions(max_new_tokens=4, sampling=sampling, seed=1)
for event in generator.stream(prompts, options):
    if isinstance(event, mlra.Delta):
        print(event.text, end="")
    elif isinstance(event, mlra.Completion):
        print(event.finish_reason, event.tokens)
# Each prompt in its own way: greedy, and sampled.
generator.generate(prompts, sampling=[mlra.Sampling(), sampling], max_new_tokens=[4, 2])
"""

SECTIONS: dict[str, dict[str, tuple[tuple[str, ...], str]]] = {
    # Heading: {example: the names that it shows, and that are described before it}.
    "Configurations": {
        "TrainConfig ModelConfig LatentAttentionConfig RotaryScalingConfig ExecutionConfig MeshConfig DataConfig "
        "OptimConfig CheckpointConfig LogConfig": CONFIGURATIONS,
        "AttentionConfig GroupedAttentionConfig TiedAttentionConfig TensorProductAttentionConfig": OTHER_ATTENTIONS,
        "ConfigError": CONFIG_ERROR,
        "load_config": LOAD_CONFIG,
    },
    "Attention": {
        "Attention LatentAttention LayerCache": LAYER,
        "GroupedAttention TiedAttention TensorProductAttention": OTHER_LAYERS,
    },
    "Models": {
        "Transformer": MODEL,
        "attention_weights": WEIGHTS,
        "Cache": CACHE,
    },
    "Training and checkpoints": {"train TrainResult": TRAIN, "load_model Loaded": LOAD},
    "Generation": {
        "Generator": GENERATE,
        "GenerationOptions Sampling Delta Completion": OPTIONS,
    },
    "Devices": {"make_mesh AxisRules TRAIN_RULES decode_rules": MESH},
    "Operations": {
        "latent_decode_attention": LATENT_OP,
        "Columns": COLUMNS,
        "grouped_decode_attention": GROUPED_OP,
        "factored_decode_attention": FACTORED_OP,
        "explain": EXPLAIN,
        "choose": CHOOSE,
    },
}
"""Of each heading the names, and the example after them in which they are used."""

METHODS = {
    "AttentionConfig": ("module", "cached_heads", "cache_arrays"),
    "Attention": ("__call__", "decode", "to_decode", "init_cache"),
    "Transformer": ("__call__", "hidden", "decode"),
    "Cache": ("create", "repeat", "bytes_per_device"),
    "Generator": ("from_checkpoint", "generate", "complete", "stream"),
    "Sampling": ("filtered_logits",),
    "AxisRules": ("of", "spec", "size"),
}
"""Methods for users of a class. What there is for authors of an attention docs/extending.md says."""


def markdown(docstring: str) -> str:
    """A docstring with its parts (`Args:` and the like) as lists."""
    lines: list[str] = []
    part = ""
    for line in docstring.splitlines():
        if found := re.fullmatch(r"(Args|Returns|Raises):", line):
            part = found[1]
            lines += [f"*{part}*", ""]
        elif part and re.match(r"  \S", line):
            name, colon, text = line.strip().partition(": ")
            lines.append(f"- `{name}`{colon}{text}" if part != "Returns" else line.strip())
        else:
            lines.append(line.strip() if part == "Returns" else line[2:] if part else line)
    return "\n".join(lines)


class Shown:
    """What stands in a signature for an annotation or a default."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


def shown_default(value: Any) -> Any:
    """A default as one would write it."""
    if value == mlra.TRAIN_RULES:
        return Shown("TRAIN_RULES")
    if not dataclasses.is_dataclass(value):
        return value
    given = [
        f"{f.name}={v!r}" for f in dataclasses.fields(value) if (v := getattr(value, f.name)) != f.default
    ]
    return Shown(f"{type(value).__name__}({', '.join(given)})")


def signature(name: str, value: Any) -> list[str]:
    """The call of a function or class, as a block; a parameter on each line where they are many."""
    found = inspect.signature(value.__init__ if inspect.isclass(value) else value)
    as_written = lambda of: Shown(of) if isinstance(of, str) else of
    parameters = [
        p.replace(annotation=as_written(p.annotation), default=shown_default(p.default))
        for p in found.parameters.values()
        if p.name != "self"
    ]
    result = inspect.Signature.empty if inspect.isclass(value) else as_written(found.return_annotation)
    found = found.replace(parameters=parameters, return_annotation=result)
    call = f"{name}{found}"
    if len(call) > 100:
        star = next((i for i, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY), None)
        lines = [str(p) for p in parameters]
        if star is not None:
            lines.insert(star, "*")
        call = (
            f"{name}({''.join(f'{chr(10)}    {line},' for line in lines)}\n){str(found).rpartition(')')[2]}"
        )
    return ["```text", call, "```", ""]


def fields(cls: type) -> list[str]:
    """The fields of a dataclass with the texts below them."""
    texts = field_texts(cls)
    return [*(f"- `{name}`: {text}" for name, text in texts.items()), ""] if texts else []


def methods(name: str, cls: type) -> list[str]:
    """The methods of a class that are for its users."""
    lines = []
    for method in METHODS.get(name, ()):
        bound = f"mlra.{name}.{method}" if isinstance(vars(cls)[method], classmethod) else f".{method}"
        text = markdown(inspect.getdoc(getattr(cls, method)))
        lines += [f"**`{bound}`**", "", *signature(bound, getattr(cls, method)), text, ""]
    return lines


def entry(name: str) -> list[str]:
    """Heading and docstring of an exported name; its call, fields and methods, where it has them."""
    value = getattr(mlra, name)
    lines = [f"### `{name}`", ""]
    if not callable(value):
        return [*lines, text_below(inspect.getmodule(type(value)), name), ""]
    text = [markdown(inspect.getdoc(value)), ""]
    if not inspect.isclass(value):
        return [*lines, *signature(f"mlra.{name}", value), *text]
    if issubclass(value, Exception):
        return [*lines, *text]
    if dataclasses.is_dataclass(value):
        if name.endswith("Config"):
            return [*lines, *text, f"[Its fields](configuration.md#{anchor(name)}).", ""]
        return [*lines, *text, *fields(value), *methods(name, value)]
    call = [] if name.endswith("Config") else signature(f"mlra.{name}", value)
    return [*lines, *call, *text, *methods(name, value)]


def anchor(config: str) -> str:
    """Of a configuration's section in configuration.md."""
    headings = {cls.__name__: heading for heading, _, cls, _ in configuration["SECTIONS"]}
    return re.sub(r"[^\w\- ]", "", headings[config].lower()).replace(" ", "-")


def text_below(module: Any, name: str) -> str:
    """The text below a module's variable, on one line."""
    body = ast.parse(inspect.getsource(module)).body
    for statement, text in itertools.pairwise(body):
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", "") == name:
            return " ".join(text.value.value.split())
    raise KeyError(name)


def page() -> str:
    """The whole of docs/api.md."""
    lines = [INTRODUCTION]
    for heading, examples in SECTIONS.items():
        lines += [f"## {heading}", ""]
        for names, example in examples.items():
            for name in names.split():
                lines += entry(name)
            lines += ["```python", example.strip(), "```", ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


if __name__ == "__main__":
    PAGE.write_text(page())
