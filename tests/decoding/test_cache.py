"""What a token takes in the cache of a device, counted from what decoding would allocate."""

import dataclasses

import pytest

from mlra_jax.config import ConfigError, GroupedAttentionConfig, LatentAttentionConfig, ModelConfig
from mlra_jax.decoding.cache import values_per_token

D_HEAD = 128
PAPER = ModelConfig(n_heads=64)  # the sizes of the paper's table of cached values: 64 query heads, 128 wide
latent = lambda *heads: LatentAttentionConfig(*heads, kv_lora_rank=4 * D_HEAD, d_nope=D_HEAD, d_rope=64)


@pytest.mark.parametrize(
    ("attention", "head_widths"),
    [
        (GroupedAttentionConfig(64, D_HEAD), (128, 64, 32, 16)),
        (GroupedAttentionConfig(8, D_HEAD), (16, 8, 4, 2)),
        (latent(1, 1), (4.5, 4.5, 4.5, 4.5)),
        (latent(2, 1), (4.5, 2.5, 2.5, 2.5)),
        pytest.param(latent(4, 4), (4.5, 2.5, 1.5, 1.5), marks=pytest.mark.smoke),
    ],
    ids=["mha", "gqa", "mla", "gla_2", "mlra_4"],
)
def test_cached_values_of_a_token_on_1_2_4_and_8_devices_are_those_of_the_papers_table(
    attention, head_widths
):
    config = dataclasses.replace(PAPER, attention=attention)
    counted = [values_per_token(config, tensor) for tensor in (1, 2, 4, 8)]
    assert counted == [D_HEAD * widths for widths in head_widths]


def test_a_size_over_which_the_cached_heads_cannot_be_laid_out_is_refused():
    with pytest.raises(ConfigError, match=r"n_latent_heads=4 .* tensor=3; use --mesh.tensor 1, 2, 4"):
        values_per_token(PAPER, 3)
