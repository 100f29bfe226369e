"""Steps that stop at hooked modules, and backward passes through what steps have left."""
