"""Shards -> training batches: dataset, order, stream, encode, collate."""
