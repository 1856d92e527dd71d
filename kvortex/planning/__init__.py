"""Foresees what KVortex does for a model from its config.json, without torch and vLLM."""
