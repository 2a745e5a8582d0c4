# What `import mlra_jax` offers, by the module that defines it: read by type checkers and, at run time, by __init__.py.
# docs/make_api.py makes docs/api.md from it.

from mlra_jax.attention.base import Attention as Attention
from mlra_jax.attention.grouped import GroupedAttention as GroupedAttention
from mlra_jax.attention.grouped import GroupedAttentionConfig as GroupedAttentionConfig
from mlra_jax.attention.kv_cache import Cache as Cache
from mlra_jax.attention.kv_cache import LayerCache as LayerCache
from mlra_jax.attention.latent import LatentAttention as LatentAttention
from mlra_jax.attention.latent import LatentAttentionConfig as LatentAttentionConfig
from mlra_jax.attention.tensor_product import TensorProductAttention as TensorProductAttention
from mlra_jax.attention.tensor_product import TensorProductAttentionConfig as TensorProductAttentionConfig
from mlra_jax.attention.tied import TiedAttention as TiedAttention
from mlra_jax.attention.tied import TiedAttentionConfig as TiedAttentionConfig
from mlra_jax.cli.configs import load_config as load_config
from mlra_jax.config import AttentionConfig as AttentionConfig
from mlra_jax.config import CheckpointConfig as CheckpointConfig
from mlra_jax.config import ConfigError as ConfigError
from mlra_jax.config import DataConfig as DataConfig
from mlra_jax.config import ExecutionConfig as ExecutionConfig
from mlra_jax.config import LogConfig as LogConfig
from mlra_jax.config import MeshConfig as MeshConfig
from mlra_jax.config import ModelConfig as ModelConfig
from mlra_jax.config import OptimConfig as OptimConfig
from mlra_jax.config import RotaryScalingConfig as RotaryScalingConfig
from mlra_jax.config import TrainConfig as TrainConfig
from mlra_jax.generation.generator import Completion as Completion
from mlra_jax.generation.generator import Delta as Delta
from mlra_jax.generation.generator import GenerationOptions as GenerationOptions
from mlra_jax.generation.generator import Generator as Generator
from mlra_jax.generation.load import Loaded as Loaded
from mlra_jax.generation.load import load_model as load_model
from mlra_jax.generation.sampling import Sampling as Sampling
from mlra_jax.model.transformer import Transformer as Transformer
from mlra_jax.model.weights import attention_weights as attention_weights
from mlra_jax.ops.decode import factored_decode_attention as factored_decode_attention
from mlra_jax.ops.decode import grouped_decode_attention as grouped_decode_attention
from mlra_jax.ops.decode import latent_decode_attention as latent_decode_attention
from mlra_jax.ops.dispatch import choose as choose
from mlra_jax.ops.dispatch import explain as explain
from mlra_jax.sharding import TRAIN_RULES as TRAIN_RULES
from mlra_jax.sharding import AxisRules as AxisRules
from mlra_jax.sharding import decode_rules as decode_rules
from mlra_jax.sharding import make_mesh as make_mesh
from mlra_jax.training.loop import TrainResult as TrainResult
from mlra_jax.training.loop import train as train

__version__: str
