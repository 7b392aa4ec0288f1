"""A model and a plan become a smaller model."""
