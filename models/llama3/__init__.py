"""Llama 3, 3.1 and 3.2 (text): sizes, module, and exchange of weights with Hugging Face."""
