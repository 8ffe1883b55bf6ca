"""Tasks: files of questions that a model is asked, and how its answers are scored."""
