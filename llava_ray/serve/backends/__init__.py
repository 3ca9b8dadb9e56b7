"""What answers a request: the models' replicas, or LLaVA's own workers, behind one registry."""
