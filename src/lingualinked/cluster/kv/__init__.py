"""How much KV there may be, and its copies."""
