"""Attention: one module for each family, and what they share.

`latent` is MLA, GLA and MLRA; `grouped` MHA, GQA, MQA and MFA; `tied` GTA; `tensor_product` TPA (docs/attention.md).
"""
