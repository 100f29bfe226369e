"""Make the sample checkpoint that ships in the package: its corpus, its training and its evaluation.

Knows nothing of the library: the result is an ordinary Hugging Face checkpoint that the library then cuts.
"""
