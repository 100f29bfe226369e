"""Other programs that run the same model, where they are installed.

Know their programs and files; not how anything is sharded here.
"""
