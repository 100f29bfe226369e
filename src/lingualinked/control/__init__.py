"""Deciding, from what a running pipeline tells, whether layers should move: a pure state machine."""
