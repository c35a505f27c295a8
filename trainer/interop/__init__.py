"""The rest of the ecosystem: Hugging Face folders in and out, generation, evaluation."""
