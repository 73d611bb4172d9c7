"""The live policy: a Ray Train worker group that runs DeepSpeed on its share of the pairs."""
