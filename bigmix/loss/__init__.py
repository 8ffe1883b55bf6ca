"""The language model head and the mixed objective as one operation."""
