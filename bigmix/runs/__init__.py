"""Checkpoints that are whole or absent, written beside the training, read on any number of
ranks.
"""
