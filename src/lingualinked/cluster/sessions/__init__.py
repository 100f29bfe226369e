"""Conversations whose KV lies in every stage."""
