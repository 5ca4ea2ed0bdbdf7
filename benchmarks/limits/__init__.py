"""What the same machine can do at most: the service's own building blocks, with no service around them."""
