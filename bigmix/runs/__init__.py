"""The folder of a run on disk: checkpoints, metrics, and where the run resumes."""
