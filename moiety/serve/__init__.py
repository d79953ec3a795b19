"""A server that speaks OpenAI's protocol and shows its routing."""
