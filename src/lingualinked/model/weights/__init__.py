"""Where weights come from, and how a span gets its own."""
