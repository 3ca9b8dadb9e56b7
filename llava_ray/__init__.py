"""LLaVA as one Ray application: data, training, evaluation and serving of vision-language models.

Importing the package imports neither torch, Ray nor Gradio; each part imports what it needs.
"""

__version__ = "0.2.0"
