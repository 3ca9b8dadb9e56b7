"""Our engine: `scheduling` decides what a step computes, `execution` computes it."""
