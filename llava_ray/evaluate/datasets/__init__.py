"""Reading: the benchmarks' own question and annotation files -> `Question`, a module a kind."""
