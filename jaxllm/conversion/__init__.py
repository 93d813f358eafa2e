"""Published weights in the Hugging Face format, read and written by the same tables."""
