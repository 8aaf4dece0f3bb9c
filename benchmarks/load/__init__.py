"""What holds when it is strained: a server that many clients ask at once, a training that is killed."""
