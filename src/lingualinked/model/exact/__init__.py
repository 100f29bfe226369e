"""Linear layers and attention with the bits of torch's, by kernels that read the weights once, and the probes that prove it.

Knows torch and the compiled kernels; of transformers the one attention function.
"""
