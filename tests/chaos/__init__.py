"""Everything dies at random, and the books balance."""
