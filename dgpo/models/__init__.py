"""Model folders in and out: import, shards, export with a model card, push."""
