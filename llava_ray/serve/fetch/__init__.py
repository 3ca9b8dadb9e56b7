"""Images behind URLs in requests: which URLs and IP addresses are allowed, and the download."""
