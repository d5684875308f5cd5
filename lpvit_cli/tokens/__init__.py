"""Merging of similar tokens between the blocks of a transformer."""
