"""Tests by kind; helpers that they share are in tests/support."""
