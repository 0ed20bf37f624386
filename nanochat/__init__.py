"""nanochat-RAG: train a small chat model that answers from documents, from raw text to chat."""
