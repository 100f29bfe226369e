"""The workers of a cluster: which devices they are, what they report."""
