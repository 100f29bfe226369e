"""``lingualinked bench``: measures a sharded model against other ways of running it, all in one run.

Knows the public face, the uncut model and other programs; not how anything is sharded.
"""
