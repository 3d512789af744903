"""The seam to Hugging Face transformers: the only room that imports it, and only when asked."""
