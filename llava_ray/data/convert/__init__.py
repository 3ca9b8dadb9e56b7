"""Raw data sets -> shards, on Ray Data: run (the spine), partition, write_shard, output."""
