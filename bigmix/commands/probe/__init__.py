"""The knowledge probe: made-up facts planted among texts, and a model's recall of them."""
