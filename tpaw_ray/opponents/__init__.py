"""Opponents: frozen checkpoints that answer prompts, each hosted by Ray actors with a vLLM engine inside."""
