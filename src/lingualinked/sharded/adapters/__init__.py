"""Adapters by peft: loaded and switched in the caller, used by the stages."""
