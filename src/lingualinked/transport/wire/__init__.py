"""A message as bytes: its frames and tensors, their limits, and what is refused."""
