"""What the next step computes: sequences, the scheduler, the cache's allocation. No torch here."""
