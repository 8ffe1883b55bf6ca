"""The contestants of the loader benchmark, a module each; `reader.py` says what each one has."""
