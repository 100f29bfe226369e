"""Drawing plain data: tables, HTML, pictures.

Knows rich and, behind an extra, matplotlib; nothing is decided or measured here.
"""
