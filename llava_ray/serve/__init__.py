"""Ray Serve deployments: the gateway (HTTP), the replicas (models) and the page."""
