"""The only folder that uses undocumented names of transformers; each of them has a test."""
