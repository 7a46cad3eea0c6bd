"""One federated algorithm a file."""
