"""From one plan to another through plans in between, each of which fits beside the one before.

Knows spans and bytes; neither seconds nor how layers are moved.
"""
