"""Documents become shards, shards become rows, rows become the batches of a step."""
