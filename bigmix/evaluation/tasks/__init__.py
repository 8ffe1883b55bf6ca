"""Tasks: files of questions for a model, and the scores of its answers."""
