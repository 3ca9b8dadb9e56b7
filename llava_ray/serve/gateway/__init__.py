"""The HTTP side of the application: routes, keys, rate limits, the request log and metrics."""
