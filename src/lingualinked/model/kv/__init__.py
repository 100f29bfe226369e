"""KV layers of a stage, and the cache of a session that consists of them."""
