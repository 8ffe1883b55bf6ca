"""The quick start: a corpus from the standard library, and the recipes of three runs."""
