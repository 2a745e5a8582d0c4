"""Names of what is dear to compute again, for rematerialisation policies (`jax.ad_checkpoint.checkpoint_name`)."""

ATTENTION = "attention"
"""Output and log-sum-exp of attention over whole sequences. A kernel with a backward pass of its own names both where
its forward pass saves them, else all of it would run again."""
MLP = "mlp"
"""The products with the MLP's first two matrices."""
HEADS = "heads"
"""The heads' output, a product with a matrix for each head."""
