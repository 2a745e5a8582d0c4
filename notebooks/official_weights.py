# %% [markdown]
# # The paper's own weights
#
# The authors of [Multi-Head Low-Rank Attention](https://arxiv.org/abs/2603.02188) publish their models of
# 2.9 billion parameters, trained in PyTorch. This notebook downloads one, converts it, and generates text
# with it. PyTorch is not needed.
#
# The download and the checkpoint take about 11.5 GB of disk each, and the conversion less than 2 GB of
# memory. In bfloat16, the model takes 5.7 GB on the accelerator; a T4 has 16. With `QUICK = True` below, a
# small model with random weights in the same format is used, and nothing is downloaded.

# %%
import json
import pathlib

import jax
import numpy as np
from flax import nnx

from mlra_jax.attention.kv_cache import values_per_token
from mlra_jax.attention.latent import LatentAttentionConfig
from mlra_jax.checkpoints import lazy_params
from mlra_jax.cli.convert import FromOfficialArgs, from_official
from mlra_jax.config import MeshConfig, ModelConfig
from mlra_jax.convert import (
    model_config_from_official,
    official_from_model_config,
    official_from_params,
    open_weights,
    write_safetensors,
)
from mlra_jax.generation.generator import Delta, Generator
from mlra_jax.model import Transformer

QUICK = False  # True: a small stand-in with random weights, without the internet

mesh = MeshConfig(
    data=1, tensor=1
)  # tensor=4: a latent head of the cache, and a part of the weights, on each of four
MODEL = "mlra_4"
print(f"JAX {jax.__version__} on {jax.device_count()} x {jax.devices()[0].device_kind}")

# %% [markdown]
# ## Get the weights
#
# They are in the repository [Soughing/MLRA](https://huggingface.co/Soughing/MLRA) on the Hugging Face Hub.
# The cell lists its folders and takes the one named `MODEL`; if the model has another name, change it.


# %%
def download(repository: str, name: str) -> pathlib.Path:
    """The local folder with the configuration and weights of the model in folder `name` of the repository."""
    from huggingface_hub import list_repo_files, snapshot_download

    files = list_repo_files(repository)
    folders = sorted({str(pathlib.PurePosixPath(file).parent) for file in files} - {"."})
    folder = next((folder for folder in folders if pathlib.PurePosixPath(folder).name == name), None)
    if folder is None:
        raise SystemExit(
            f"{repository} has no folder {name}; set MODEL to the name of one of {folders or files}."
        )
    return pathlib.Path(snapshot_download(repository, allow_patterns=f"{folder}/*")) / folder


def stand_in(folder: pathlib.Path) -> pathlib.Path:
    """Writes a small model with random weights as the official code would leave it."""
    attention = LatentAttentionConfig(4, 4, q_lora_rank=16, kv_lora_rank=64, d_nope=16, d_rope=8)
    config = ModelConfig(
        384, n_layers=2, d_model=32, n_heads=4, d_ff=64, attention=attention, output_init="normal"
    )
    params = nnx.to_pure_dict(nnx.state(Transformer(config, rngs=nnx.Rngs(0)), nnx.Param))
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", official_from_params(params, config, with_head=True))
    official = official_from_model_config(config, block_size=64) | {"model_type": MODEL}
    (folder / "config.json").write_text(json.dumps(official))
    return folder


folder = stand_in(pathlib.Path("runs/stand_in_files") / MODEL) if QUICK else download("Soughing/MLRA", MODEL)
for file in sorted(folder.iterdir()):
    print(f"{file.stat().st_size:>15,}  {file.name}")

# %% [markdown]
# ## What they contain
#
# `open_weights` reads names and shapes; the values of a tensor are read only by `np.asarray`. The
# configuration is converted to one of ours, which says what each device would cache.

# %%
weights = open_weights(folder)
official = json.loads((folder / "config.json").read_text())
config = model_config_from_official(official, MODEL)
print(config.attention)
for name, tensor in weights.items():
    if not name.startswith("transformer.h.") or name.startswith("transformer.h.0."):
        print(f"{name:50} {tensor.shape}")
for tensor in (1, 2, 4):
    print(
        f"{values_per_token(config, tensor)} cached values per token and layer on each of {tensor} device(s)"
    )

# %% [markdown]
# ## Convert
#
# This goes tensor by tensor, and takes a few minutes for the full model. In a shell, `mlra-convert
# from-official FOLDER --out RUN` does the same. The result is the checkpoint of a run at step 0, to decode,
# evaluate, or train further.

# %%
run = pathlib.Path("runs") / f"official_{'stand_in' if QUICK else MODEL}"
if not run.exists():
    tokenizer = "byte" if QUICK else "gpt2"
    from_official(FromOfficialArgs(str(folder), out=str(run), model_type=MODEL, tokenizer=tokenizer))

# %% [markdown]
# Nothing is lost: converted back, a tensor has its original values.

# %%
back = official_from_params(lazy_params(run), config)
for name in ("layernorm.weight", "transformer.h.1.attn.kv_b_proj"):
    np.testing.assert_array_equal(np.asarray(back[name]), np.asarray(weights[name]).astype(np.float32))
print("equal, number for number")

# %% [markdown]
# ## Generate

# %%
generator = Generator.from_checkpoint(str(run), mesh=mesh)
prompt = "The capital of France is"
print(prompt, end="")
for event in generator.stream(prompt, max_new_tokens=8 if QUICK else 100):
    if isinstance(event, Delta):
        print(event.text, end="", flush=True)
    else:
        stats = event.stats
print(
    f"\n\n{stats.cache_bytes_per_device:,} bytes of cache for {stats.cache_tokens_per_row} tokens on each device"
)

# %% [markdown]
# Next: [fine-tuning, and converting an MLA to an MLRA](../docs/conversion.md), [decoding on several
# devices](../docs/decoding.md).
