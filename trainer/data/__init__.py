"""Text to batches: dataset sources, document order, tokenizer, packing and the data loader."""
