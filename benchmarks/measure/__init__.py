"""Speed, memory, operations and equality with other code, each on its own."""
