"""Directories that others open: begun beside, resumed, renamed when whole.

In: a checkpoint and the layers kept. Out: a Hugging Face directory, or the files of a packed one.
"""
