"""What a trained model is worth: perplexity of token shards, log-likelihoods of texts, lm-evaluation-harness."""
