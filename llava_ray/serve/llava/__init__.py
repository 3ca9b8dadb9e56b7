"""LLaVA's own controller and worker protocol as data: parsing and formatting, without Ray."""
