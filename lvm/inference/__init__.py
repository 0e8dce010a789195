"""Generation with a KV cache, prompts and contact sheets."""
