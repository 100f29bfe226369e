"""The KV of sessions on its way between workers."""
