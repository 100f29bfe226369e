"""A call of the model: what forward takes and returns, its KV handle and its gradients."""
