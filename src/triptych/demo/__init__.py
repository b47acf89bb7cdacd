"""The embedded default model: its scenes, its training and its scores."""
