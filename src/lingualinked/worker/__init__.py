"""The device's side: the process that hosts stages and runs their steps.

Knows nothing of plans, of the other stages' layers, or of text.
"""
