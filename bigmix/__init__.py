"""bigmix trains a causal language model on a mixture, so that it learns a task and keeps its
knowledge.
"""

__version__ = "0.1.0"
