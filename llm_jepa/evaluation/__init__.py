"""Generation, multiple choice, predictions files, embeddings, vLLM."""
