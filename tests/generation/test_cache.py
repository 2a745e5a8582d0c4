"""What a token takes in the cache of a device, counted from what decoding would allocate."""

import dataclasses
import re

import pytest

from mlra_jax.attention.grouped import GroupedAttentionConfig
from mlra_jax.attention.kv_cache import values_per_token
from mlra_jax.attention.latent import LatentAttentionConfig
from mlra_jax.cli.configs import load_config
from mlra_jax.config import ConfigError, ModelConfig

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


def with_64_query_heads(model):
    """The model with 64 query heads, and as many KV heads, or 8 in place of 6."""
    attention = model.attention
    for field in {"n_kv_heads", "n_tied_heads"} & {f.name for f in dataclasses.fields(attention)}:
        heads = {24: 64, 6: 8, 1: 1}[getattr(attention, field)]
        attention = dataclasses.replace(attention, **{field: heads})
    return dataclasses.replace(model, n_heads=64, attention=attention)


def test_the_tables_of_docs_attention_are_what_is_counted(repository):
    def counted(model, tensor):
        try:
            return values_per_token(model, tensor)
        except ConfigError:
            return None

    number = lambda cell: None if cell.strip() == "–" else float(cell)
    text = (repository / "docs" / "attention.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|((?: [\d.–]+ \|){4})$", text, re.MULTILINE)
    table = lambda rows: {name: [*map(number, cells.split("|")[:4])] for name, cells in rows}
    runs, head_widths = table(rows[:11]), table(rows[11:])
    assert len(runs) == len(head_widths) == 11
    for name in runs:
        model = load_config(name).model
        assert [counted(model, t) for t in (1, 2, 4, 8)] == runs[name], name
        wide = with_64_query_heads(model)
        assert [counted(wide, t) / D_HEAD for t in (1, 2, 4, 8)] == head_widths[name], name


def test_a_size_over_which_the_cached_heads_cannot_be_laid_out_is_refused():
    with pytest.raises(ConfigError, match=r"n_latent_heads=4 .* tensor=3; use --mesh.tensor 1, 2, 4"):
        values_per_token(PAPER, 3)
