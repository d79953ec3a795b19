"""One decoder, the families that are tables of it, and the files that they come in."""
