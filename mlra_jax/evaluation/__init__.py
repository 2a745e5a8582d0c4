"""Evaluation: perplexity of token shards, log-likelihoods of texts, lm-evaluation-harness."""
