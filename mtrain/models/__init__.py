"""Hugging Face models: built or loaded exactly, refused by name, attached to sparse ring attention."""
