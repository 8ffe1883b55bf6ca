"""One module a contestant: `NOTE`, `PACKAGES`, `PART_TOKENS`, `write(corpus, folder)`,
`open_reader(...)`; see reader.py.
"""
