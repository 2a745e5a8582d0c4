"""Generation: the KV cache, the engine (prefill and step), sampling."""
