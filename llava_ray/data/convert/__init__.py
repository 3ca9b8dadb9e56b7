"""Raw data sets -> shards, on Ray Data.

run is the spine: partition (rows -> jobs), write_shard (a job -> its shard), output (the folder).
records holds what passes between them; inputs tells whether a job's input has changed.
"""
