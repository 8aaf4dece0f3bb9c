"""Models trained and evaluated as a user does it, and the data for that."""
