"""What a router did: numbers from a `Routing` (`stats`) and one page to look at (`report`)."""
