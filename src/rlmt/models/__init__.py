"""Loading of language models and what is computed with them."""
