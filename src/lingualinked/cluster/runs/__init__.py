"""Steps that the stages make by themselves."""
