"""Draws plain data: tables, HTML, figures.

Knows rich and, behind an extra, matplotlib; decides and measures nothing.
"""
