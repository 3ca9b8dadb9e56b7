"""Shards become training batches, in an order that is a function of the seed."""
