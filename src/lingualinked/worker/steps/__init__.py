"""Runs steps, runs of steps and packed steps, and sends their results on."""
