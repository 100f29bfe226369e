"""One pass through the stages: sent, in flight, checked."""
