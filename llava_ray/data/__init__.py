"""Data for training: raw sets become shards once, and training reads them in one exact order.

raw files -> sources (one pure function a source: row -> Sample) -> convert (Ray Data): images are
read and checked -> shards (Parquet) and a manifest -> plan: the order of an epoch, from the seed
alone -> stream (Ray actors): decode, encode, collate -> batches for a training worker.

Only `convert` and `stream` run on Ray, and only `collate` knows torch.
"""
