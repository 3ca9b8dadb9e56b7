"""RawRow sets become shards, once, on Ray Data."""
