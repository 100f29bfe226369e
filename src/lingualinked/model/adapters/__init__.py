"""Adapters by peft in a stage."""
