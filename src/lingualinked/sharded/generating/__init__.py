"""How the loop of ``generate`` keeps all stages busy: prompts in chunks, batches in microbatches, tokens chosen in the stages.

Knows transformers' loop and sessions; neither stages nor messages.
"""
