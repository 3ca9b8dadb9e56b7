"""Asking: questions go to engines in Ray actors, to an endpoint or to the live application."""
