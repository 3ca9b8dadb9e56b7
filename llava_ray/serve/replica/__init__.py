"""One replica of a model on Ray Serve: an engine, and its metrics."""
